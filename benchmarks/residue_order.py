"""Strided and dilated patterns in residue order against a plain window of as many keys.

    python benchmarks/residue_order.py [--length 16384] [--rounds 5] [--clock wall] [--write NAME]
    python benchmarks/residue_order.py --device cuda [--length 32768] [--out FOLDER] [--write NAME]
    python benchmarks/residue_order.py --only ssa longnet

On the CPU batch 1, 4 heads, width 64, float32, the native kernel; on a GPU 32 heads on 8 key
heads, width 128, bfloat16, the flex kernel. Gathering keys and queries and putting results back
is included. *Ratio* is the time per useful pair over that of the causal window with
the same mean number of keys. *Masked* is what a kernel pays that keeps the keys where they are and
masks: how many times the tiles it visits, and the time per useful pair of visiting them without
any mask, over the same window. Rivals take turns in each round; the median counts. With
``--clock cpu`` it is the processor time of one thread, for machines that are shared.

``--write NAME`` stores benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import longspan as ls


@dataclass(frozen=True)
class Setting:
    """What is computed, and by what."""

    heads: int
    key_heads: int
    width: int
    dtype: torch.dtype
    impl: str
    length: int
    # In one measurement: on a GPU the next call is prepared while one is computed.
    calls: int


SETTINGS = {
    "cpu": Setting(4, 4, 64, torch.float32, "native", 16384, 1),
    "cuda": Setting(32, 8, 128, torch.bfloat16, "flex", 32768, 5),
}
RESULTS = Path(__file__).parent / "results"
# Pattern, and the plain pattern whose tiles a masking kernel would visit.
CASES = {
    "dilated(512, 8)": "window(4089)",
    "sda.neighborhood(512, 8)": "window(4096)",
    "neighborhood(513, dilation=8)": "window(4097, causal=false)",
    "sda(4096, 8)": "chunk(4096)",
    "strided(16)": "causal()",
    "diagonals(32)": "causal()",
    "ssa(512, 32)": "causal()",
    "longnet([2048, 4096, 8192, 16384], [1, 2, 4, 8])": "causal()",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--length", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="patterns that begin like one of these",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write", metavar="NAME")
    options = parser.parse_args()
    if options.clock == "cpu":
        torch.set_num_threads(1)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    setting = SETTINGS[options.device]
    length = options.length or setting.length
    cases = {text: hull for text, hull in CASES.items() if text.startswith(tuple(options.only))}
    if not cases:
        parser.error(f"--only: no pattern begins so; there are {', '.join(CASES)}")
    rows = [compare(text, hull, length, setting, options, clock) for text, hull in cases.items()]
    table = Table(
        "pattern",
        "keys",
        "passes",
        "forward",
        "ratio",
        "fwd+bwd",
        "ratio",
        "masked tiles",
        "masked fwd",
        "masked fwd+bwd",
    )
    for row in rows:
        table.add_row(
            row["pattern"],
            f"{row['keys_per_query']:.0f}",
            str(row["passes"]),
            f"{row['forward_s'] * 1e3:.1f} ms",
            f"{row['forward_ratio']:.2f}",
            f"{row['both_s'] * 1e3:.1f} ms",
            f"{row['both_ratio']:.2f}",
            f"x{row['masked_tiles']:.1f}",
            f"{row['masked_forward_ratio']:.2f}",
            f"{row['masked_both_ratio']:.2f}",
        )
    Console(width=160).print(table)
    if options.write:
        about = {
            "length": length,
            "heads": setting.heads,
            "key_heads": setting.key_heads,
            "width": setting.width,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "kernel": setting.impl,
            "clock": options.clock,
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "processor": torch.cuda.get_device_name()
            if options.device == "cuda"
            else platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "longspan": ls.__version__,
        }
        target = options.out / f"{options.write}.json"
        target.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


def compare(
    text: str,
    hull: str,
    n: int,
    setting: Setting,
    options: argparse.Namespace,
    clock: Callable[[], float],
) -> dict[str, Any]:
    heads = setting.heads
    ours = ls.plan(ls.parse(text), n, heads)
    keys = ours.pairs / (heads * n)
    window = ls.plan(ls.Window(max(1, round(keys))), n, heads)
    masked = ls.plan(ls.parse(hull), n, heads)
    seconds = timed([ours, window, masked], setting, options, clock)
    forward, both = ([each[kind] for each in seconds] for kind in (0, 1))
    per_pair = window.pairs / ours.pairs
    return {
        "pattern": text,
        "keys_per_query": keys,
        "passes": len(ours.passes),
        "window": str(window.pattern),
        "forward_s": forward[0],
        "both_s": both[0],
        "forward_ratio": forward[0] / forward[1] * per_pair,
        "both_ratio": both[0] / both[1] * per_pair,
        "masked_tiles": masked.tiles(64) / ours.tiles(64),
        "masked_forward_ratio": forward[2] / forward[1] * per_pair,
        "masked_both_ratio": both[2] / both[1] * per_pair,
    }


def timed(
    plans: list[ls.Plan],
    setting: Setting,
    options: argparse.Namespace,
    clock: Callable[[], float],
) -> list[tuple[float, float]]:
    """Median seconds of forward, and of forward and backward, of each plan."""
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, d_out = (
        torch.randn(
            (1, heads, plans[0].n, setting.width),
            generator=generator,
            device=device,
            dtype=setting.dtype,
        )
        for heads in (setting.heads, setting.key_heads, setting.key_heads, setting.heads)
    )
    inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())

    def forward(plan: ls.Plan) -> None:
        with torch.no_grad():
            ls.attend(*inputs, plan, impl=setting.impl)

    def both(plan: ls.Plan) -> None:
        torch.autograd.grad(ls.attend(*inputs, plan, impl=setting.impl), inputs, d_out)

    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    found: list[dict[str, list[float]]] = [{"forward": [], "both": []} for _ in plans]
    for turn in range(options.rounds + 1):
        for plan, kept in zip(plans, found, strict=True):
            for name, call in (("forward", forward), ("both", both)):
                start = finish()
                for _ in range(setting.calls):
                    call(plan)
                seconds = (finish() - start) / setting.calls
                # The first round builds schedules and warms up.
                if turn:
                    kept[name].append(seconds)
    return [
        (statistics.median(kept["forward"]), statistics.median(kept["both"])) for kept in found
    ]


if __name__ == "__main__":
    main()
