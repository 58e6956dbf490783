"""How long work tells how far it is: a call with plain values, so that libraries and notebooks stay quiet."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after each finished piece of work."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """``what`` names the work, ``done`` of ``total`` pieces are finished, ``note`` says how it goes."""
        ...


def silent(what: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody watches."""
