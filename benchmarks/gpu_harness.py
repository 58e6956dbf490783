"""What the GPU benchmarks share: records, caches of compiled kernels, checks, timing in turns.

A benchmark checks its rivals in processes side by side, which also compile: what the libraries
below can keep on disk, the process that times finds there. Then it compares them at full length,
and times in turns those that were right, dense causal attention among them.
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

from longspan.bench import dense, oracle
from longspan.bench.setting import WAYS, Call, both_ways
from longspan.bench.timing import in_turns, summary
from longspan.errors import Refusal
from longspan.eval.environment import environment, version
from longspan.eval.records import read_lines

KERNELS = ("cudnn", "flex_flash", "flex")
HEADS, KEY_HEADS = 32, 8
# What the libraries below our kernels call themselves.
LIBRARIES = {"cudnn": "FLEX_ATTENTION", "flex_flash": "FLASH_ATTENTION"}
STACK = ("nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "flash-attn-4")
Work = tuple[str, float, Callable[[], None]]


def share_caches() -> None:
    """Let the process that times find what the checking processes compiled."""
    folder = os.environ.setdefault("LONGSPAN_BENCH_CACHE", tempfile.mkdtemp(prefix="routes-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
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

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
        shown = {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
        shown.pop("trace", None)
        print(json.dumps(shown, default=str), flush=True)

    def machine(self) -> None:
        """Versions and hardware."""
        stack = {name: version(name) for name in STACK}
        self.add(kind="machine", **environment(), stack=stack)


def failed(error: Exception) -> dict[str, str]:
    """What a record says of an error."""
    if isinstance(error, Refusal):
        return {"refused": str(error)}
    text = f"{type(error).__name__}: {error}"
    return {"error": text[:500], "trace": traceback.format_exc()[-2000:]}


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


def agreeing(
    makers: Mapping[str, Callable[[], Call]],
    inputs: list[Tensor],
    row_error: Callable[[Tensor], float],
    log: Log,
    about: Mapping[str, Any],
    *,
    inner: slice = slice(None),
) -> tuple[dict[str, Call], dict[str, float]]:
    """Rivals that are right at full length, and the seconds of each one's first call.

    Args:
        makers: of each rival, makes its call anew, with all that a new pattern needs.
        inputs: q, k and v.
        row_error: of an output, the error of some rows.
        log: where what is wrong or refused is told.
        about: what every record says.
        inner: rows that all compute alike; the others are not compared.

    Returns:
        The calls, and the seconds.
    """
    calls: dict[str, Call] = {}
    first: dict[str, float] = {}
    lead: list[Tensor] = []
    largest = oracle.TOLERANCE[inputs[0].dtype]
    for name, make in makers.items():
        try:
            ways = both_ways(make(), inputs)
            out: Any = ways["forward"]()
            results: list[Tensor] = [out]
            try:
                grads: Any = ways["forward+backward"]()
                results += grads
            except (Refusal, NotImplementedError) as refusal:
                log.add(**about, kernel=name, way="forward+backward", refused=str(refusal))
            wait()
            # Kernels are compiled by now; what is left is what a new pattern costs.
            start = time.perf_counter()
            call = make()
            both_ways(call, inputs)["forward"]()
            wait()
            first[name] = time.perf_counter() - start
            rows = row_error(out)
            found = [x[:, :, inner] for x in results]
            apart = [oracle.relative(a, b) for a, b in zip(found, lead or found, strict=False)]
            log.add(**{**about, "kind": "full length"}, kernel=name, rows=rows, apart=apart)
            if rows <= largest and max(apart) <= largest:
                calls[name] = call
                lead = lead if len(lead) >= len(found) else found
            else:
                log.add(**about, kernel=name, error="wrong at full length: not timed")
        except Exception as error:
            log.add(**about, kernel=name, **failed(error))
    return calls, first


def dense_calls(inputs: list[Tensor], log: Log) -> dict[str, Call]:
    """Dense causal attention of each library that is there."""
    found = {}
    offered = dense.on_cpu() if device_of_this_run() == "cpu" else dense.on_gpu()
    for name, call in offered.items():
        try:
            with torch.no_grad():
                call(*inputs)
            found[f"dense {name}"] = call
        except Exception as error:
            log.add(kind="peer", name=name, **failed(error))
    return found


def race(
    calls: Mapping[str, Call],
    pairs: int,
    inputs: list[Tensor],
    log: Log,
    about: Mapping[str, Any],
    *,
    rounds: int,
    more: Callable[[str], Mapping[str, Any]] = lambda name: {},
) -> None:
    """Time rivals and dense attention in turns, both ways, a record for each.

    Args:
        calls: rivals that are right.
        pairs: query-key pairs that each of them computes.
        inputs: q, k and v.
        log: where the records go.
        about: what every record says.
        rounds: rounds that count.
        more: what else a rival's record says.
    """
    width, n = inputs[0].shape[3], inputs[0].shape[2]
    calls = {**calls, **dense_calls(inputs, log)}
    dense_pairs = inputs[0].shape[1] * n * (n + 1) // 2
    for way, flops in WAYS.items():
        steps = {}
        for name, call in calls.items():
            step = both_ways(call, inputs)[way]
            try:
                step()
                steps[name] = step
            except Exception as error:
                log.add(**about, kernel=name, way=way, **failed(error))
        seconds = in_turns(steps, rounds=rounds, device=inputs[0].device, warm_up=2)
        rate = {
            name: flops
            * width
            * (dense_pairs if name.startswith("dense") else pairs)
            / summary(taken)["seconds"]
            / 1e12
            for name, taken in seconds.items()
        }
        best = max((x for name, x in rate.items() if name.startswith("dense")), default=None)
        for name, taken in seconds.items():
            log.add(
                **about,
                kernel=name,
                way=way,
                **more(name),
                **summary(taken),
                tflops=rate[name],
                of_dense=rate[name] / best if best else None,
            )


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


def as_markdown(log: Log, title: str) -> str:
    """The timed records as a table."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a rehearsal on a CPU"
    lines = [f"# {title}", "", where, ""]
    lines += ["| pattern | N | D | way | kernel | ms | TFLOP/s | of dense |", "|" + "---|" * 8]
    for r in log.rows:
        if r["kind"] in ("speed", "long") and "tflops" in r:
            share = f"{r['of_dense']:.2f}" if r.get("of_dense") else ""
            cells = (
                r["pattern"].replace("|", "\\|"),
                r["n"],
                r["width"],
                r.get("way", "forward"),
                r["kernel"],
                f"{r['seconds'] * 1e3:.2f}",
                f"{r['tflops']:.0f}",
                share,
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
