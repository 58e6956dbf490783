"""Mechanisms on one GPU: gradients first, then time and memory beside dense attention.

    PYTHONPATH=src python benchmarks/gpu_mechanisms.py --out FOLDER [--budget-s 330] [--peer PATH]

1. Every mechanism at 1,500 tokens in bfloat16, output and gradients against itself in float64 with
   the reference kernel. Choices (blocks, buckets, clusters) are those of the first run, so that
   what is compared is the attention to what was chosen. What is wrong is not timed.
2. 16,384 to 65,536 tokens, batch 1, 32 heads over 8 key heads of width 128 (LSH: 32 over 32):
   forward, and forward + backward, beside dense causal attention of cuDNN in the same process.
   Medians of CUDA events; choosing, sorting and rotating are inside, projections are not.
3. Native sparse attention as flash-linear-attention has it (16 heads to a key head, blocks of 64,
   no window), both libraries.
4. Linear attention at 4,096 to 262,144 tokens, 16 heads of width 64, beside the same dense
   attention and, for maps that need no scaling, flash-linear-attention's ``chunk_linear_attn``.

``--peer`` is a folder with wheels of fla-core and einops.
Every case is a line of FOLDER/mechanisms.jsonl as soon as it is done; what fails is a line with
its error, what no time is left for a line too. FOLDER/mechanisms.md is for people.
``--device cpu --lengths 1024`` rehearses all of it without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gpu_harness import Log, failed, free, share_caches, wait
from longspan.bench import dense, memory
from longspan.bench.oracle import TOLERANCE, relative
from longspan.bench.setting import both_ways
from longspan.bench.timing import in_turns, summary
from longspan.mechanism import (
    DualChunk,
    Favor,
    FeatureMap,
    Laplace,
    dual_chunk_attention,
    feature_maps,
    hierarchical_attention,
    linear_attention,
    lsh,
    moba_attention,
    pooled_chunk_attention,
    routing_attention,
)
from longspan.mechanism._nsa_branches import compression, selection
from longspan.ops import attend
from longspan.ops.kernels import cudnn

Run = Callable[..., Tensor]
FLA = "flash-linear-attention"
LENGTHS = (16384, 32768, 65536)
LINEAR_LENGTHS = (4096, 16384, 65536, 262144)
# Seconds that a case should have left to begin, and those that its rounds may take.
NEEDED, ROUNDS = 5.0, 0.7
# What of the time has passed when each part has to end.
SHARES = {"mechanism": 0.62, "nsa": 0.78, "linear": 1.0}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Heads and their width, and where."""

    heads: int
    key_heads: int
    width: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def small(self) -> Size:
        """Fewer heads, as many to a key head."""
        few = max(1, self.key_heads // 4)
        return replace(self, heads=self.heads // self.key_heads * few, key_heads=few)

    def tensors(self, n: int, *heads: int) -> list[Tensor]:
        make = torch.Generator(self.device).manual_seed(n)
        return [
            torch.randn(1, h, n, self.width, generator=make, device=self.device).to(self.dtype)
            for h in heads
        ]

    def qkv(self, n: int) -> list[Tensor]:
        return self.tensors(n, self.heads, self.key_heads, self.key_heads)

    def shared(self, n: int) -> list[Tensor]:
        """Queries that are keys, and values."""
        return self.tensors(n, self.heads, self.heads)


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What is measured.

    Attributes:
        build: from a length, sizes and a kernel's name, the call.
        inputs: from sizes and a length, its inputs.
        choices: functions whose results the oracle repeats.
    """

    build: Callable[[int, Size, str], Run]
    inputs: Callable[[Size, int], list[Tensor]] = Size.qkv
    choices: tuple[str, ...] = ()

    def by(self, peer: Run) -> Mechanism:
        """The same with a peer in the place of every kernel but the reference."""

        def build(n: int, size: Size, impl: str) -> Run:
            return self.build(n, size, impl) if impl == "reference" else peer

        return replace(self, build=build, choices=())


def dual_chunk(n: int, size: Size, impl: str) -> Run:
    sizes = DualChunk.for_length(max(64, n // 4))
    return partial(dual_chunk_attention, config=sizes, rope=10000.0, impl=impl)


def pooled(combine: str, n: int, size: Size, impl: str) -> Run:
    joint = combine == "joint"
    return partial(pooled_chunk_attention, chunk=128, combine=combine, count_bias=joint, impl=impl)


def hierarchical(n: int, size: Size, impl: str) -> Run:
    return partial(hierarchical_attention, chunk=128, impl=impl)


def hashed(way: str, n: int, size: Size, impl: str) -> Run:
    # About 2 n / chunk buckets, as a product of two hashes.
    other = max(2, n // 32 // 16 // 2 * 2)
    make = torch.Generator().manual_seed(0)
    rotations = torch.randn(size.heads, size.width, 4, (16 + other) // 2, generator=make)
    rotations = rotations.to(size.device)

    def run(qk: Tensor, v: Tensor) -> Tensor:
        bucket = lsh.hash_buckets(qk, rotations, (16, other))
        return lsh.lsh_attention(
            qk, v, bucket, chunk=64, selection=way, scale=size.width**-0.5, impl=impl
        )

    return run


def routing(way: str, n: int, size: Size, impl: str) -> Run:
    clusters = max(4, math.isqrt(n))
    make = torch.Generator().manual_seed(0)
    centroids = torch.randn(size.key_heads, clusters, size.width, generator=make)
    centroids = torch.nn.functional.normalize(centroids, dim=-1).to(size.device)
    window = -(-n // clusters)
    return partial(routing_attention, centroids=centroids, window=window, selection=way, impl=impl)


def nsa(block: int, stride: int, window: int, n: int, size: Size, impl: str) -> Run:
    """The branches of ``NSA`` on common keys and values, with gates of 1/2."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2], device=q.device)[None]
        out, weight = compression(q, k, v, place, block, stride, impl)
        out = out + selection(q, k, v, weight, place, block, stride, 64, 16, impl)
        if window:
            out = out + attend(q, k, v, f"window({window})", impl=impl)
        return out / 2

    return run


def moba(block: int, top: int, n: int, size: Size, impl: str) -> Run:
    return partial(moba_attention, block=block, top=top, impl=impl)


BEST = "longspan.mechanism.{}.best_blocks"
MECHANISMS = {
    "dual chunk, trained for N / 4": Mechanism(build=dual_chunk),
    "pooled, chunk 128, joint": Mechanism(build=partial(pooled, "joint")),
    "pooled, chunk 128, sum": Mechanism(build=partial(pooled, "sum")),
    "hierarchical, chunk 128": Mechanism(build=hierarchical),
    "LSH, 4 rounds, chunk 64": Mechanism(
        build=partial(hashed, "chunks"),
        inputs=Size.shared,
        choices=("longspan.mechanism.lsh.hash_buckets",),
    ),
    "LSH, strictly causal": Mechanism(
        build=partial(hashed, "window"),
        inputs=Size.shared,
        choices=("longspan.mechanism.lsh.hash_buckets",),
    ),
    "routing, sqrt(N) clusters": Mechanism(
        build=partial(routing, "clusters"),
        choices=("longspan.mechanism._routing_selections._members",),
    ),
    "routing, strictly causal": Mechanism(
        build=partial(routing, "window"), choices=("longspan.mechanism.routing.nearest",)
    ),
    "NSA, 32/16, 16 of 64, window 512": Mechanism(
        build=partial(nsa, 32, 16, 512), choices=(BEST.format("_nsa_branches"),)
    ),
    "MoBA, 3 of 512": Mechanism(build=partial(moba, 512, 3), choices=(BEST.format("moba"),)),
    "MoBA, 8 of 512": Mechanism(build=partial(moba, 512, 8), choices=(BEST.format("moba"),)),
}
NSA_AS_FLA = Mechanism(build=partial(nsa, 64, 64, 0), choices=(BEST.format("_nsa_branches"),))


@contextmanager
def repeated(choices: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Functions give their results again, in order, from when the given function is called."""
    kept: dict[str, list[Any]] = {name: [] for name in choices}
    again = False

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if again:
                return kept[name].pop(0)
            kept[name].append(real(*args, **kwargs))
            return kept[name][-1]

        return run

    def from_now() -> None:
        nonlocal again
        again = True

    with ExitStack() as stack:
        for name in choices:
            module, _, attribute = name.rpartition(".")
            real = getattr(importlib.import_module(module), attribute)
            stack.enter_context(patch(name, watched(name, real)))
        yield from_now


def both(run: Run, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output, and gradients of a random weighing of it."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, leaves, slope.to(out))]


@dataclass
class Bench:
    """One run: where it writes, until when, and what was right."""

    log: Log
    device: str
    until: float
    kernels: tuple[str, ...]
    used: dict[str, str] = field(default_factory=dict)

    def out_of_time(self, **about: Any) -> bool:
        late = time.monotonic() + NEEDED > self.until
        if late:
            self.log.add(**about, skipped="no time left")
        return late

    def check(self, name: str, what: Mechanism, size: Size, n: int) -> None:
        """Against itself in float64 with the reference kernel; picks the kernel to time."""
        for kernel in self.kernels:
            about = {"kind": "check", "name": name, "kernel": kernel}
            if self.out_of_time(**about):
                return
            start = time.monotonic()
            try:
                inputs = what.inputs(size, n)
                with repeated(what.choices) as from_now:
                    found = both(what.build(n, size, kernel), inputs)
                    from_now()
                    exact = both(what.build(n, size, "reference"), [x.double() for x in inputs])
                errors = [relative(a, b) for a, b in zip(found, exact, strict=True)]
                right = all(e <= TOLERANCE[size.dtype] for e in errors)
                took = time.monotonic() - start
                self.log.add(**about, errors=errors, right=right, seconds=took)
                if right:
                    self.used[name] = kernel
                    return
            except Exception as error:
                self.log.add(**about, **failed(error))
            free()

    def time(self, call: Run, inputs: list[Tensor], **about: Any) -> None:
        """Medians of both ways, and what they need above their inputs."""
        if self.out_of_time(**about):
            return
        for way, step in both_ways(call, inputs).items():
            try:
                step()
                wait()
                start = time.monotonic()
                step()
                wait()
                once = time.monotonic() - start
                peak = memory.on_gpu(step) / 2**30 if self.device == "cuda" else None
                rounds = int(min(8, max(2, ROUNDS / max(once, 1e-4))))
                taken = in_turns({"": step}, rounds=rounds, device=self.device)[""]
                self.log.add(**about, way=way, **summary(taken), peak_gib=peak)
            except Exception as error:
                self.log.add(**about, way=way, **failed(error))
            del step
            free()

    def peer(self, module: str, name: str) -> Any:
        """A function of another library; None, and a record, if it is not there."""
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:
            self.log.add(kind="peer", name=module, **failed(error))
            return None


def dense_call(device: str) -> tuple[str, Run]:
    offered = dense.on_gpu() if device == "cuda" else dense.on_cpu()
    return next(iter(offered.items()))


def mechanisms(bench: Bench, size: Size, lengths: Sequence[int], n_check: int) -> None:
    for name, what in MECHANISMS.items():
        bench.check(name, what, size.small, n_check)
    of, call = dense_call(bench.device)
    for n in lengths:
        about = {"kind": "mechanism", "n": n}
        bench.time(call, size.qkv(n), **about, name=f"dense, {of}")
        for name, what in MECHANISMS.items():
            if name in bench.used:
                run = what.build(n, size, bench.used[name])
                bench.time(run, what.inputs(size, n), **about, name=name)


def native_sparse(bench: Bench, size: Size, lengths: Sequence[int], n_check: int) -> None:
    """NSA where flash-linear-attention has it: at least 16 heads to a key head, no window."""
    bench.check("NSA, 16 of 64", NSA_AS_FLA, size.small, n_check)
    theirs = bench.peer("fla.ops.nsa.parallel", "parallel_nsa")
    of, call = dense_call(bench.device)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = torch.full_like(q[..., 0], 0.5).transpose(1, 2)
        turned = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        out = theirs(*turned, half, half, None, block_counts=16, block_size=64)
        return out.transpose(1, 2)

    if theirs is not None:
        # They choose by themselves: where choices differ, so do results.
        bench.check(FLA, NSA_AS_FLA.by(peer), size.small, n_check)
    for n in lengths:
        about = {"kind": "nsa", "n": n}
        inputs = size.qkv(n)
        bench.time(call, inputs, **about, name=f"dense, {of}")
        if "NSA, 16 of 64" in bench.used:
            run = NSA_AS_FLA.build(n, size, bench.used["NSA, 16 of 64"])
            bench.time(run, inputs, **about, name="longspan")
        if theirs is not None:
            bench.time(peer, inputs, **about, name=FLA)


def maps(width: int, longest: int, device: str) -> dict[str, FeatureMap]:
    torch.manual_seed(0)
    named = {"elu + 1": "elu", "ReLU": "relu", "exp": "exp", "cosFormer": "cosformer"}
    found = {name: feature_maps.build(short, width, longest) for name, short in named.items()}
    return {**found, "Laplace": Laplace(width).to(device), "FAVOR+": Favor(width).to(device)}


def linear(bench: Bench, size: Size, lengths: Sequence[int], n_check: int) -> None:
    found = maps(size.width, max(lengths), bench.device)

    def build(phi: FeatureMap, n: int, size: Size, impl: str) -> Run:
        # One chunk is the quadratic form.
        return partial(linear_attention, feature_map=phi, chunk=n if impl == "reference" else 64)

    for name, phi in found.items():
        bench.check(name, Mechanism(build=partial(build, phi)), size, n_check)
    theirs = bench.peer("fla.ops.linear_attn", "chunk_linear_attn")

    def peer(phi: FeatureMap, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = torch.arange(q.shape[2], device=q.device)
        q, k = (phi(x, row)[0].to(x.dtype) for x in (q, k))
        turned = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return theirs(*turned, scale=1.0, normalize=True)[0].transpose(1, 2)

    peers = ("elu + 1", "ReLU", "cosFormer") if theirs is not None else ()
    for name in peers:
        ours = Mechanism(build=partial(build, found[name]))
        bench.check(f"{FLA}, {name}", ours.by(partial(peer, found[name])), size, n_check)
    of, call = dense_call(bench.device)
    for n in lengths:
        about = {"kind": "linear", "n": n}
        inputs = size.qkv(n)
        bench.time(call, inputs, **about, name=f"dense, {of}")
        for name, phi in found.items():
            if name in bench.used:
                bench.time(partial(linear_attention, feature_map=phi), inputs, **about, name=name)
        for name in peers:
            bench.time(partial(peer, found[name]), inputs, **about, name=f"{FLA}, {name}")


TITLES = {
    "mechanism": "Mechanisms",
    "nsa": "Native sparse attention: 16 blocks of 64, 16 heads to a key head, no window",
    "linear": "Linear attention",
}


def report(log: Log, command: str) -> str:
    """The records as a page."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "a rehearsal on a CPU"
    lines = [
        "# Mechanisms on one GPU",
        "",
        f"{gpu}, torch {torch.__version__}, bfloat16, batch 1. Milliseconds, medians; in brackets "
        "the time of dense attention over it, so that more than 1 is faster than dense; then the "
        "memory that a call needs above its inputs.",
        "",
        f"    {command}",
    ]
    for kind, title in TITLES.items():
        rows = [r for r in log.rows if r["kind"] == kind]
        sizes = sorted({r["n"] for r in rows})
        lines += ["", f"## {title}", ""]
        lines.append("| | way | " + " | ".join(f"{n:,}" for n in sizes) + " |")
        lines.append("|---|---|" + "---|" * len(sizes))
        for name in dict.fromkeys(r["name"] for r in rows):
            for way in ("forward", "forward+backward"):
                cells = [_cell(rows, name, way, n) for n in sizes]
                lines.append(f"| {name} | {way} | " + " | ".join(cells) + " |")
    checks = [r for r in log.rows if r["kind"] == "check"]
    lines += ["", "## Checks", "", "| | kernel | output and gradients |", "|---|---|---|"]
    for r in checks:
        told = ", ".join(f"{e:.4f}" for e in r["errors"]) if "errors" in r else _why(r)
        lines.append(f"| {r['name']} | {r['kernel']} | {told} |")
    return "\n".join(lines) + "\n"


def _cell(rows: Sequence[dict[str, Any]], name: str, way: str, n: int) -> str:
    mine = [r for r in rows if r["name"] == name and r["n"] == n and r.get("way", way) == way]
    if not mine:
        return ""
    if "seconds" not in mine[0]:
        return _why(mine[0])
    basis = [r for r in rows if r["name"].startswith("dense") and r["n"] == n]
    basis = [r["seconds"] for r in basis if r.get("way") == way and "seconds" in r]
    share = f" ({basis[0] / mine[0]['seconds']:.2f})" if basis else ""
    peak = mine[0]["peak_gib"]
    room = "" if peak is None else f", {peak:.1f} GiB"
    return f"{mine[0]['seconds'] * 1e3:.2f}{share}{room}"


def _why(row: dict[str, Any]) -> str:
    text = row.get("skipped") or row.get("refused") or row.get("error") or "?"
    return text.replace("|", "/").replace("\n", " ")[:80]


def put_on_path(wheels: Path) -> None:
    """Unpack wheels of pure Python where nothing else finds them."""
    folder = tempfile.mkdtemp(prefix="peers-")
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
    sys.path.append(folder)


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--budget-s", type=float, default=330.0)
    words.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    words.add_argument("--lengths", type=int, nargs="*")
    words.add_argument("--linear-lengths", type=int, nargs="*")
    words.add_argument("--peer", type=Path, help="folder with wheels")
    words.add_argument("--only", nargs="*", default=list(TITLES), choices=list(TITLES))
    given = words.parse_args()
    on_gpu = given.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; --device cpu --lengths 1024 rehearses.")
    start = time.monotonic()
    share_caches()
    if given.peer is not None:
        put_on_path(given.peer)
    log = Log(given.out / "mechanisms.jsonl")
    log.machine()
    kernels = ("flex",) if cudnn.missing_stack() else ("cudnn", "flex")
    bench = Bench(
        log=log,
        device=given.device,
        until=start + given.budget_s,
        kernels=kernels if on_gpu else ("auto",),
    )
    many, few, n_check = (32, 8, 1500) if on_gpu else (4, 2, 300)
    at = partial(Size, device=given.device)
    lengths = tuple(given.lengths or LENGTHS)
    longer = tuple(given.linear_lengths or (LINEAR_LENGTHS if on_gpu else lengths))
    width = 128 if on_gpu else 32
    steps = {
        "mechanism": lambda: mechanisms(
            bench, at(heads=many, key_heads=few, width=width), lengths, n_check
        ),
        "nsa": lambda: native_sparse(
            bench, at(heads=32, key_heads=2, width=width), lengths, n_check
        ),
        "linear": lambda: linear(
            bench, at(heads=16, key_heads=16, width=width // 2), longer, n_check
        ),
    }
    for kind in given.only:
        bench.until = start + given.budget_s * SHARES[kind]
        try:
            steps[kind]()
        except Exception as error:
            log.add(kind="failed", name=kind, **failed(error))
        text = report(log, "python benchmarks/gpu_mechanisms.py " + " ".join(sys.argv[1:]))
        (given.out / "mechanisms.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
