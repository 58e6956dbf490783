"""Two processes that train into one folder: the second is refused, the first goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longspan.errors import RunError
from longspan.train.sole_writer import sole_writer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")

_HOLD = """
import sys
from pathlib import Path
from longspan.train.sole_writer import sole_writer

with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_until_its_process_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    command = [sys.executable, "-c", _HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="Another process is writing"), sole_writer(folder):
            pass
        other.kill()
        other.wait()
        # Also by a kill, and nothing lies in the way of the next run.
        with sole_writer(folder):
            assert not any(folder.iterdir())
