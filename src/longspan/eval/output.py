"""Whether results can be written: asked before the work that makes them, not after."""

from __future__ import annotations

import tempfile
from pathlib import Path

from longspan.errors import DataError


def check_output_folder(folder: Path) -> None:
    """Refuse a folder that is there and cannot be written, or cannot be made.

    Raises:
        DataError: with the system's reason.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(
            f"The output folder {folder} is a file: give a folder that is new or empty."
        )
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        _try_in(there)
    except OSError as error:
        raise DataError(
            f"The output folder {folder} cannot be written: {error.strerror or error}. "
            "Give a folder that can be."
        ) from error


def check_output_file(path: Path) -> None:
    """Refuse a file that is there and cannot be written, or whose folder is missing or closed.

    Raises:
        DataError: with the system's reason.
    """
    try:
        if path.exists():
            path.open("ab").close()
        else:
            _try_in(path.absolute().parent)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def check_record_file(path: Path) -> None:
    """Refuse a record file that cannot be written; its folder may be new.

    Raises:
        DataError: with the system's reason.
    """
    check_output_folder(path.absolute().parent)
    if path.exists():
        check_output_file(path)


def _try_in(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass
