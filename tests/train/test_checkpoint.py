"""Checkpoints: only whole ones, the last two, and the last good one after an error of the disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longspan.errors import RunError
from longspan.train.checkpoint import Checkpoints, write_atomically


def test_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.load() is None
    for step in (5, 10, 15):
        checkpoints.save(step, {"x": torch.full((3,), float(step)), "list": [1]})
    found = checkpoints.load()
    assert found is not None
    step, state = found
    assert step == 15
    assert state["x"].tolist() == [15.0] * 3
    assert checkpoints.steps() == [10, 15]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10):
        path = checkpoints.save(step, {"x": torch.full((3,), float(step))})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"step-00000010\.pt is damaged. The one before"):
        found = checkpoints.load()
    assert found is not None
    assert found[0] == 5
    assert found[1]["x"].tolist() == [5.0] * 3
    (tmp_path / "step-00000005.pt").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(RunError, match="No checkpoint"),
    ):
        checkpoints.load()


def test_full_disk_keeps_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"x": torch.zeros(10)})

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=r"step 3.*No space left on device.*step-00000002\.pt.*--resume"
    ):
        checkpoints.save(3, {"x": torch.zeros(10)})
    assert checkpoints.steps() == [1, 2]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pt", ".pt"]
    assert checkpoints.load() is not None


def test_error_in_the_middle_of_a_write_keeps_the_last_good_one(tmp_path: Path) -> None:
    # The operating system itself stops the write, as a full disk does, inside torch's serialiser.
    script = f"""
import resource, signal, torch
from pathlib import Path
from longspan.errors import RunError
from longspan.train.checkpoint import Checkpoints
checkpoints = Checkpoints(Path({str(tmp_path)!r}))
checkpoints.save(1, {{"x": torch.zeros(10)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoints.save(2, {{"x": torch.zeros(100_000)}})
except RunError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert "step 2 could not be written" in done.stdout
    assert "File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert Checkpoints(tmp_path).steps() == [1]


def test_leftovers_of_a_kill_are_ignored_and_removed(tmp_path: Path) -> None:
    (tmp_path / "step-00000009.pt.tmp").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    checkpoints.save(10, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
