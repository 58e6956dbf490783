"""What the GPU benchmarks share: records, caches of compiled kernels, processes, a budget.

A benchmark checks its rivals in processes side by side, which also compile: what the libraries
below can keep on disk, the process that times finds there.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.eval.environment import environment, version
from longspan.eval.records import read_lines

KERNELS = ("cudnn", "flash", "hopper", "flex_flash", "flex")
RESULTS = Path(__file__).parent / "results"
HEADS, KEY_HEADS = 32, 8
# What the libraries below our kernels call themselves.
LIBRARIES = {
    "cudnn": "FLEX_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "flex_flash": "FLASH_ATTENTION",
}
STACK = ("nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "flash-attn-4")
Work = tuple[str, float, Callable[[], None]]


def share_caches() -> None:
    """Let the process that times find what the checking processes compiled."""
    folder = os.environ.setdefault("LONGSPAN_BENCH_CACHE", tempfile.mkdtemp(prefix="routes-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
    if "LONGSPAN_BENCH_UNSHARED" in os.environ:
        return
    for library in LIBRARIES.values():
        os.environ[f"{library}_CUTE_DSL_CACHE_ENABLED"] = "1"
        os.environ[f"{library}_CUTE_DSL_CACHE_DIR"] = f"{folder}/{library.lower()}"


def unshare(kernel: str) -> bool:
    """Turn the cache of a kernel's library off; False if it was off."""
    name = f"{LIBRARIES.get(kernel, '')}_CUTE_DSL_CACHE_ENABLED"
    return os.environ.pop(name, None) is not None


class Log:
    """Records as lines of a file, and on the terminal."""

    def __init__(self, path: Path, earlier: Path | None = None) -> None:
        """Begin a file.

        Args:
            path: the file.
            earlier: records of another run, which are put in front of this one's.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.earlier = read_lines(earlier) if earlier is not None and earlier.exists() else []
        if self.earlier:
            text = "".join(json.dumps(row) + "\n" for row in self.earlier)
            path.write_text(text, encoding="utf-8")

    def timed(self) -> list[dict[str, Any]]:
        """What was timed: of each kernel on each case what its last run says, if that is a time.

        A share of the dense rate is one of its own run.
        """
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in (*self.earlier, *self.rows):
            if row["kind"] not in ("speed", "long"):
                continue
            # What fails before it is timed fails in both ways.
            for way in (row["way"],) if "way" in row else (None, "forward", "forward+backward"):
                found.pop(_case(row, way), None)
            if "tflops" in row:
                found[_case(row, row.get("way"))] = row
        return list(found.values())

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
        shown = {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
        shown.pop("trace", None)
        print(json.dumps(shown, default=str), flush=True)

    def without_superseded(self) -> None:
        """Leave out of the file what a later record says anew."""
        rows = [*self.earlier, *self.rows]
        last = {what: i for i, row in enumerate(rows) for what in _what(row)}
        kept = [row for i, row in enumerate(rows) if last[_what(row)[-1]] == i]
        text = "".join(json.dumps(row, default=str) + "\n" for row in kept)
        whole = self.path.with_suffix(".new")
        whole.write_text(text, encoding="utf-8")
        whole.replace(self.path)

    def machine(self, **more: Any) -> None:
        """Versions and hardware."""
        stack = {name: version(name) for name in STACK}
        self.add(kind="machine", **environment(), stack=stack, **more)


def _case(row: Mapping[str, Any], way: str | None) -> tuple[Any, ...]:
    return row["kind"], row["pattern"], row["n"], row["width"], way, row["kernel"]


def _what(row: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What a record is of, without its way and with it; all of it where each run has its own.

    What failed before it was timed has no way, and any later record stands for it.
    """
    if "kernel" not in row:
        return [(json.dumps(row, default=str),)]
    names = ("kind", "kernel", "width", "pattern", "case", "n")
    case = tuple(row.get(name) for name in names)
    return [case, (*case, row["way"])] if "way" in row else [case]


def failed(error: Exception) -> dict[str, str]:
    """What a record says of an error."""
    if isinstance(error, Refusal):
        return {"refused": str(error)}
    text, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    # Where modules lie on this machine is nobody's business.
    for folder in sorted(filter(None, sys.path), key=len, reverse=True):
        trace = trace.replace(f"{folder.rstrip('/')}/", "")
    return {"error": text[:500], "trace": trace[-2000:]}


def device_of_this_run() -> str:
    """cuda, or what a rehearsal asked for."""
    return os.environ.get("LONGSPAN_BENCH_DEVICE", "cuda")


def dtype_of_this_run() -> torch.dtype:
    """bfloat16; in a rehearsal float32, whose gradients a CPU computes in reasonable time."""
    return torch.bfloat16 if device_of_this_run() == "cuda" else torch.float32


def tensors(
    n: int, width: int, *, heads: int = HEADS, key_heads: int = KEY_HEADS, batch: int = 1
) -> list[Tensor]:
    """Normal q, k and v, the same in every process."""
    device = device_of_this_run()
    make = torch.Generator(device).manual_seed(n + width)
    shapes = [(batch, h, n, width) for h in (heads, key_heads, key_heads)]
    dtype = dtype_of_this_run()
    return [torch.randn(s, generator=make, device=device, dtype=dtype) for s in shapes]


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Give memory back that no tensor holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def side_by_side(script: str, names: Sequence[str], log: Log, seconds: float) -> None:
    """Run ``script --check NAME`` in processes of their own and collect their records."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, script, "--out", str(folder), "--check"]
    jobs = {}
    # A few threads each: they compile at the same time.
    own = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    for name in names:
        with (folder / f"{name}.log").open("w") as text:
            jobs[name] = subprocess.Popen(
                [*command, name], env=own, stdout=text, stderr=subprocess.STDOUT
            )
    until = time.monotonic() + seconds
    for name, job in jobs.items():
        try:
            code = job.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
            code = "stopped: no time left"
        path = folder / f"{name}.jsonl"
        for row in read_lines(path) if path.exists() else ():
            log.add(**row)
        if code:
            tail = (folder / f"{name}.log").read_text()[-1500:]
            log.add(kind="check process", name=name, code=code, output=tail)


def do(work: Sequence[Work], log: Log, seconds: float, after: Callable[[], None]) -> None:
    """Do one thing after another as long as there is time.

    Args:
        work: name, seconds that it may need, and what to do.
        log: where what was skipped or failed is told.
        seconds: that are left.
        after: called after each.
    """
    until = time.monotonic() + seconds
    for name, needed, step in work:
        if until - time.monotonic() < needed:
            log.add(kind="skipped", name=name, why="no time left")
            continue
        try:
            step()
        except Exception as error:
            log.add(kind="failed", name=name, **failed(error))
        free()
        after()
