"""Loading and saving without the progress bars of transformers, and with errors of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_bars() -> Iterator[None]:
    """A block without transformers' own bars, which would be drawn across those of a command."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def saving() -> Iterator[None]:
    """A block that writes files: no bars, and a disk that is full is an OSError, whoever wrote."""
    with no_bars():
        try:
            yield
        except Exception as error:
            # Libraries in Rust (safetensors, tokenizers) have errors of their own for it.
            if isinstance(error, OSError) or "(os error" not in str(error):
                raise
            raise OSError(str(error)) from error


def first_line(error: Exception) -> str:
    """What an error of another library says first, or its name if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
