"""Checkpoints that survive a kill and a full disk: written beside the old ones, renamed when
complete.

A checkpoint holds only what training changes (the parameters with gradients, the optimizer, the
random generators, the step), so it is small for LoRA. Its name appears only after its bytes are on
the disk.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from longspan.errors import RunError
from longspan.eval.plain import to_json


class Checkpoints:
    """The newest checkpoints of one run.

    Args:
        folder: where they lie; created when the first is saved.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that can be resumed from, oldest first."""
        return sorted(int(path.stem.split("-")[1]) for path in self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Keep the state after ``step`` steps; older ones beyond ``keep`` go only once this one is
        complete.

        Raises:
            RunError: the disk is full or cannot be written; the checkpoints before stay as they
                are.
        """
        path = self._path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
            write_atomically(path, lambda file: torch.save(state, file))
        except OSError as error:
            kept = self.steps()
            good = (
                f"the last good one is {self._path(kept[-1])}"
                if kept
                else "there is none before it"
            )
            raise RunError(
                f"The checkpoint of step {step} could not be written to {self.folder}: "
                f"{error.strerror or error}; "
                f"{good}. Free some space and run the same command with --resume."
            ) from error
        for old in self.steps()[: -self.keep]:
            self._path(old).unlink()
        return path

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """The newest whole checkpoint as (step, state) with tensors on the CPU, or None.

        A damaged one is passed over with a warning.

        Raises:
            RunError: there are checkpoints, and all are damaged.
        """
        damaged: RunError | None = None
        for step in reversed(self.steps()):
            try:
                state = read_state(self._path(step))
            except RunError as error:
                damaged = error
                warnings.warn(f"{error} The one before it is tried.", stacklevel=2)
            else:
                return step, state
        if damaged is not None:
            raise RunError(
                f"No checkpoint in {self.folder} can be read. Remove this folder to train from "
                "the first step again."
            ) from damaged
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"


def read_state(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, with tensors on the CPU.

    Raises:
        RunError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    # Torch has no error of its own for this: what comes depends on the byte that is wrong.
    except Exception as error:
        # Nor for a file that is whole where memory is short.
        if "allocate" in str(error):
            raise
        raise RunError(f"The checkpoint {path} is damaged.") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make ``path`` hold what ``write`` writes, or leave it as it was.

    Raises:
        OSError: what the operating system said; the unfinished file is removed.
    """
    unfinished = path.with_name(path.name + ".tmp")
    failure: list[OSError] = []
    try:
        with unfinished.open("wb") as file:
            try:
                write(_Remembering(file, failure))  # type: ignore[arg-type]
            except Exception:
                # Torch turns an error of the disk into one of its own serialiser.
                if failure:
                    raise failure[0] from None
                raise
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # The name that the caller knows; a full disk gives none.
            error.filename, error.filename2 = str(path), None
        raise
    # Windows opens no folders.
    if os.name == "nt":
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, completely or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all; infinities become null."""
    write_text(path, to_json(value, indent=1) + "\n")


class _Remembering:
    """A binary file that keeps the first OSError of its writes."""

    def __init__(self, file: BinaryIO, failure: list[OSError]) -> None:
        self._file = file
        self._failure = failure

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._failure.append(error)
            raise

    def flush(self) -> None:
        self._file.flush()
