"""How long work tells how far it is: a call with plain values; silent unless one is given."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after each finished piece of work."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` pieces of ``what`` are finished; ``note`` says how it goes."""
        ...


def silent(what: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody watches."""


def prefixed(stage: str, progress: Progress) -> Progress:
    """The same progress with the name of a stage in front of each piece of work."""

    def told(what: str, done: int, total: int, note: str = "") -> None:
        progress(f"{stage}: {what}", done, total, note)

    return told
