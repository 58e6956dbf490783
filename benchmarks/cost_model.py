"""Is the cost model right? Every way to lay a pattern out, timed, against the one it chose.

    python benchmarks/cost_model.py [--lengths 1024,4096,16384] [--rounds 3] [--clock wall]
                                    [--write NAME]

Ways: each order of the keys in a pass of its own (*apart*), orders side by side in one pass where
that is possible (*joined*, what the model means by leaving orders alone), one masked pass in the
keys' own order (*own*, where a query has few keys outside ranges), one pass in residue order.
Forward and backward on the native kernel, batch 1, 4 heads, width 64, float32. *Regret* is the
time of the chosen way over the best, less one.

``--write NAME`` stores benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import longspan as ls
from longspan.planning.choose import choose
from longspan.planning.layout import layouts

HEADS, WIDTH = 4, 64
# More ranges per query than this are not timed: masks are built range by range.
MOST_RANGES = 48
RESULTS = Path(__file__).parent / "results"
PATTERNS = {
    "dilated(8, 2)": (2,),
    "dilated(16, 8)": (8,),
    "dilated(32, 32)": (32,),
    "strided(64)": (64,),
    "strided(512)": (512,),
    "diagonals(128)": (128,),
    "window(128) | dilated(16, 4)": (4,),
    "window(64) | dilated(16, 16)": (16,),
    "window(512) | strided(2)": (2,),
    "window(512) | strided(32)": (32,),
    "window(1024) | strided(256)": (256,),
    "window(64) | strided(1024)": (1024,),
    "ssa(256, 128)": (128,),
    "window(256) | diagonals(256)": (256,),
    "window(128) | vertical_slash([0, 100, 200, 300], [0])": (),
    "vertical_slash([7, 70, 300, 500, 900], [0, 1, 2, 3, 64])": (),
    "longformer": (),
    "strided(4) | strided(8)": (8,),
}


def pattern_of(text: str, n: int) -> ls.Pattern:
    if text == "longformer":
        return ls.longformer(256, range(0, n, n // 8))
    return ls.parse(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--write", metavar="NAME")
    options = parser.parse_args()
    if options.clock == "cpu":
        torch.set_num_threads(1)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    rows: list[dict[str, Any]] = []
    table = Table("length", "pattern", "chosen", "regret", "seconds by way")
    for n in map(int, options.lengths.split(",")):
        for text, steps in PATTERNS.items():
            row = compare(pattern_of(text, n), n, steps, options.rounds, clock)
            rows.append({"pattern": text, **row})
            ways = ", ".join(f"{way} {s * 1e3:.1f} ms" for way, s in row["seconds"].items())
            table.add_row(str(n), text, row["chosen"], f"{row['regret']:.1%}", ways)
    console = Console(width=140)
    console.print(table)
    regrets = [row["regret"] for row in rows]
    spent = sum(row["seconds"][row["chosen"]] for row in rows)
    best = sum(min(row["seconds"].values()) for row in rows)
    console.print(
        f"regret: mean {statistics.mean(regrets):.1%}, worst {max(regrets):.1%}, "
        f"of the whole time {spent / best - 1:.1%}"
    )
    if options.write:
        about = {"clock": options.clock, "threads": torch.get_num_threads(), "heads": HEADS}
        target = RESULTS / f"{options.write}.json"
        whole = {
            "mean": statistics.mean(regrets),
            "worst": max(regrets),
            "of_the_whole_time": spent / best - 1,
        }
        report = {"about": about, "regret": whole, "rows": rows}
        target.write_text(json.dumps(report, indent=2) + "\n")


def compare(
    pattern: ls.Pattern, n: int, steps: tuple[int, ...], rounds: int, clock: Any
) -> dict[str, Any]:
    together = choose(pattern, layouts(n, n)[0], HEADS)
    plans = {"apart": ls.plan(pattern, n, HEADS, orders="apart")}
    for step in (step for step in steps if step <= MOST_RANGES):
        plans[f"mod {step}"] = ls.plan(pattern, n, HEADS, orders=step)
    # Its ranges are counted on a stretch first: in their own order they may be very many.
    probe = ls.plan(pattern, 16, HEADS, keys=n, positions=range(n - 16, n), orders=1)
    if all(one.lo.shape[3] <= MOST_RANGES for one in probe.passes):
        plans["own"] = ls.plan(pattern, n, HEADS, orders=1)
    if len(plans["apart"].passes) == 1:
        # A single lattice: its remainders are what "apart" lays out.
        plans = {name: plan for name, plan in plans.items() if not name.startswith("mod")}
    joined = ls.plan(pattern, n, HEADS, orders="joined")
    alone = "apart"
    if len(joined.passes) < len(plans["apart"].passes):
        plans["joined"], alone = joined, "joined"
    chosen = alone if together is None else "own" if together == 1 else f"mod {together}"
    seconds = timed(plans, rounds, clock)
    return {
        "n": n,
        "chosen": chosen,
        "seconds": seconds,
        "regret": seconds[chosen] / min(seconds.values()) - 1,
    }


def timed(plans: dict[str, ls.Plan], rounds: int, clock: Any) -> dict[str, float]:
    """Least seconds of forward and backward for each plan, taking turns."""
    generator = torch.Generator().manual_seed(0)
    n = next(iter(plans.values())).n
    q, k, v, d_out = (torch.randn(1, HEADS, n, WIDTH, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(rounds + 1):
        for name, plan in plans.items():
            start = clock()
            torch.autograd.grad(ls.attend(*inputs, plan, impl="native"), inputs, d_out)
            if turn:
                found[name].append(clock() - start)
    return {name: min(seconds) for name, seconds in found.items()}


if __name__ == "__main__":
    main()
