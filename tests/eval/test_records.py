"""Record files: continued, never mixed, and whole after a kill."""

from __future__ import annotations

import math
import resource
from pathlib import Path

import pytest

from longspan.errors import DataError
from longspan.eval.plain import mean
from longspan.eval.records import Records, fingerprint


def test_records_continue(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    records = Records(path, {"model": "m", "n": 1})
    records.add("a", {"nll": 1.5})
    again = Records(path, {"n": 1, "model": "m"})
    assert "a" in again
    assert again["a"] == {"nll": 1.5}
    again.add("b", {"nll": 2.0})
    assert len(Records(path, {"model": "m", "n": 1})) == 2


def test_what_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Records(path, {}).add("a", {"nll": math.nan, "each": [1.5, -math.inf]})
    assert path.read_text().endswith('{"key": "a", "nll": null, "each": [1.5, null]}\n')
    assert Records(path, {})["a"] == {"nll": None, "each": [1.5, None]}
    # A mean over what was lost is no number.
    assert math.isnan(mean([1.5, Records(path, {})["a"]["nll"]]))
    assert mean([1.0, 2.0]) == 1.5


def test_a_line_that_was_cut_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records = Records(path, {})
    records.add("a", {"nll": 1.5})
    whole = path.read_text()
    path.write_text(whole + '{"key": "b", "nl')
    again = Records(path, {})
    assert "b" not in again
    assert path.read_text() == whole
    again.add("b", {"nll": 2.0})
    assert Records(path, {})["b"] == {"nll": 2.0}


def test_a_run_that_is_killed_leaves_the_file_whole(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "r.jsonl"

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Records(path, {"a": 1})
    assert not path.exists()
    Records(path, {"a": 1}).add("x", {"loss": 2.0})
    broken = path.read_text() + '{"key": "y", "lo'
    path.write_text(broken)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Records(path, {"a": 1})
    assert path.read_text() == broken
    assert Records(path, {"a": 1})["x"] == {"loss": 2.0}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Records(path, {"length": 512, "model": "m"})
    with pytest.raises(DataError, match="length was 512, is 1024"):
        Records(path, {"length": 1024, "model": "m"})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(DataError, match="not a record file"):
        Records(path, {})
    assert path.read_text() == "hello\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00binary",
        b'{"header": 3}\n',
        b'{"header": {"settings": {}}}\n',
        b'{"header": {"settings": {}, "hash": "x"}}\n{"loss": 1}\n',
        b"7\n",
    ],
)
def test_files_that_begin_otherwise_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a record file"):
        Records(path, {})
    assert path.read_bytes() == content


def test_fingerprint_ignores_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(DataError, match="run is a file: give a folder"):
        Records(tmp_path / "run" / "records.jsonl", {})


def test_a_full_disk_is_named_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    records = Records(path, {"model": "m"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
        with pytest.raises(OSError, match=r"File too large: '.*results\.jsonl'"):
            records.add("a", {"nll": 1.0, "note": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # What is half written is dropped.
    assert "a" not in Records(path, {"model": "m"})
