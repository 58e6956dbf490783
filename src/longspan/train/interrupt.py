"""Ctrl-C between two steps, where the state of a run is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_NOTED = b"\nCtrl-C: the run stops after this step; once more, and it stops at once\n"


@contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """A block in which the first Ctrl-C is only noted; what it gives says whether there was one.

    A second one ends the block at once. Outside the main thread, and where somebody else handles
    the signal, nothing changes.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # A step may take minutes. Buffers are not safe here, and there may be no stream.
        with suppress(OSError):
            os.write(2, _NOTED)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
