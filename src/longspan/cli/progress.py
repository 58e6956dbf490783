"""Progress on stderr: one bar per stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bars:
    """Shows what library functions report; stdout stays free for results.

    Args:
        every: seconds between plain lines when stderr is no terminal.
    """

    def __init__(self, every: float = 10.0) -> None:
        self._console = Console(stderr=True)
        self._every = every
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._begin: dict[str, float] = {}
        self._last = 0.0

    def __enter__(self) -> Bars:
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<22}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` pieces of ``what`` are finished."""
        if self._bars is None:
            self._line(what, done, total, note)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note=note)
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)

    def _line(self, what: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        first = what not in self._begin
        begin = self._begin.setdefault(what, now)
        if not first and done < total and now - self._last < self._every:
            return
        self._last = now
        left = (now - begin) / done * (total - done) if done and not first else 0.0
        eta = f", {left:.0f} s left" if left and done < total else ""
        self._console.print(
            f"{what} {done}/{total}{', ' + note if note else ''}{eta}",
            highlight=False,
            markup=False,
        )
