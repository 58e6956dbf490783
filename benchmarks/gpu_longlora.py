"""LongLoRA's shifted groups on one GPU: our kernels against its own roll and reshape.

    PYTHONPATH=src python benchmarks/gpu_longlora.py --out FOLDER [--budget-s 90] [--kernel cudnn]

Groups of 2,048 and 8,192 at N 32768 and 131072, batch 1, 32 heads over 8 key heads, width 128,
bfloat16, forward and forward + backward. LongLoRA's way runs with cuDNN, FlashAttention-4 and
whatever PyTorch chooses inside the groups. Results are compared first, but for half a group at
either end, where the published form lets early rows see the end; what is wrong is not timed.
Records are lines of FOLDER/longlora.jsonl, FOLDER/longlora.md is for people. ``--device cpu --n
1024`` is a rehearsal.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

import gpu_race
import longspan as ls
from gpu_harness import HEADS, KERNELS, Log, Work, device_of_this_run, do, share_caches, tensors
from gpu_routes import fresh, through
from longspan.bench import dense, oracle
from longspan.bench.peers.longlora import longlora
from longspan.bench.setting import Call

WIDTH = 128
# Groups and rows, the ones that matter most first.
CASES = ((2048, 32768), (8192, 32768), (2048, 131072), (8192, 131072))


def insides() -> dict[str, Call]:
    """Dense causal attention inside a group, by name."""
    found = dense.on_gpu() if device_of_this_run() == "cuda" else {}
    return {**found, "SDPA": dense.sdpa}


def compare(size: int, n: int, kernels: Sequence[str], log: Log, *, rounds: int) -> None:
    """Check and time one size, ours with some kernels."""
    pattern = f"shifted_chunk({size})"
    plan = ls.plan(ls.parse(pattern), n, HEADS)
    inputs = tensors(n, WIDTH)
    about = {"kind": "speed", "pattern": pattern, "n": n, "width": WIDTH}
    makers: dict[str, Callable[[], Call]] = {
        f"longspan {kernel}": lambda kernel=kernel: through(kernel, fresh(plan))
        for kernel in kernels
    }
    for name, inside in insides().items():
        makers[f"LongLoRA, {name}"] = partial(longlora, size, inside)
    half = size // 2
    rows = partial(oracle.row_error, plan, inputs, rows=[half, n // 3, n - 1 - half])
    inner = slice(half, n - half)
    gpu_race.compare(makers, inputs, rows, plan.pairs, log, about, rounds=rounds, inner=inner)


def gains(log: Log) -> str:
    """How much less time ours takes than the fastest way of LongLoRA, as a table."""
    cases: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in log.rows:
        if row["kind"] == "speed" and "seconds" in row:
            case = (row["pattern"], row["n"], row["way"])
            cases.setdefault(case, {})[row["kernel"]] = row["seconds"]
    lines = ["", "| pattern | N | way | LongLoRA's time over ours |", "|---|---|---|---|"]
    for (pattern, n, way), seconds in cases.items():
        best = [
            min((x for name, x in seconds.items() if name.startswith(who)), default=float("nan"))
            for who in ("LongLoRA", "longspan")
        ]
        lines.append(f"| {pattern} | {n} | {way} | {best[0] / best[1]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=90)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--n", type=int, help="rows of a rehearsal, in groups of an eighth")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--kernel", nargs="+", help="of ours: all for CUDA, or in a rehearsal tiled, unless named"
    )
    options = parser.parse_args()
    os.environ["LONGSPAN_BENCH_DEVICE"] = options.device
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("needs a CUDA device; --device cpu --n 1024 is a rehearsal")
    share_caches()
    begin = time.monotonic()
    log = Log(options.out / "longlora.jsonl")
    log.machine()
    kernels = options.kernel or (KERNELS if options.device == "cuda" else ("tiled",))
    cases = ((options.n // 8, options.n),) if options.n else CASES
    work: list[Work] = [
        (f"{size} {n}", 5, partial(compare, size, n, kernels, log, rounds=options.rounds))
        for size, n in cases
    ]

    def tables() -> None:
        text = gpu_race.as_markdown(log, "LongLoRA's shifted groups on one GPU") + gains(log)
        (options.out / "longlora.md").write_text(text, encoding="utf-8")

    do(work, log, options.budget_s - (time.monotonic() - begin), tables)
    log.add(kind="done", seconds=time.monotonic() - begin)


if __name__ == "__main__":
    main()
