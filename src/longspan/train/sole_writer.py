"""One run, one process: two that write into the same folder mix their losses and checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longspan.errors import RunError


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make a folder and hold it for this process until the block ends, or the process does.

    No file is left behind. Where the system or its disk knows no such locks, nothing is held.

    Raises:
        RunError: another process holds it, as under torchrun.
        OSError: the folder cannot be made or read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Windows opens no folders.
    if os.name == "nt":
        yield
        return
    import fcntl

    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"Another process is writing to {folder}. A run is one process, so start it "
                "without torchrun; give each run a folder of its own, or wait for the other."
            ) from None
        # Some network disks.
        except OSError:
            pass
        yield
    finally:
        os.close(held)
