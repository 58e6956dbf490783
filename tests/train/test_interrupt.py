"""Signals that stop a run between its steps."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from longspan.train.interrupt import between_steps

_RUN = """
import signal
from longspan.train.interrupt import between_steps
# Which programs in the background of a shell are born without.
signal.signal(signal.SIGINT, signal.default_int_handler)
with between_steps() as asked:
    for step in range(4):
        for number in {signals}[step]:
            signal.raise_signal(number)
        print(step, flush=True)
        if asked() and {stops}:
            print("kept", flush=True)
            raise KeyboardInterrupt
print("not reached")
"""


@pytest.mark.parametrize(
    ("signals", "stops", "printed"),
    [
        ([[], [15], [], []], True, "0 1 kept"),
        # The second one does not wait for the step.
        ([[], [15, 15], [], []], True, "0"),
        ([[], [2, 15], [], []], True, "0"),
        # What came in the last step is not forgotten.
        ([[], [], [], [15]], False, "0 1 2 3"),
    ],
)
def test_a_sigterm_ends_the_process_after_the_step(signals, stops, printed):
    code = _RUN.format(signals=signals, stops=stops)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.split() == printed.split()
    assert run.returncode == 143
    assert "the run stops after this step; once more, and it stops at once" in run.stderr


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_raised_after_the_block_and_handlers_are_put_back():
    def block():
        with between_steps() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked()

    with pytest.raises(KeyboardInterrupt):
        block()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_of_others_stay():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with between_steps() as asked:
            signal.raise_signal(signal.SIGTERM)
            assert not asked()
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
