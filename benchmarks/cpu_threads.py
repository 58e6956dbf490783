"""How the compiled kernel gains from a second core, next to dense attention.

    python benchmarks/cpu_threads.py [--length 16384] [--rounds 5] [--write NAME]

Batch 1, 8 heads, width 64, float32, causal window(512), forward and forward + backward. *Gain* is
the time on one thread over that on two, least of the rounds; calls take turns, so that whatever
else the machine does hits all of them. Dense attention runs at an eighth of the length.

``--write NAME`` stores benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import longspan as ls
from cpu_kernels import RESULTS, SCALE, ranges_of, tensors
from longspan.bench.timing import in_turns
from longspan.eval.environment import environment
from longspan.ops.kernels.native import native

PATTERN = "window(512)"


def measure(n: int, rounds: int) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], object]] = {}

    def add(name: str, attend: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        slope = torch.ones_like(inputs[0])

        def forward(threads: int) -> None:
            torch.set_num_threads(threads)
            with torch.no_grad():
                attend(*inputs)

        def both(threads: int) -> None:
            torch.set_num_threads(threads)
            torch.autograd.grad(attend(*inputs), inputs, slope)

        for kind, call in (("forward", forward), ("forward+backward", both)):
            for threads in (1, 2):
                calls[f"{name}|{kind}|{threads}"] = lambda call=call, t=threads: call(t)

    ranges = ranges_of(PATTERN, n)
    add(
        PATTERN,
        lambda q, k, v: native(q, k, v, ranges, SCALE)[0],
        tensors(n, torch.float32, grad=True),
    )
    add(
        "dense",
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        tensors(n // 8, torch.float32, grad=True),
    )
    seconds = in_turns(calls, rounds=rounds)
    rows: list[dict[str, Any]] = []
    for name in (PATTERN, "dense"):
        for kind in ("forward", "forward+backward"):
            one, two = (seconds[f"{name}|{kind}|{threads}"] for threads in (1, 2))
            rows.append(
                {
                    "name": name,
                    "pass": kind,
                    "one_thread_s": min(one),
                    "two_threads_s": min(two),
                    "gain": min(one) / min(two),
                    "gain_by_median": statistics.median(one) / statistics.median(two),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", metavar="NAME")
    options = parser.parse_args()
    rows = measure(options.length, options.rounds)
    table = Table("what", "pass", "1 thread, ms", "2 threads, ms", "gain", "by median")
    for row in rows:
        times = (f"{row[key] * 1e3:.1f}" for key in ("one_thread_s", "two_threads_s"))
        gains = (f"{row[key]:.2f}" for key in ("gain", "gain_by_median"))
        table.add_row(row["name"], row["pass"], *times, *gains)
    Console(width=100).print(table)
    if options.write:
        about = {
            "length": options.length,
            "rounds": options.rounds,
            "processor": environment()["cpu"],
            "torch": torch.__version__,
            "longspan": ls.__version__,
        }
        target = RESULTS / f"{options.write}.json"
        target.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
