"""The CUDA routes (cudnn, flash, hopper, flex_flash, flex) on one GPU: right first, then how fast.

    PYTHONPATH=src python benchmarks/gpu_routes.py --out FOLDER [--seconds 450] [--only length]

1. Every kernel at widths 64, 96 and 128 against float32: out, log-sum-exp and all gradients, for
   odd lengths, batches, grouped queries, packed documents, several passes. In processes side by
   side, which also fill the caches of compiled kernels.
2. N 32768, bfloat16, batch 1, 32 heads over 8 key heads: forward, and forward + backward, of each
   kernel that was right, in turns with dense causal attention. Results at full length are compared
   with each other, and some rows with float32.
3. More patterns at N 32768, also beside FlexAttention with a mask by hand where one is written;
   then at N 131072 beside FlashAttention-4 alone, and at width 64.
4. Length: forward of ``hopper`` and ``cudnn`` at N 131072 and 1,048,576 with peak memory, some
   rows against float32; alone with ``--only length`` (``--seconds 170``).

A kernel that is wrong is not timed, nor one that refuses a pattern. Every finished record is a
line of FOLDER/routes.jsonl; what fails is a line too, with its error. FOLDER/measured.json is the
table that ``auto`` goes by: copy it to src/longspan/ops/measured.json. FOLDER/routes.md is for
people. Records of an ``--earlier`` run stand in front, and those of its cases and kernels that
this one did not try again stay in the tables; at the end those that it made anew are left out.
Kernels of different runs are held against each other by their shares of the dense rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gpu_race
import longspan as ls
from gpu_harness import (
    HEADS,
    KERNELS,
    KEY_HEADS,
    LIBRARIES,
    RESULTS,
    Log,
    Work,
    do,
    failed,
    free,
    share_caches,
    side_by_side,
    tensors,
    unshare,
)
from longspan.bench import oracle
from longspan.bench.peers.flex import flex
from longspan.bench.setting import Call, Setting, both_ways
from longspan.bench.timing import in_turns, summary
from longspan.errors import Refusal
from longspan.ops.kernels import _cudnn_plan, _hopper_back_plan, _hopper_plan
from longspan.ops.run import calls_apart

WIDTHS = (128, 64, 96)
CORE = (
    "causal()",
    "window(4096)",
    "window(1024)",
    "window(1024) | sink(128)",
    "shifted_chunk(8192)",
    "scca.flow(2048)",
)
MORE = (
    "window(2048)",
    "chunk(2048, causal=false)",
    "shifted_chunk(2048)",
    "scca.flow(1024)",
    "scca.fixed(2048)",
    "chunk(2048)",
    "strided(8)",
    "dilated(2048, 8)",
    "ssa(1024, 8)",
    "sda(16384, 8)",
    "sda.neighborhood(2048, 8)",
    "longnet([2048, 8192, 32768], [1, 4, 16])",
    "neighborhood(2048)",
    "random_blocks(128, 16)",
    "dilated(2048, [1, 2, 4, 8])",
    "longmixed(2048, 8)",
    "longformer(2048, tokens=[0, 100, 20000])",
    "window(1024) | global(0, 5000, 20000, causal=true)",
    "bigbird(128, 3)",
    'sparse_transformer(128, kind="fixed")',
)
# Kernels that are timed on all patterns, not on the first ones alone.
RIVALS = ("cudnn", "flash", "hopper")
LONG = ("window(1024)", "window(4096)", "shifted_chunk(8192)", "scca.flow(2048)")
BY_HAND = "FlexAttention by hand"
LONGNET = "longnet([2048, 32768, 524288], [1, 16, 256])"
SHORT_N, LONG_N = 1 << 17, 1 << 20
LENGTH_BY = ("hopper", "cudnn")
# What grows eightfold: the same pattern, or SSA with as many strided keys for a query.
GROWTH = (
    ("scca.flow(1024)", "scca.flow(1024)"),
    ("ssa(1024, 64)", "ssa(1024, 512)"),
    (LONGNET, LONGNET),
)


def fresh(plan: ls.Plan) -> ls.Plan:
    """The same plan as one that no kernel has seen: what is derived from it is made anew."""
    for plans in (_cudnn_plan.PLANS, _hopper_plan.PLANS, _hopper_back_plan.PLANS):
        plans.latest.clear()
    return replace(plan, passes=tuple(replace(part) for part in plan.passes))


def through(kernel: str, plan: ls.Plan) -> Call:
    return lambda q, k, v: ls.attend(q, k, v, plan, impl=kernel)


# Step 1, each kernel and width in a process of its own.


def check_cases() -> dict[str, tuple[str, int, np.ndarray | None]]:
    n = 2048
    documents = np.stack(
        [np.repeat([0, 1, 2], [700, 900, n - 1600]), np.repeat([-1, 0, 1], [130, 900, n - 1030])]
    )
    return {
        "window": ("window(400)", n, None),
        "per head": ("scca.flow(256)", n, None),
        "shifted": ("shifted_chunk(512)", n, None),
        "two ranges": ("window(200) | sink(64)", n, None),
        "odd length": ("scca.flow(250)", 1999, None),
        "packed": ("window(400)", n, np.maximum(documents, 0)),
        "packed, padded": ("window(400)", n, documents),
        "two passes": ("ssa(256, 8)", n, None),
    }


def check(kernel: str, width: int, log: Log, *, only_one: bool = False) -> None:
    lse_gradient = kernel != "flex_flash"
    for name, (text, n, segments) in list(check_cases().items())[: 1 if only_one else None]:
        about = {"kind": "check", "kernel": kernel, "width": width, "case": name, "pattern": text}
        start = time.perf_counter()
        try:
            plan = ls.plan(ls.parse(text), n, 8, segments=segments)
            inputs = tensors(n, width, heads=8, key_heads=2, batch=2)

            def ours(q: Tensor, k: Tensor, v: Tensor, plan=plan) -> tuple[Tensor, Tensor]:
                if lse_gradient:
                    return ls.attend(q, k, v, plan, impl=kernel, return_lse=True)
                with torch.no_grad():
                    _, lse = ls.attend(q, k, v, plan, impl=kernel, return_lse=True)
                return ls.attend(q, k, v, plan, impl=kernel), lse

            theirs = oracle.reference(plan, width**-0.5)
            found = oracle.errors(ours, theirs, inputs, use_lse=lse_gradient)
            wrong = oracle.wrong(found, torch.bfloat16)
            log.add(**about, errors=found, wrong=wrong, seconds=time.perf_counter() - start)
        except Refusal as refusal:
            log.add(**about, refused=str(refusal))
        except Exception as error:
            if name == "window" and not only_one and unshare(kernel):
                # It may be the cache on disk: once more without it.
                log.add(**{**about, "kind": "cache"}, **failed(error))
                os.environ["LONGSPAN_BENCH_UNSHARED"] = "1"
                os.execv(sys.executable, [sys.executable, *sys.argv])
            log.add(**about, **failed(error), seconds=time.perf_counter() - start)
    if width != 96 and not only_one:
        warm(kernel, width, log)


def warm(kernel: str, width: int, log: Log) -> None:
    """Compile what will be timed."""
    for text in CORE:
        start = time.perf_counter()
        about = {"kind": "warm", "kernel": kernel, "width": width, "pattern": text}
        try:
            plan = ls.plan(ls.parse(text), 32768, HEADS)
            inputs = tensors(32768, width)
            for call in both_ways(through(kernel, plan), inputs).values():
                call()
            torch.cuda.synchronize()
            log.add(**about, seconds=time.perf_counter() - start)
        except Exception as error:
            log.add(**about, **failed(error))


def checks(log: Log, seconds: float, kernels: Sequence[str]) -> None:
    """Run all checks side by side, and see whether their caches can be read."""
    libraries = [kernel for kernel in LIBRARIES if kernel in kernels]
    side_by_side(
        __file__, [f"{kernel}-{width}" for width in WIDTHS for kernel in kernels], log, seconds
    )
    for kernel in libraries:
        if any(row["kind"] == "cache" and row["kernel"] == kernel for row in log.rows):
            unshare(kernel)
    before = len(log.rows)
    probes = [f"{kernel}-128-again" for kernel in libraries]
    side_by_side(__file__, probes, log, 60)
    for kernel in libraries:
        again = [r for r in log.rows[before:] if r.get("kernel") == kernel and "errors" in r]
        if not again and unshare(kernel):
            log.add(kind="cache", kernel=kernel, why="could not be read: compiled anew")


def verdicts(log: Log) -> dict[tuple[str, int], str]:
    """Why a kernel is not timed at a width; empty where it is right."""
    found = {}
    for kernel in KERNELS:
        for width in WIDTHS:
            rows = [
                r
                for r in log.rows
                if (r["kind"], r.get("kernel"), r.get("width")) == ("check", kernel, width)
            ]
            right = [r for r in rows if "errors" in r and not r["wrong"]]
            bad = [r["case"] for r in rows if r.get("wrong")]
            if bad:
                found[kernel, width] = f"wrong: {', '.join(bad)}"
            elif not right:
                found[kernel, width] = "no check passed"
            else:
                found[kernel, width] = ""
    return found


# Step 2.


def compare(
    text: str,
    n: int,
    width: int,
    rivals: tuple[str, ...],
    log: Log,
    *,
    rounds: int,
    by_hand: bool = False,
    against: tuple[str, ...] | None = None,
) -> None:
    """Check and time some kernels and dense attention on one pattern.

    Args:
        text: the pattern.
        n: rows.
        width: of a head.
        rivals: kernels of ours.
        log: where the records go.
        rounds: rounds that count.
        by_hand: also FlexAttention with a mask written by hand, where there is one.
        against: dense attention of these libraries; None is all.
    """
    about = {"kind": "speed", "pattern": text, "n": n, "width": width}
    start = time.perf_counter()
    plan = ls.plan(ls.parse(text), n, HEADS)
    planned = time.perf_counter() - start
    inputs = tensors(n, width)
    rows = partial(oracle.row_error, plan, inputs, rows=[0, n // 3, n - 1])
    makers = {kernel: lambda kernel=kernel: through(kernel, fresh(plan)) for kernel in rivals}
    if by_hand:
        setting = Setting(
            n=n, heads=HEADS, key_heads=KEY_HEADS, width=width, dtype="bfloat16", device="cuda"
        )
        makers[BY_HAND] = lambda: flex(ls.parse(text), setting)
    more = {
        "passes": len(plan.passes),
        "joined": len(plan.passes) > 1 and calls_apart(plan.passes, *inputs[:2]) is None,
        "keys": plan.pairs / (HEADS * n),
        "apart": len({one for p in plan.passes for one in p.head_class}) > 1,
        "several": any(p.lo.shape[-1] > 1 for p in plan.passes),
        "plan_seconds": planned,
    }
    gpu_race.compare(
        makers, inputs, rows, plan.pairs, log, about, rounds=rounds, more=more, against=against
    )
    if by_hand:
        # Each mask is a graph of its own, and after eight of one function no more are compiled.
        torch.compiler.reset()


# Step 3.


def lengths(short: str, far: str, kernel: str, log: Log) -> None:
    """Both lengths of a pattern, or none: they are held against each other."""
    found = [long(text, kernel, n=n) for text, n in ((short, SHORT_N), (far, LONG_N))]
    for row in [row for row in found if "tflops" not in row] or found:
        log.add(**row)


def long(text: str, kernel: str, *, n: int, width: int = 128) -> dict[str, Any]:
    """Forward of one layer: time, and peak memory as a share of q, k, v and out."""
    about = {"kind": "long", "pattern": text, "n": n, "kernel": kernel, "width": width}
    try:
        start = time.perf_counter()
        plan = ls.plan(ls.parse(text), n, HEADS)
        planned = time.perf_counter() - start
        inputs = tensors(n, width)
        own = sum(x.nbytes for x in inputs) + inputs[0].nbytes
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call = both_ways(through(kernel, plan), inputs)["forward"]
        start = time.perf_counter()
        out = call()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        peak_first = torch.cuda.max_memory_allocated()
        rows = oracle.row_error(plan, inputs, out, [0, n // 2 + 1, n - 1])
        del out
        torch.cuda.reset_peak_memory_stats()
        seconds = in_turns({"": call}, rounds=3, device="cuda", warm_up=1)[""]
        found = {
            **about,
            "rows": rows,
            "right": rows <= 1e-2,
            **summary(seconds),
            "tflops": 4 * width * plan.pairs / summary(seconds)["seconds"] / 1e12,
            "peak_of_qkvo": torch.cuda.max_memory_allocated() / own,
            "peak_of_qkvo_with_plan": peak_first / own,
            "held_of_qkvo": (torch.cuda.memory_allocated() - sum(x.nbytes for x in inputs)) / own,
            "passes": len(plan.passes),
            "pairs": plan.pairs,
            "plan_seconds": planned,
            "first_seconds": first,
        }
    except Exception as error:
        found = {**about, **failed(error)}
    free()
    return found


def growth(log: Log) -> str:
    """Time and memory against length, as a table."""
    rows = {(r["kernel"], r["pattern"], r["n"]): r for r in log.timed() if r["kind"] == "long"}
    lines = [
        "",
        "## Length",
        "",
        "Forward of one layer, 32 heads over 8 key heads, width 128. *Linear*: time over eight "
        "times that at 131,072 rows; *pair*: time of each query-key pair over that there. *Peak*: "
        "memory over that of q, k, v and out; *held*: what of it stays between calls (ranges, "
        "plan, tables).",
        "",
        "| pattern | kernel | N | ms | TFLOP/s | linear | pair | peak | held | plan, s |",
        "|" + "---|" * 10,
    ]
    for (short, far), kernel in itertools.product(GROWTH, LENGTH_BY):
        first = rows.get((kernel, short, SHORT_N))
        for text, n in ((short, SHORT_N), (far, LONG_N)):
            row = rows.get((kernel, text, n))
            if row is None:
                continue
            linear = pair = ""
            if n > SHORT_N and first is not None and "pairs" in first and "pairs" in row:
                ratio = row["seconds"] / first["seconds"]
                linear = f"{ratio * SHORT_N / n:.2f}"
                pair = f"{ratio * first['pairs'] / row['pairs']:.2f}"
            held = f"{row['held_of_qkvo']:.2f}" if "held_of_qkvo" in row else ""
            cells = (
                text,
                kernel,
                f"{n:,}",
                f"{row['seconds'] * 1e3:.2f}",
                f"{row['tflops']:.0f}",
                linear,
                pair,
                f"{row['peak_of_qkvo']:.2f}",
                held,
                f"{row['plan_seconds']:.1f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measured(log: Log, command: str) -> dict[str, Any]:
    """The table of rates that ``auto`` goes by.

    Each kernel at its share of the dense rate of its own run, times that of the newest record.
    """
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    timed = [row for row in log.timed() if row["kind"] == "speed" and row.get("of_dense")]
    dense = {_case_of(row): row["tflops"] / row["of_dense"] for row in timed}
    for row in timed:
        if row["kernel"] not in KERNELS:
            continue
        # Passes are chosen for one by one, unless they have one backward.
        several, joined = row["passes"] > 1, row.get("joined", False)
        if row["n"] != 32768 or (several and (row["way"] == "forward" or not joined)):
            continue
        name = (row["pattern"], row["width"], row["way"])
        case = cases.setdefault(name, {"tflops": {}})
        # Early records do not say it.
        if "several" in row:
            case |= {
                "pattern": row["pattern"],
                "width": row["width"],
                "keys": round(row["keys"]),
                "apart": row["apart"],
                "several": row["several"],
                **({"passes": row["passes"]} if several else {}),
                "backward": row["way"] != "forward",
            }
        case["tflops"][row["kernel"]] = round(row["of_dense"] * dense[_case_of(row)], 1)
    told = [case for case in cases.values() if "pattern" in case]
    return gpu_race.rates_table(told, command, without=_failed(log))


def _case_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["pattern"], row["n"], row["width"], row["way"]


def _failed(log: Log) -> dict[tuple[Any, ...], set[str]]:
    """Kernels that were tried on a case of the table, and have no time now."""
    found: dict[tuple[Any, ...], set[str]] = {}
    timed = {(row["kernel"], _case_of(row)) for row in log.timed() if row["kind"] == "speed"}
    for row in (*log.earlier, *log.rows):
        if row["kind"] != "speed" or row["n"] != 32768:
            continue
        for way in (row["way"],) if "way" in row else gpu_race.WAYS:
            if (row["kernel"], _case_of({**row, "way": way})) not in timed:
                name = row["pattern"], row["width"], way != "forward"
                found.setdefault(name, set()).add(row["kernel"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--only", choices=("length",), help="this part alone, without its checks")
    parser.add_argument(
        "--earlier",
        type=Path,
        default=RESULTS / "routes-h200.jsonl",
        help="records whose other cases and kernels stay in the tables",
    )
    parser.add_argument("--match", nargs="+", help="only cases whose name holds one of these")
    parser.add_argument(
        "--by-hand", action="store_true", help="also FlexAttention with a mask, compiled for each"
    )
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    share_caches()
    if options.check:
        kernel, width, *again = options.check.split("-")
        log = Log(options.out / f"{options.check}.jsonl")
        check(kernel, int(width), log, only_one=bool(again))
        return
    begin = time.monotonic()

    def left() -> float:
        return options.seconds - (time.monotonic() - begin)

    log = Log(options.out / "routes.jsonl", options.earlier)
    log.machine()
    found: dict[tuple[str, int], str] = {}
    if options.only is None:
        checks(log, 0.45 * options.seconds, options.kernels)
        found = verdicts(log)
        log.add(kind="verdicts", **{f"{k} {w}": v or "right" for (k, w), v in found.items()})

    def right(width: int, among: tuple[str, ...] = KERNELS) -> tuple[str, ...]:
        return tuple(k for k in among if k in options.kernels and not found[k, width])

    length: list[Work] = [
        (f"length {short}", 30, partial(lengths, short, far, kernel, log))
        for kernel in LENGTH_BY
        if kernel in options.kernels
        for short, far in GROWTH
    ]
    work: list[Work] = [
        *(
            (f"core {t} 128", 8, lambda t=t: compare(t, 32768, 128, right(128), log, rounds=15))
            for t in CORE
        ),
        *(
            (
                f"more {t} 128",
                6,
                lambda t=t: compare(
                    t, 32768, 128, right(128, RIVALS), log, rounds=7, by_hand=options.by_hand
                ),
            )
            for t in MORE
        ),
        *(
            (
                f"131072 {t}",
                10,
                lambda t=t: compare(
                    t,
                    131072,
                    128,
                    right(128, RIVALS),
                    log,
                    rounds=3,
                    against=("FlashAttention-4",),
                ),
            )
            for t in (*LONG, *MORE)
        ),
        *(
            (
                f"narrow {t} 64",
                6,
                lambda t=t: compare(t, 32768, 64, right(64, RIVALS), log, rounds=7),
            )
            for t in MORE
        ),
        *(
            (f"core {t} 64", 8, lambda t=t: compare(t, 32768, 64, right(64), log, rounds=9))
            for t in CORE
        ),
        *length,
    ]
    if options.only is not None:
        work = length
    command = f"python benchmarks/gpu_routes.py --seconds {options.seconds:.0f}"
    if options.kernels != KERNELS:
        command += f" --kernels {' '.join(options.kernels)}"
    if options.match:
        command += f" --match {shlex.join(options.match)}"

    def tables() -> None:
        if options.only is None:
            table = json.dumps(measured(log, command), indent=2) + "\n"
            (options.out / "measured.json").write_text(table, encoding="utf-8")
        text = gpu_race.as_markdown(log, "CUDA routes on one GPU") + growth(log)
        (options.out / "routes.md").write_text(text, encoding="utf-8")

    if options.match:
        work = [one for one in work if any(word in one[0] for word in options.match)]
    do(work, log, left(), tables)
    log.add(kind="done", seconds=time.monotonic() - begin)
    log.without_superseded()


if __name__ == "__main__":
    main()
