"""What ``gpu_mechanisms`` measures: calls of each mechanism, and what decides in them.

Choices (blocks, buckets, clusters) are named, so that an oracle can repeat them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

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

Run = Callable[..., Tensor]


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
        out, weigh = compression(q, k, v, place, block, stride, impl)
        out = out + selection(q, k, v, weigh, place, block, stride, 64, 16, impl)
        if window:
            out = out + attend(q, k, v, f"window({window})", impl=impl)
        return out / 2

    return run


def moba(block: int, top: int, n: int, size: Size, impl: str) -> Run:
    return partial(moba_attention, block=block, top=top, impl=impl)


def linear(phi: FeatureMap, n: int, size: Size, impl: str) -> Run:
    # One chunk is the quadratic form.
    return partial(linear_attention, feature_map=phi, chunk=n if impl == "reference" else 64)


def maps(width: int, longest: int, device: str) -> dict[str, FeatureMap]:
    torch.manual_seed(0)
    named = {"elu + 1": "elu", "ReLU": "relu", "exp": "exp", "cosFormer": "cosformer"}
    found = {name: feature_maps.build(short, width, longest) for name, short in named.items()}
    return {**found, "Laplace": Laplace(width).to(device), "FAVOR+": Favor(width).to(device)}


BEST = "longspan.mechanism.{}.best_blocks"
HASHES = ("longspan.mechanism.lsh.hash_buckets",)
NSA_AS_FLA = Mechanism(build=partial(nsa, 64, 64, 0), choices=(BEST.format("_nsa_branches"),))
# By part.
MECHANISMS = {
    "nsa": {
        "NSA, 32/16, 16 of 64, window 512": Mechanism(
            build=partial(nsa, 32, 16, 512), choices=(BEST.format("_nsa_branches"),)
        ),
    },
    "moba": {
        "MoBA, 3 of 512": Mechanism(build=partial(moba, 512, 3), choices=(BEST.format("moba"),)),
        "MoBA, 8 of 512": Mechanism(build=partial(moba, 512, 8), choices=(BEST.format("moba"),)),
    },
    "lsh": {
        "LSH, 4 rounds, chunk 64": Mechanism(
            build=partial(hashed, "chunks"), inputs=Size.shared, choices=HASHES
        ),
        "LSH, strictly causal": Mechanism(
            build=partial(hashed, "window"), inputs=Size.shared, choices=HASHES
        ),
    },
    "routing": {
        "routing, sqrt(N) clusters": Mechanism(
            build=partial(routing, "clusters"),
            choices=("longspan.mechanism._routing_selections._members",),
        ),
        "routing, strictly causal": Mechanism(
            build=partial(routing, "window"),
            choices=("longspan.mechanism._routing_attention.nearest",),
        ),
    },
    "dual": {"dual chunk, trained for N / 4": Mechanism(build=dual_chunk)},
    "pooled": {
        "pooled, chunk 128, joint": Mechanism(build=partial(pooled, "joint")),
        "pooled, chunk 128, sum": Mechanism(build=partial(pooled, "sum")),
        "hierarchical, chunk 128": Mechanism(build=hierarchical),
    },
}
