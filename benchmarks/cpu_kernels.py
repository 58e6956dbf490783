"""Our CPU kernels against dense attention and FlexAttention: speed, memory, exactness.

    python benchmarks/cpu_kernels.py [--rounds 9] [--lengths 4096,16384] [--write NAME]

Batch 1, 8 heads, width 64; causal windows of 512 and 256, scca.flow(512) and
shifted_chunk(1024), on the compiled kernel ``native`` and on ``tiled``, which is plain PyTorch.
Before anything is timed, outputs and all gradients are compared with the reference, and a wrong
one stops the run. Rivals take turns within each round, so that whatever else the machine does hits
all of them. What is compared is *useful pairs per second*: pairs that the pattern allows, over the
time of a call; dense attention is PyTorch's own causal one. Memory is the peak of a fresh process
for one forward and backward.

``--write NAME`` stores benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import longspan as ls
from longspan.bench import oracle
from longspan.bench.memory import peak
from longspan.bench.peers.flex import flex_over
from longspan.bench.timing import in_turns
from longspan.eval.environment import environment
from longspan.ops.kernels.native import instructions, native
from longspan.ops.kernels.reference import reference
from longspan.ops.kernels.tiled import tiled
from longspan.ops.loading import load
from longspan.ops.ranges import KeyRanges

HEADS, WIDTH = 8, 64
SCALE = WIDTH**-0.5
PATTERNS = ("window(512)", "window(256)", "scca.flow(512)", "shifted_chunk(1024)")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative to the norm of the exact result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
RESULTS = Path(__file__).parent / "results"


def tensors(n: int, dtype: torch.dtype, *, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, HEADS, n, WIDTH, generator=generator) for _ in range(3)]
    return [x.to(dtype).requires_grad_(grad) for x in made]


def ranges_of(pattern: str, n: int) -> KeyRanges:
    (one,) = ls.plan(ls.parse(pattern), n, HEADS).passes
    q, k, _ = tensors(n, torch.float32)
    return load(one, q, k).ranges


def useful_pairs(ranges: KeyRanges) -> int:
    pairs_G = (ranges.hi_GNm.long() - ranges.lo_GNm).sum((1, 2))
    return int(pairs_G[ranges.group_BH].sum())


def check(pattern: str, dtype: str, kernel: Any) -> dict[str, float]:
    """Relative errors of out, lse and the gradients through both, against float64."""
    n = 1500
    ranges = ranges_of(pattern, n)
    errors = oracle.errors(
        lambda *x: kernel(*x, ranges, SCALE),
        lambda *x: reference(*x, ranges, SCALE),
        tensors(n, DTYPES[dtype]),
    )
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if wrong:
        name = f"{kernel.__name__}: {pattern} in {dtype}"
        sys.exit(f"{name} is wrong, nothing is timed: relative errors {wrong}")
    return errors


def compare(
    n: int, dtype: str, rounds: int, *, backward: bool, with_flex: bool
) -> list[dict[str, Any]]:
    q, k, v = tensors(n, DTYPES[dtype], grad=backward)
    slope = torch.ones_like(q)
    made = {pattern: ranges_of(pattern, n) for pattern in PATTERNS}
    pairs = {"dense": HEADS * n * (n + 1) // 2}
    attend: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    }
    for pattern, ranges in made.items():
        for name, kernel in ((pattern, native), (f"{pattern} tiled", tiled)):
            attend[name] = lambda kernel=kernel, ranges=ranges: kernel(q, k, v, ranges, SCALE)[0]
            pairs[name] = useful_pairs(ranges)
        if with_flex:
            rival = flex_over(ranges, n, SCALE)
            attend[f"{pattern} flex"] = lambda rival=rival: rival(q, k, v)
            pairs[f"{pattern} flex"] = pairs[pattern]
            difference = (attend[f"{pattern} flex"]() - attend[pattern]()).abs().max().item()
            if difference > 0.05:
                sys.exit(f"FlexAttention disagrees on {pattern} by {difference}: nothing is timed")

    def with_gradients(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), (q, k, v), slope)

    calls = {name: with_gradients(call) if backward else call for name, call in attend.items()}
    seconds = in_turns(calls, rounds=rounds)
    dense = seconds["dense"]
    return [
        {
            "length": n,
            "dtype": dtype,
            "pass": "forward+backward" if backward else "forward",
            "name": name,
            "seconds_least": min(found),
            "seconds_median": statistics.median(found),
            "pairs_per_second": pairs[name] / min(found),
            "of_dense_least": pairs[name] / min(found) * min(dense) / pairs["dense"],
            "of_dense_median": pairs[name]
            / statistics.median(found)
            * statistics.median(dense)
            / pairs["dense"],
        }
        for name, found in seconds.items()
    ]


def peak_memory(n: int) -> None:
    """In a process of its own: print MiB before forward and backward, and at their peak."""
    ranges = ranges_of(PATTERNS[0], n)
    q, k, v = tensors(n, torch.float32, grad=True)
    # Threads and libraries are loaded by a short call first.
    short = tensors(256, torch.float32)
    native(*short, ranges_of(PATTERNS[0], 256), SCALE)
    before, most = peak(
        lambda: torch.autograd.grad(native(q, k, v, ranges, SCALE)[0].sum(), (q, k, v))
    )
    print(json.dumps({"length": n, "before_mib": before / 2**20, "peak_mib": most / 2**20}))


def measure_memory(lengths: list[int]) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for n in lengths:
        command = [sys.executable, __file__, "--peak-memory", str(n)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        row["bytes_per_row"] = (row["peak_mib"] - row["before_mib"]) * 2**20 / n
        found.append(row)
    return found


def tables(report: dict[str, Any]) -> list[Table]:
    speed = Table(title="Useful pairs per second, as a share of dense causal attention")
    for column in ("length", "dtype", "pass", "what", "ms", "pairs/s", "of dense", "by median"):
        speed.add_column(column, justify="left" if column in ("pass", "what") else "right")
    for row in report["speed"]:
        speed.add_row(
            str(row["length"]),
            row["dtype"],
            row["pass"],
            row["name"],
            f"{row['seconds_least'] * 1e3:.1f}",
            f"{row['pairs_per_second']:.2e}",
            f"{row['of_dense_least']:.2f}",
            f"{row['of_dense_median']:.2f}",
        )
    memory = Table(title="Peak memory of window(512), forward and backward, float32")
    for column in ("length", "before, MiB", "peak, MiB", "bytes per row"):
        memory.add_column(column, justify="right")
    for row in report["memory"]:
        cells = (row["before_mib"], row["peak_mib"], row["bytes_per_row"])
        memory.add_row(str(row["length"]), *(f"{x:.0f}" for x in cells))
    return [speed, memory]


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# CPU kernels: {processor}, {threads} threads, {instructions}".format(
            **report["machine"]
        ),
        "",
        f"`python benchmarks/cpu_kernels.py`, torch {report['machine']['torch']}. Least of "
        f"{report['rounds']} rounds taken in turns; load of the machine while it ran: "
        f"{report['machine']['load_before']:.1f} to {report['machine']['load_after']:.1f}.",
    ]
    for table in tables(report):
        heads = [str(column.header) for column in table.columns]
        rows = zip(*(list(column.cells) for column in table.columns), strict=True)
        lines += ["", f"## {table.title}", "", "| " + " | ".join(heads) + " |"]
        lines.append("|" + "---|" * len(heads))
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", default="4096,16384")
    parser.add_argument("--memory-lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--no-flex", action="store_true", help="it needs a C++ compiler")
    parser.add_argument("--write", metavar="NAME", help="store results under this name")
    parser.add_argument("--peak-memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory:
        peak_memory(options.peak_memory)
        return
    load_before = os.getloadavg()[0]
    report: dict[str, Any] = {
        "errors": {
            f"{p} {d} {kernel.__name__}": check(p, d, kernel)
            for p in PATTERNS
            for d in DTYPES
            for kernel in (native, tiled)
        },
        "rounds": options.rounds,
        "speed": [],
    }
    report["memory"] = measure_memory([int(x) for x in options.memory_lengths.split(",") if x])
    for n in (int(x) for x in options.lengths.split(",")):
        for dtype in DTYPES:
            for backward in (False, True):
                # FlexAttention has no backward on the CPU.
                with_flex = not (backward or options.no_flex)
                report["speed"] += compare(
                    n, dtype, options.rounds, backward=backward, with_flex=with_flex
                )
    report["machine"] = {
        "processor": environment()["cpu"],
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": instructions(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "longspan": ls.__version__,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
    }
    console = Console(width=110)
    for table in tables(report):
        console.print(table)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.write}.json").write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / f"{options.write}.md").write_text(as_markdown(report))


if __name__ == "__main__":
    main()
