"""Peak memory of one call: of the allocator on a GPU, of a fresh process on a CPU.

python -m longspan.bench.memory '{"pattern": "window(512)", "n": 4096, "way": "forward"}'
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longspan.bench import dense
from longspan.bench.setting import Setting, both_ways
from longspan.errors import RunError
from longspan.ops import attend


def on_gpu(call: Callable[[], object]) -> int:
    """Bytes that a call needs above what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_fresh_process(
    pattern: str | None, setting: Setting, way: str, impl: str = "auto"
) -> int | None:
    """Bytes of one call above q, k and v, on a CPU; None where the system does not tell.

    Args:
        pattern: text of the pattern; None for dense attention.
        setting: sizes.
        way: forward, or forward+backward.
        impl: our kernel.

    Raises:
        RunError: the process ended without an answer.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    asked = json.dumps({"pattern": pattern, "way": way, "impl": impl, **vars(setting)})
    command = [sys.executable, "-m", "longspan.bench.memory", asked]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode:
        said = run.stderr.strip().splitlines() or ["killed, as for want of memory"]
        raise RunError(
            f"The memory of {pattern or 'dense attention'} at {setting.n:,} rows, {way}, could "
            f"not be measured: its process ended with {run.returncode} ({said[-1]}). Give shorter "
            "lengths, or leave memory out: bench --no-memory, advise --quick."
        )
    return json.loads(run.stdout)["bytes"]


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))


def peak(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of this process before a call and at its peak. Linux only."""
    before = resident("VmRSS")
    # Linux forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    call()
    return before, resident("VmHWM")


def _here(pattern: str | None, way: str, impl: str = "auto", **sizes: Any) -> int:
    setting = Setting(**sizes)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if pattern is None:
            return dense.sdpa(q, k, v, setting.causal)
        return attend(q, k, v, pattern, impl=impl)

    # Threads and libraries are loaded by a short call first.
    short = Setting(**{**sizes, "n": min(256, setting.n)})
    both_ways(call, short.tensors())[way]()
    before, most = peak(both_ways(call, setting.tensors())[way])
    return most - before


if __name__ == "__main__":
    print(json.dumps({"bytes": _here(**json.loads(sys.argv[1]))}))
