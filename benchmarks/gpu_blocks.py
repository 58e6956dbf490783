"""Block patterns on one GPU: our routes against dense and block-sparse kernels of others.

    PYTHONPATH=src python benchmarks/gpu_blocks.py --out FOLDER [--budget-s 150] [--width 64]

A query block sees whole key blocks, its own and earlier ones: 5, 10, 25 and 50 % of those before
it, of 64 and 128 tokens, drawn at random or chosen by content (the means of queries and keys,
``block_topk``). Query heads that share a key head share a map. Besides, random blocks of 64 whose
own block is cut at the diagonal, as patterns for language models have it, which no other library
takes, and such with a map for each query head: our kernels alone. N 32768, batch 1, 32 heads over
8 key heads, width 128 or the given one, bfloat16, forward and forward + backward.

1. Every rival at 2,048 rows against float32, output and gradients. In processes side by side,
   which also compile.
2. At full length: some rows against float32, all results against each other, and what a new map
   costs. Then in turns with dense causal attention of cuDNN and FlashAttention-4.

Rivals: our kernels over ranges, and which of them ``auto`` picks; FlexAttention (Triton) with a
mask by hand in tiles of 128 (for blocks of 64 at the least density only, where it is five times
slower than the others); cuDNN's block-sparse attention (its backward knows no grouped queries:
keys and values are repeated for it, which counts); FlashAttention-4 with lists of blocks. What is
wrong is not timed.

Every record is a line of FOLDER/blocks.jsonl as it comes, behind those of an ``--earlier`` run,
whose other cases stay. FOLDER/blocks.md is for people, FOLDER/measured.json the table that
``auto`` goes by: copy it to src/longspan/ops/measured.json. ``--device cpu --n 1024`` walks the
same steps as a rehearsal, in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import gpu_race
from gpu_harness import (
    HEADS,
    KEY_HEADS,
    RESULTS,
    Log,
    Work,
    device_of_this_run,
    do,
    dtype_of_this_run,
    failed,
    share_caches,
    side_by_side,
    tensors,
)
from longspan.bench import oracle
from longspan.bench.peers import block_sparse
from longspan.bench.peers.block_maps import BlockMap
from longspan.bench.setting import Call, both_ways
from longspan.errors import Refusal
from longspan.ops.capability import choose
from longspan.ops.measured import shape_of
from longspan.ops.ranges import KeyRanges
from longspan.ops.whole_blocks import SIZE
from longspan.select import sample, select

SIZES = (128, 64)
DENSITIES = (0.05, 0.1, 0.25, 0.5)
KINDS = ("random", "content", "cut", "heads")
# Those of blocks of 64 for our kernels alone, and their densities: maps that are cut at the
# diagonal, and of each query head its own.
OURS = ("cut", "heads")
FEW_DENSITIES = (0.05, 0.25)
CHECKED_ROWS = 2048
FLEX = "FlexAttention by hand"
# What has no cache on disk is compiled where it is timed.
UNCACHED = ("cuDNN block-sparse", "longspan cudnn_blocks")


def width_of_this_run() -> int:
    """Head width."""
    return int(os.environ.get("LONGSPAN_BENCH_WIDTH", "128"))


def scale_of_this_run() -> float:
    """Factor on the logits."""
    return width_of_this_run() ** -0.5


def random_map(blocks: int, density: float, maps: int = KEY_HEADS) -> Tensor:
    """bool [maps, Q, T]: a share of the blocks up to a query's own, which is one of them."""
    make = torch.Generator(device_of_this_run()).manual_seed(blocks)
    score = torch.rand(maps, blocks, blocks, generator=make, device=device_of_this_run())
    own = torch.arange(blocks, device=score.device)
    score = score.masked_fill(own > own[:, None], -1.0).masked_fill(own == own[:, None], 2.0)
    rank = score.argsort(dim=-1, descending=True).argsort(dim=-1)
    return rank < (density * (own + 1)).round().clamp(min=1)[:, None]


@cache
def prompt(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with attention as models have it."""
    where = device_of_this_run()
    width = width_of_this_run()
    return sample(n, HEADS, KEY_HEADS, width, dtype=dtype_of_this_run(), device=where)


def content_map(n: int, size: int, density: float) -> Tensor:
    """bool [K, Q, T]: what ``block_topk`` chooses for the first head of each group."""
    chosen = select(*prompt(n), f"block_topk({density}, block={size})").selection.blocks
    return chosen[0, :: HEADS // KEY_HEADS, : n // size, : n // size]


def made(kind: str, n: int, size: int, density: float) -> BlockMap:
    """A map by name."""
    if kind == "content":
        return BlockMap(content_map(n, size, density), size, HEADS)
    maps = HEADS if kind == "heads" else KEY_HEADS
    return BlockMap(random_map(n // size, density, maps), size, HEADS)


def ranges_of(given: BlockMap, *, cut: bool = False) -> KeyRanges:
    """A map as ranges: neighbouring blocks are one range, ``cut`` at the diagonal if asked."""
    seen_KQT = given.seen_GQT
    count = seen_KQT.shape[-1]
    turn = pad(seen_KQT.int(), (1, 1)).diff(dim=-1)
    width = int((turn > 0).sum(-1).max())
    place = torch.arange(count + 1, device=seen_KQT.device)
    # Unused ranges begin and end at the last row.
    lo, hi = (
        place.expand_as(turn).masked_fill(turn != sign, count).sort(-1).values[..., :width]
        for sign in (1, -1)
    )
    lo, hi = (x.repeat_interleave(given.size, 1).int() * given.size for x in (lo, hi))
    if cut:
        row = torch.arange(lo.shape[1], dtype=torch.int32, device=lo.device)[:, None]
        hi = torch.where(lo < hi, torch.minimum(hi, row + 1), hi)
    group = torch.arange(given.heads, device=lo.device) // (given.heads // len(seen_KQT))
    return KeyRanges(lo, hi, group[None], count * given.size)


def over(kernel: str, ranges: KeyRanges) -> Call:
    """A kernel of ours over ranges."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = choose(kernel, q, k, v, ranges, use_lse=False)
        return found.load()(q, k, v, ranges, scale_of_this_run())[0]

    return call


def picked(ranges: KeyRanges, inputs: Sequence[Tensor]) -> dict[str, str]:
    """What ``auto`` takes, each way."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        forward = choose("auto", *inputs, ranges, use_lse=False).name
    both = choose("auto", *leaves, ranges, use_lse=False).name
    return {"forward": forward, "forward+backward": both}


def kernels(size: int) -> tuple[str, ...]:
    """Ours for a block size."""
    found = ("cudnn", "hopper", *(("cudnn_blocks",) if size == SIZE else ()))
    return found if device_of_this_run() == "cuda" else (*found, "tiled")


def rivals(size: int, *, cut: bool = False) -> dict[str, Callable[[BlockMap], Call]]:
    """Who competes, by name."""
    found: dict[str, Callable[[BlockMap], Call]] = {
        f"longspan {kernel}": lambda given, kernel=kernel: over(kernel, ranges_of(given, cut=cut))
        for kernel in kernels(size)
    }
    if cut:
        return found
    found[FLEX] = partial(
        block_sparse.flex,
        scale=scale_of_this_run(),
        tile=128,
        fused=device_of_this_run() == "cuda",
    )
    found["cuDNN block-sparse"] = partial(block_sparse.cudnn, scale=scale_of_this_run())
    found["FlashAttention-4 block-sparse"] = partial(
        block_sparse.flash_4, scale=scale_of_this_run()
    )
    return found


def check(name: str, size: int, log: Log, n: int, *, cut: bool = False) -> None:
    """One rival on a short map against float32; then compile what will be timed."""
    own = min(CHECKED_ROWS, n)
    heads, key_heads = HEADS // 4, KEY_HEADS // 4
    given = BlockMap(random_map(own // size, 0.2)[:key_heads], size, heads)
    about = {"kind": "check", "kernel": name, "block": size, "cut": cut}
    start = time.perf_counter()
    try:
        call = rivals(size, cut=cut)[name](given)
        ranges = ranges_of(given, cut=cut)

        def theirs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return choose("reference", q, k, v, ranges).load()(
                q, k, v, ranges, scale_of_this_run()
            )

        inputs = tensors(own, width_of_this_run(), heads=heads, key_heads=key_heads)
        found: dict[str, float] = {}
        why = ""
        try:
            found = oracle.errors(oracle.beside(call, theirs), theirs, inputs, use_lse=False)
            found.pop("lse")
        except (Refusal, NotImplementedError) as error:
            why = str(error)
            with torch.no_grad():
                exact = theirs(*(x.float() for x in inputs))[0]
                found = {"out": oracle.relative(call(*inputs), exact)}
        wrong = oracle.wrong(found, dtype_of_this_run())
        seconds = time.perf_counter() - start
        log.add(**about, errors=found, wrong=wrong, no_backward=why, seconds=seconds)
        if n > own and not wrong and not cut:
            warm(name, size, n)
            log.add(**{**about, "kind": "warm"}, seconds=time.perf_counter() - start)
    except Exception as error:
        log.add(**about, **failed(error), seconds=time.perf_counter() - start)


def warm(name: str, size: int, n: int) -> None:
    """Compile what will be timed."""
    with contextlib.suppress(Refusal):
        call = rivals(size)[name](made("random", n, size, DENSITIES[0]))
        for step in both_ways(call, tensors(n, width_of_this_run())).values():
            step()


def checks(log: Log, n: int, seconds: float) -> None:
    """Check every rival: in processes side by side, but for what leaves no cache on disk."""
    # Blocks of the least size have all rivals.
    everyone = list(rivals(min(SIZES)))
    here = UNCACHED if device_of_this_run() == "cuda" else everyone
    with ThreadPoolExecutor(1) as beside:
        others = [name for name in everyone if name not in here]
        children = beside.submit(side_by_side, __file__, others, log, seconds)
        for name in here:
            check_sizes(name, log, n)
        children.result()


def check_sizes(name: str, log: Log, n: int) -> None:
    """One rival with every block size that it takes part in."""
    for size in SIZES:
        if name in rivals(size):
            check(name, size, log, n)
        if size == SIZE and name in rivals(size, cut=True):
            check(name, size, log, n, cut=True)


def right(log: Log) -> dict[int, list[str]]:
    """The rivals of each block size that passed their check, in order."""
    right: dict[tuple[str, int], bool] = {}
    for row in log.rows:
        if row["kind"] == "check":
            name = (row["kernel"], row["block"])
            passed = "errors" in row and not row["wrong"]
            right[name] = passed and right.get(name, True)
    return {size: [name for name in rivals(size) if right.get((name, size))] for size in SIZES}


def compare(
    kind: str, size: int, density: float, names: list[str], log: Log, *, n: int, rounds: int
) -> None:
    """Check and time the rivals on one map."""
    cut = kind == "cut"
    given = made(kind, n, size, density)
    more_words = {"cut": ", causal", "heads": ", a map for each head"}.get(kind, "")
    pattern = f"{'random' if kind in OURS else kind} blocks of {size}, {density:.0%}{more_words}"
    width = width_of_this_run()
    about = {"kind": "speed", "pattern": pattern, "n": n, "width": width, "block": size}
    inputs = list(prompt(n)) if kind == "content" else tensors(n, width)
    seen_HQT = given.seen_HQT

    def keys(head: int, row: int) -> Tensor:
        at = seen_HQT[head, row // size].repeat_interleave(size).nonzero()[:, 0]
        return at[at <= row] if cut else at

    rows = partial(oracle.row_error_over, keys, inputs, rows=[0, n // 3, n - 1])
    offered = rivals(size, cut=cut)
    if kind in OURS:
        names = [name for name in names if name.startswith("longspan")]
    makers = {name: partial(offered[name], given) for name in names if name in offered}
    ranges = ranges_of(given, cut=cut)
    # Every block of rows sees its own block.
    pairs = given.pairs - cut * HEADS * n * (size - 1) // 2
    mean_keys, apart, filled, by_twos = shape_of(ranges)
    more = {
        "density": pairs / (HEADS * n * (n + (1 if cut else size)) / 2),
        "keys": mean_keys,
        "apart": apart,
        "several": ranges.lo_GNm.shape[2] > 1,
        "fill": filled,
        "by_twos": by_twos,
        "auto": picked(ranges, inputs),
    }
    gpu_race.compare(makers, inputs, rows, pairs, log, about, rounds=rounds, more=more)


def verdict(log: Log) -> str:
    """The best of ours, what ``auto`` took, and the best of others for each case, as a table.

    Each kernel with the share of its own last run.
    """
    lines = ["", "Of dense, as is all here; ``auto`` by the table stored before this run.", ""]
    lines += ["| case | way | ours | | auto took | other | |", "|" + "---|" * 7]
    cases: dict[tuple[str, str], dict[str, float]] = {}
    took: dict[tuple[str, str], str] = {}
    for row in log.timed():
        if row.get("of_dense"):
            narrow = "" if row["width"] == 128 else f", D {row['width']}"
            name = (row["pattern"] + narrow, row["way"])
            cases.setdefault(name, {})[row["kernel"]] = row["of_dense"]
            took[name] = row.get("auto", {}).get(row["way"], "-")
    for (pattern, way), shares in cases.items():
        cells = [pattern, way]
        for own in (True, False):
            among = [
                name
                for name in shares
                if name.startswith("longspan") == own and not name.startswith("dense")
            ]
            best = max(among, key=lambda name: shares[name], default=None)
            cells += ["-", "-"] if best is None else [best, f"{shares[best]:.2f}"]
            cells += [took[pattern, way]] * own
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measured_cases(log: Log) -> list[dict[str, Any]]:
    """What the table of ``auto`` says of these patterns."""
    cases: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in log.rows:
        kernel = row.get("kernel", "").removeprefix("longspan ")
        if row["kind"] != "speed" or "tflops" not in row or kernel == row["kernel"]:
            continue
        about = {
            "pattern": row["pattern"],
            "width": row["width"],
            "keys": round(row["keys"]),
            "apart": row["apart"],
            "several": row["several"],
            "fill": round(row["fill"], 3),
            "by_twos": row.get("by_twos", True),
            "backward": row["way"] != "forward",
            "tflops": {},
        }
        case = cases.setdefault((row["pattern"], row["width"], row["way"]), about)
        case["tflops"][kernel] = round(row["tflops"], 1)
    return list(cases.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=150)
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device_of_this_run())
    parser.add_argument("--n", type=int, default=int(os.environ.get("LONGSPAN_BENCH_N", "32768")))
    parser.add_argument("--width", type=int, choices=(64, 128), default=width_of_this_run())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--densities", default=",".join(map(str, DENSITIES)))
    parser.add_argument(
        "--earlier",
        type=Path,
        default=RESULTS / "blocks-h200.jsonl",
        help="records whose other cases stay in the tables",
    )
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # The checking processes are asked for the same.
    os.environ["LONGSPAN_BENCH_DEVICE"] = options.device
    os.environ["LONGSPAN_BENCH_N"] = str(options.n)
    os.environ["LONGSPAN_BENCH_WIDTH"] = str(options.width)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("needs a CUDA device; --device cpu --n 1024 is a rehearsal")
    if options.n % max(SIZES):
        sys.exit(f"--n must be a multiple of {max(SIZES)}, got {options.n}")
    share_caches()
    if options.check:
        log = Log(options.out / f"{options.check}.jsonl")
        check_sizes(options.check, log, options.n)
        return
    begin = time.monotonic()
    log = Log(options.out / "blocks.jsonl", options.earlier if options.device == "cuda" else None)
    log.machine()
    checks(log, options.n, 0.4 * options.budget_s)
    able = right(log)
    log.add(kind="verdicts", right=able)
    work: list[Work] = []
    # Blocks of 64 first, and both ends before the middle: what is left out for want of time is
    # what can be told from its neighbours.
    asked = sorted({float(word) for word in options.densities.split(",")})
    for density in [*asked[:1], *asked[:0:-1]]:
        for size in sorted(SIZES):
            for kind in KINDS:
                if kind in OURS and (size != SIZE or density not in FEW_DENSITIES):
                    continue
                names = able[size]
                if size == SIZE and density > asked[0]:
                    names = [name for name in names if name != FLEX]
                step = partial(
                    compare, kind, size, density, names, log, n=options.n, rounds=options.rounds
                )
                work.append((f"{kind} {size} {density}", 4, step))

    def tables() -> None:
        text = gpu_race.as_markdown(log, "Block patterns on one GPU") + verdict(log)
        (options.out / "blocks.md").write_text(text, encoding="utf-8")
        if options.device == "cuda":
            narrow = "" if options.width == 128 else f" --width {options.width}"
            command = f"python benchmarks/gpu_blocks.py{narrow}"
            table = json.dumps(gpu_race.rates_table(measured_cases(log), command), indent=2) + "\n"
            (options.out / "measured.json").write_text(table, encoding="utf-8")

    do(work, log, options.budget_s - (time.monotonic() - begin), tables)
    log.add(kind="done", seconds=time.monotonic() - begin)


if __name__ == "__main__":
    main()
