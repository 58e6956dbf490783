"""The tiled kernel against dense attention and FlexAttention on the CPU: speed, memory, exactness.

    python benchmarks/cpu_kernels.py [--rounds 9] [--lengths 4096,16384] [--write NAME]

Batch 1, 8 heads, width 64; causal window(512), scca.flow(512), shifted_chunk(1024). Before
anything is timed, outputs and all gradients are compared with the reference, and a wrong one
stops the run. Rivals take turns within each round, so that whatever else the machine does hits
all of them. What is compared is *useful pairs per second*: pairs that the pattern allows, over
the time of a call; dense attention is PyTorch's own causal one. Memory is the peak of a fresh
process for one forward and backward.

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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import longspan as ls
from longspan.ops.kernels.reference import reference
from longspan.ops.kernels.tiled import tiled
from longspan.ops.ranges import KeyRanges
from longspan.ops.run import load

HEADS, WIDTH = 8, 64
SCALE = WIDTH**-0.5
PATTERNS = ("window(512)", "scca.flow(512)", "shifted_chunk(1024)")
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


def check(pattern: str, dtype: str) -> dict[str, float]:
    """Relative errors of out, lse and the gradients through both, against float64."""
    n = 1500
    ranges = ranges_of(pattern, n)
    inputs = tensors(n, DTYPES[dtype], grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    theirs = reference(*exact, ranges, SCALE)
    ours = tiled(*inputs, ranges, SCALE)
    slopes = [torch.randn_like(x) for x in theirs]
    grads = [
        torch.autograd.grad(
            results, leaves, [s.to(x.dtype) for s, x in zip(slopes, results, strict=True)]
        )
        for results, leaves in ((ours, inputs), (theirs, exact))
    ]
    names = ("out", "lse", "dq", "dk", "dv")
    found = (*ours, *grads[0]), (*theirs, *grads[1])
    errors = {
        name: ((a.double() - b).norm() / b.norm()).item()
        for name, a, b in zip(names, *found, strict=True)
    }
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if wrong:
        sys.exit(f"{pattern} in {dtype} is wrong, nothing is timed: relative errors {wrong}")
    return errors


def flex(ranges: KeyRanges, n: int, tile: int = 128) -> Callable[..., Tensor]:
    """FlexAttention as it wants to be used: compiled, visiting only the tiles it must."""
    lo_HN, hi_HN = (x[ranges.group_BH[0], :, 0] for x in (ranges.lo_GNm, ranges.hi_GNm))
    if ranges.lo_GNm.shape[2] != 1:
        raise ValueError("expected one range for each query")
    lo_HQ, hi_HQ = lo_HN.unflatten(1, (-1, tile)), hi_HN.unflatten(1, (-1, tile))
    start_C = torch.arange(0, n, tile)
    any_HQC = ((lo_HQ[..., None] < start_C + tile) & (start_C < hi_HQ[..., None])).any(2)
    all_HQC = ((lo_HQ[..., None] <= start_C) & (start_C + tile <= hi_HQ[..., None])).all(2)
    lists: list[Tensor] = []
    for tiles_HQC in (any_HQC & ~all_HQC, all_HQC):
        lists.append(tiles_HQC.sum(-1, dtype=torch.int32)[None])
        lists.append(tiles_HQC.int().argsort(stable=True, dim=-1, descending=True).int()[None])

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (lo_HN[head, i] <= j) & (j < hi_HN[head, i])

    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=tile, mask_mod=visible, seq_lengths=(n, n))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, scale=SCALE)


def time_in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


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
        attend[pattern] = lambda ranges=ranges: tiled(q, k, v, ranges, SCALE)[0]
        pairs[pattern] = useful_pairs(ranges)
        if with_flex:
            rival = flex(ranges, n)
            attend[f"{pattern} flex"] = lambda rival=rival: rival(q, k, v)
            pairs[f"{pattern} flex"] = pairs[pattern]
            difference = (attend[f"{pattern} flex"]() - attend[pattern]()).abs().max().item()
            if difference > 0.05:
                sys.exit(f"FlexAttention disagrees on {pattern} by {difference}: nothing is timed")

    def with_gradients(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), (q, k, v), slope)

    calls = {name: with_gradients(call) if backward else call for name, call in attend.items()}
    seconds = time_in_turns(calls, rounds)
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


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(field))


def peak_memory(n: int) -> None:
    """In a process of its own: print MiB before forward and backward, and at their peak."""
    ranges = ranges_of(PATTERNS[0], n)
    q, k, v = tensors(n, torch.float32, grad=True)
    # Threads and libraries are loaded by a short call first.
    short = tensors(256, torch.float32)
    tiled(*short, ranges_of(PATTERNS[0], 256), SCALE)
    before = resident("VmRSS")
    # Linux forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    torch.autograd.grad(tiled(q, k, v, ranges, SCALE)[0].sum(), (q, k, v))
    print(json.dumps({"length": n, "before_mib": before, "peak_mib": resident("VmHWM")}))


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
        f"# CPU kernels: {report['machine']['processor']}, {report['machine']['threads']} threads",
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


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor()


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
        "errors": {f"{p} {d}": check(p, d) for p in PATTERNS for d in DTYPES},
        "rounds": options.rounds,
        "speed": [],
    }
    report["memory"] = measure_memory([int(x) for x in options.memory_lengths.split(",")])
    for n in (int(x) for x in options.lengths.split(",")):
        for dtype in DTYPES:
            for backward in (False, True):
                # FlexAttention has no backward on the CPU.
                with_flex = not (backward or options.no_flex)
                report["speed"] += compare(
                    n, dtype, options.rounds, backward=backward, with_flex=with_flex
                )
    report["machine"] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
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
