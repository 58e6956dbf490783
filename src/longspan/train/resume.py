"""What may change between the two halves of a run: the number of steps may grow, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.errors import DataError
from longspan.eval.progress import Progress
from longspan.eval.records import differences


def check_continues(
    out: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, steps: str
) -> None:
    """Raise DataError unless a run may go on, or on from its end, with new settings.

    Args:
        out: its folder, to name it.
        old: settings that it was started with.
        new: settings that it is to go on with.
        steps: key of the number of steps.
    """
    may = old if new[steps] < old[steps] else {**old, steps: new[steps]}
    if may != new:
        raise DataError(
            f"The run in {out} was started with other settings: {differences(may, new)}. "
            "Resume with the settings it was started with, or give a new folder; only the number "
            "of steps may grow."
        )


def say_finished(progress: Progress, steps: int) -> None:
    """Report that a run was finished before, and nothing was done."""
    progress("finished", steps, steps, "nothing is left to do; more steps need its checkpoint")
