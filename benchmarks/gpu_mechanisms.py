"""Mechanisms on one GPU: gradients first, then time and memory beside dense attention.

    PYTHONPATH=src python benchmarks/gpu_mechanisms.py --out FOLDER --parts nsa moba [--peer PATH]

Parts, each with a budget of its own (``--budget-s``, 95 s unless told):

* ``nsa-fla``: native sparse attention as flash-linear-attention has it (16 heads to a key head,
  blocks of 64, no window), both libraries;
* ``nsa`` as published, ``moba``, ``lsh``, ``routing``, ``dual`` (dual chunk), ``pooled`` (and
  hierarchical);
* ``linear``: six feature maps and flash-linear-attention's ``chunk_linear_attn``.

1. Every mechanism at 1,500 tokens in bfloat16, output and gradients against itself in float64 with
   the reference kernel. Choices (blocks, buckets, clusters) are those of the first run, so that
   what is compared is the attention to what was chosen. What is wrong is not timed.
   flash-linear-attention chooses by itself: its NSA is checked at 1,024 tokens, where 16 blocks
   are all there are. What it gives is told after its times, which are taken whatever it is.
2. 16,384 to 65,536 tokens, batch 1, 32 heads over 8 key heads of width 128 (LSH: 32 over 32):
   forward, and forward + backward, in turns with dense causal attention of cuDNN. Choosing,
   sorting and rotating are inside, projections are not. Linear attention has 4,096 to 262,144
   tokens and 16 heads of width 64. Medians of CUDA events.

``--peer`` is a folder with wheels of fla-core and einops.
Every case is a line of FOLDER/mechanisms.jsonl as soon as it is done; what fails is a line with
its error, what no time is left for a line too. FOLDER/mechanisms.md is for people;
``mechanism_report.py`` adds the records to those of other runs.
``--device cpu --lengths 1024`` rehearses all of it without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

import mechanism_peers as peers
from gpu_harness import Log, failed, free, share_caches, wait
from longspan.bench import dense
from longspan.bench.setting import WAYS
from longspan.eval.records import read_lines
from longspan.mechanism import FeatureMap
from longspan.ops.kernels import cudnn
from mechanism_bench import Bench, both
from mechanism_cases import MECHANISMS, NSA_AS_FLA, Mechanism, Run, Size, linear, maps
from mechanism_report import folded, report

LENGTHS = (16384, 32768, 65536)
LINEAR_LENGTHS = (4096, 16384, 65536, 262144)
# Tokens at which their NSA chooses all of 16 blocks.
ALL_CHOSEN = 1024
PARTS = ("nsa-fla", *MECHANISMS, "linear")


def dense_call(device: str) -> dict[str, Run]:
    """What all are compared with, by name."""
    offered = dense.on_gpu() if device == "cuda" else dense.on_cpu()
    name, call = next(iter(offered.items()))
    return {f"dense, {name}": call}


def mechanisms(
    bench: Bench, cases: Mapping[str, Mechanism], size: Size, lengths: Sequence[int], n_check: int
) -> None:
    for name, what in cases.items():
        bench.check(name, what, size.small, n_check)
    right = {name: what for name, what in cases.items() if name in bench.used}
    for n in lengths:
        calls = {name: (call, size.qkv(n)) for name, call in dense_call(bench.device).items()}
        for name, what in right.items():
            calls[name] = (what.build(n, size, bench.used[name]), what.inputs(size, n))
        bench.race("mechanism", n, calls)


def compiled(
    bench: Bench, part: str, found: Mapping[str, FeatureMap], beside: Callable[[], None]
) -> dict[str, Run]:
    """Their calls, tuned; empty, with a record, where they are not there or do not run."""
    right: dict[str, Run] = {}
    try:
        beside()
        theirs = peers.calls(part, found)
        if bench.device == "cuda":
            peers.thin()
    except Exception as error:
        bench.log.add(kind="peer", name=peers.FLA, **failed(error))
        return {}
    size = peers.sizes(part, bench.device)
    for name, call in theirs.items():
        start = time.monotonic()
        try:
            both(call, size.qkv(peers.TUNED_AT))
            wait()
            right[name] = call
            bench.log.add(kind="tuned", name=name, seconds=time.monotonic() - start)
        except Exception as error:
            bench.log.add(kind="peer", name=name, **failed(error))
        free()
    return right


def compiling(bench: Bench, part: str) -> Callable[[], None]:
    """What waits until their kernels are compiled, beside what is done meanwhile."""
    if bench.device == "cpu" or peers.WHEELS not in os.environ:
        return lambda: None
    return peers.compiling(part, bench.log, 0.5 * bench.left)


def native_sparse(bench: Bench, lengths: Sequence[int], n_check: int) -> None:
    beside = compiling(bench, "nsa")
    own = peers.sizes("nsa", bench.device)
    bench.check("NSA, 16 of 64", NSA_AS_FLA, own, min(n_check, ALL_CHOSEN))
    theirs = compiled(bench, "nsa", {}, beside)
    for place, n in enumerate(lengths):
        inputs = own.qkv(n)
        calls = {name: (call, inputs) for name, call in dense_call(bench.device).items()}
        if "NSA, 16 of 64" in bench.used:
            run = NSA_AS_FLA.build(n, own, bench.used["NSA, 16 of 64"])
            calls["longspan"] = (run, inputs)
        calls |= {name: (call, inputs) for name, call in theirs.items()}
        bench.race("nsa", n, calls)
        # A shorter length compiles some of theirs anew: not before the first race.
        for name, call in theirs.items() if not place else ():
            bench.check(name, NSA_AS_FLA.by(call), own, ALL_CHOSEN)


def linear_family(bench: Bench, lengths: Sequence[int], n_check: int) -> None:
    size = peers.sizes("linear", bench.device)
    found = maps(size.width, max(lengths), bench.device)
    cases = {name: Mechanism(build=partial(linear, phi)) for name, phi in found.items()}
    for name, what in cases.items():
        bench.check(name, what, size, n_check)
    ours = {
        name: partial(linear, phi)(0, size, "auto")
        for name, phi in found.items()
        if name in bench.used
    }

    def race(calls: Mapping[str, Run]) -> None:
        all_calls = {**dense_call(bench.device), **calls}
        for way in WAYS:
            for n in lengths:
                inputs = size.qkv(n)
                bench.race(
                    "linear", n, {name: (call, inputs) for name, call in all_calls.items()}, (way,)
                )

    race(ours)
    # Not before, for it runs on the same device.
    theirs = compiled(bench, "linear", found, compiling(bench, "linear"))
    if theirs:
        race(theirs)
    for name, call in theirs.items():
        bench.check(name, cases[name.removeprefix(f"{peers.FLA}, ")].by(call), size, n_check)


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    words.add_argument("--budget-s", type=float, default=95.0, help="seconds of each part")
    words.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    words.add_argument("--lengths", type=int, nargs="+")
    words.add_argument("--linear-lengths", type=int, nargs="+")
    words.add_argument("--peer", help="folder with wheels")
    given = words.parse_args()
    on_gpu = given.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; --device cpu --lengths 1024 rehearses.")
    share_caches()
    if given.peer is not None:
        os.environ[peers.WHEELS] = given.peer
        peers.put_on_path(given.peer)
    log = Log(given.out / "mechanisms.jsonl")
    log.machine(command="python benchmarks/gpu_mechanisms.py " + " ".join(sys.argv[1:]))
    kernels = ("flex",) if cudnn.missing_stack() else ("cudnn", "flex")
    bench = Bench(log=log, device=given.device, kernels=kernels if on_gpu else ("auto",))
    many, few, width, n_check = (32, 8, 128, 1500) if on_gpu else (4, 2, 32, 300)
    size = Size(heads=many, key_heads=few, width=width, device=given.device)
    lengths = tuple(given.lengths or LENGTHS)
    longer = tuple(given.linear_lengths or (LINEAR_LENGTHS if on_gpu else lengths))
    for part in given.parts:
        bench.until = time.monotonic() + given.budget_s
        try:
            if part == "nsa-fla":
                native_sparse(bench, lengths, n_check)
            elif part == "linear":
                linear_family(bench, longer, n_check)
            else:
                mechanisms(bench, MECHANISMS[part], size, lengths, n_check)
        except Exception as error:
            log.add(kind="failed", name=part, **failed(error))
        text = report(folded(read_lines(log.path)))
        (given.out / "mechanisms.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
