"""Measurements as lines of JSON: what was measured once is not measured again.

The first line of a file says what was asked (and its hash); each further line is one finished
measurement under a key, with null where a number was not finite. A run that was killed leaves at
most one broken last line, which is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longspan.errors import DataError
from longspan.eval.output import check_output_folder
from longspan.eval.plain import to_json


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Short hash of settings, independent of their order."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Records:
    """Append-only results of one configuration, in a file or (``path=None``) only in memory.

    Args:
        path: the .jsonl file; it is continued when it holds records of the same settings.
        settings: everything that a result depends on.

    Raises:
        DataError: the file belongs to other settings, is no record file, or its folder is one.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._done: dict[str, dict[str, Any]] = {}
        # As they read back from the file: tuples are lists.
        plain = json.loads(json.dumps(settings, default=str))
        header = {"settings": plain, "hash": fingerprint(plain)}
        if path is None:
            return
        if path.parent.is_file():
            check_output_folder(path.parent)
        if path.exists():
            self._load(path, header)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, [{"header": header}])

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._done[key]

    def __len__(self) -> int:
        return len(self._done)

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep one finished measurement."""
        self._done[key] = dict(result)
        if self._path is not None:
            self._append({"key": key, **result})

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._path is not None
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")
        except OSError as error:
            # A full disk gives no name.
            error.filename = str(self._path)
            raise

    def _load(self, path: Path, header: dict[str, Any]) -> None:
        there = read_records(path)
        if there is None:
            raise DataError(
                f"{path} is not a record file of longspan: its first line should be a header. "
                "Give another path or remove the file."
            )
        found, lines = there
        if found["hash"] != header["hash"]:
            changed = differences(found["settings"], header["settings"])
            raise DataError(
                f"{path} holds results of other settings ({changed}). "
                "Give another path, or remove the file to measure again."
            )
        self._done = {line.pop("key"): line for line in lines}
        _replace(path, _with_header(header, self._done))


def read_records(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Header (``settings``, ``hash``) and results (with ``key``) of a file; None if it is no
    record file.
    """
    try:
        lines = read_lines(path)
    except UnicodeDecodeError:
        return None
    if not lines or not all(isinstance(line, dict) for line in lines):
        return None
    header = lines[0].get("header")
    if not isinstance(header, dict) or not header.keys() >= {"settings", "hash"}:
        return None
    if not all("key" in line for line in lines[1:]):
        return None
    return header, lines[1:]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file up to the first line that is not complete JSON."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _replace(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Make a file hold these lines; a run that is killed here leaves it as it was."""
    whole = "".join(to_json(line) + "\n" for line in lines)
    if path.exists() and path.read_text(encoding="utf-8") == whole:
        return
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(whole, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        # The name that the caller knows.
        raise OSError(error.errno, error.strerror, str(path)) from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What changed between two settings, in words: ``steps was 100, is 200``."""
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys)


def _with_header(
    header: Mapping[str, Any], done: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    return [{"header": header}, *({"key": key, **result} for key, result in done.items())]
