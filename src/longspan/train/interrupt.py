"""Ctrl-C and SIGTERM between two steps, where the state of a run is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# The exit code of shells for what a SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_UNHANDLED = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """A block in which the first Ctrl-C or SIGTERM is only noted; what it gives says whether there
    was one.

    A second one ends the block at once. After the block a Ctrl-C that was noted is raised as
    KeyboardInterrupt, a SIGTERM as SystemExit with the code that shells have for it. Outside the
    main thread, and for signals that somebody else handles, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    ours = [one for one, usual in _UNHANDLED.items() if main and signal.getsignal(one) is usual]
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        # A step may take minutes. Buffers are not safe here, and there may be no stream.
        said = f"\n{_NAMES[signal.Signals(number)]}: the run stops after this step; once more, and"
        with suppress(OSError):
            os.write(2, f"{said} it stops at once\n".encode())

    for one in ours:
        signal.signal(one, note)
    try:
        try:
            yield lambda: bool(asked)
        finally:
            for one in ours:
                signal.signal(one, _UNHANDLED[one])
    except KeyboardInterrupt:
        if asked[-1:] == [signal.SIGTERM]:
            raise SystemExit(TERMINATED) from None
        raise
    if asked:
        raise SystemExit(TERMINATED) if asked[-1] == signal.SIGTERM else KeyboardInterrupt
