"""What flash-linear-attention has of the same mechanisms, compiled in processes side by side.

Its kernels try up to 48 configurations each, which takes minutes to compile. Here they choose
among three: with 4, 2 and 8 warps, large tiles, and as many stages as is usual. A process compiles
each (``--check PART-INDEX``, with the folder of wheels in LONGSPAN_BENCH_PEERS); the one that
times finds them in Triton's cache on disk, and tunes at a length that is timed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_harness import Log, failed, share_caches, side_by_side, wait
from longspan.mechanism import FeatureMap
from mechanism_bench import both
from mechanism_cases import Run, Size, maps

FLA = "flash-linear-attention"
WHEELS = "LONGSPAN_BENCH_PEERS"
# Where a kernel of theirs is, by part.
PEERS = {
    "nsa": ("fla.ops.nsa.parallel", "parallel_nsa"),
    "linear": ("fla.ops.linear_attn", "chunk_linear_attn"),
}
# Maps that need no scaling, which their kernel does not have.
MAPS = ("elu + 1", "ReLU")
# A kernel of their NSA is compiled apart below 8,192 rows, below 32,768, and beyond.
COMPILED_AT = {"nsa": (16384, 32768, 1024), "linear": (16384,)}
TUNED_AT = 16384
WARPS = (4, 2, 8)


def sizes(part: str, device: str) -> Size:
    """Heads and width at which a part is measured; a rehearsal has less of both."""
    small = device == "cpu"
    if part == "nsa":
        # They want at least 16 heads to a key head.
        return Size(heads=32, key_heads=2, width=32 if small else 128, device=device)
    return Size(heads=4 if small else 16, key_heads=4 if small else 16, width=64, device=device)


def native_sparse(theirs: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Their NSA with gates of 1/2 and no window."""
    half = torch.full_like(q[..., 0], 0.5).transpose(1, 2)
    turned = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = theirs(*turned, half, half, None, block_counts=16, block_size=64)
    return out.transpose(1, 2)


def linear(theirs: Any, phi: FeatureMap, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Their linear attention over our map."""
    row = torch.arange(q.shape[2], device=q.device)
    q, k = (phi(x, row)[0].to(x.dtype) for x in (q, k))
    turned = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return theirs(*turned, scale=1.0, normalize=True)[0].transpose(1, 2)


def calls(part: str, found: Mapping[str, FeatureMap]) -> dict[str, Run]:
    """Their calls, by name."""
    module, name = PEERS[part]
    theirs = getattr(importlib.import_module(module), name)
    if part == "nsa":
        return {FLA: partial(native_sparse, theirs)}
    return {f"{FLA}, {name}": partial(linear, theirs, found[name]) for name in MAPS}


def compiling(part: str, log: Log, seconds: float) -> Callable[[], None]:
    """Begin to compile beside this process; returns what waits for the end of it."""
    names = [f"{part}-{index}" for index in range(len(WARPS))]
    beside = ThreadPoolExecutor(1)
    work: Future[None] = beside.submit(side_by_side, __file__, names, log, seconds)
    beside.shutdown(wait=False)
    return work.result


def put_on_path(wheels: str) -> None:
    """Unpack wheels of pure Python where nothing else finds them."""
    folder = tempfile.mkdtemp(prefix="peers-")
    for wheel in Path(wheels).glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
    sys.path.append(folder)


def thin(warps: Sequence[int] = WARPS) -> None:
    """Leave every kernel that tunes itself one configuration for each number of warps."""
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    for kernel in gc.get_objects():
        if issubclass(type(kernel), tuner):
            best = {one.num_warps: one for one in sorted(kernel.configs, key=_usual, reverse=True)}
            kernel.configs = [best[count] for count in warps if count in best] or [
                min(kernel.configs, key=_usual)
            ]


def _usual(config: Any) -> tuple[int, ...]:
    """Least for a configuration that is likely to be good: large tiles, three stages."""
    tile = config.kwargs.get("BK", 1) * config.kwargs.get("BV", 1)
    return (abs(config.num_warps - 4), -tile, abs(config.num_stages - 3))


def compile_for(part: str, warps: int, lengths: Sequence[int], log: Log) -> None:
    """Run their calls both ways with configurations of so many warps, which compiles these."""
    size = sizes(part, "cuda")
    found = {} if part == "nsa" else maps(size.width, max(lengths), "cuda")
    theirs = calls(part, found)
    thin((warps,))
    for n in lengths:
        for name, call in theirs.items():
            try:
                both(call, size.qkv(n))
                wait()
            except Exception as error:
                log.add(kind="compile", name=f"{name}, {n} rows", **failed(error))


def main() -> None:
    words = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--check", required=True)
    given = words.parse_args()
    share_caches()
    put_on_path(os.environ[WHEELS])
    part, index = given.check.split("-")
    log = Log(given.out / f"{given.check}.jsonl")
    compile_for(part, WARPS[int(index)], COMPILED_AT[part], log)


if __name__ == "__main__":
    main()
