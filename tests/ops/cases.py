"""Key ranges by name and random inputs: what every kernel is tested on.

Built by hand from the patterns' definitions, without the pattern layer, so that a fault there
cannot hide here.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, G range
groups, m ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longspan.ops.ranges import KeyRanges


def key_ranges(lo, hi, group=None, *, heads: int, keys: int) -> KeyRanges:
    """Ranges from arrays [N], [G, N] or [G, N, m]; all heads follow group 0 unless told."""
    lo_GNm, hi_GNm = (np.atleast_2d(np.asarray(x, dtype=np.int32)) for x in (lo, hi))
    if lo_GNm.ndim == 2:
        lo_GNm, hi_GNm = lo_GNm[..., None], hi_GNm[..., None]
    group_BH = np.zeros((1, heads)) if group is None else np.atleast_2d(group)
    return KeyRanges(
        torch.tensor(lo_GNm),
        torch.tensor(hi_GNm),
        torch.tensor(group_BH, dtype=torch.int64),
        keys,
    )


def causal(n: int, heads: int) -> KeyRanges:
    i = np.arange(n)
    return key_ranges(0 * i, i + 1, heads=heads, keys=n)


def dense(n: int, heads: int, keys: int) -> KeyRanges:
    return key_ranges(np.zeros(n), np.full(n, keys), heads=heads, keys=keys)


def window(n: int, heads: int, width: int) -> KeyRanges:
    i = np.arange(n)
    return key_ranges(np.maximum(0, i - width + 1), i + 1, heads=heads, keys=n)


def cached_window(n: int, heads: int, keys: int, width: int) -> KeyRanges:
    """The queries are the last ``n`` of ``keys`` positions, as in decoding."""
    i = np.arange(keys - n, keys)
    return key_ranges(np.maximum(0, i - width + 1), i + 1, heads=heads, keys=keys)


def sink_window(n: int, heads: int, sink: int, width: int) -> KeyRanges:
    """Two ranges per row, which become one where they meet."""
    i = np.arange(n)
    start = np.maximum(0, i - width + 1)
    apart = start > sink
    lo = np.stack([np.zeros_like(i), np.where(apart, start, 0)], axis=1)
    hi = np.stack([np.where(apart, sink, i + 1), np.where(apart, i + 1, 0)], axis=1)
    return key_ranges(lo[None], hi[None], heads=heads, keys=n)


def chunk(n: int, heads: int, size: int) -> KeyRanges:
    i = np.arange(n)
    return key_ranges(i // size * size, i + 1, heads=heads, keys=n)


def scca_flow(n: int, heads: int, size: int) -> KeyRanges:
    """Head h of a query in chunk a sees chunk a - h mod (a + 1), up to itself."""
    i, h = np.arange(n), np.arange(heads)[:, None]
    seen = i // size - h % (i // size + 1)
    hi = np.minimum((seen + 1) * size, i + 1)
    return key_ranges(seen * size, hi, np.arange(heads), heads=heads, keys=n)


def shifted_chunk(n: int, heads: int, size: int) -> KeyRanges:
    """Causal chunks; the second half of the heads has them shifted by half a chunk."""
    i = np.arange(n)
    shift = np.array([0, size // 2])[:, None]
    lo = np.maximum(0, shift + size * ((i - shift) // size))
    group = np.arange(heads) >= max(1, heads // 2)
    return key_ranges(lo, np.broadcast_to(i + 1, lo.shape), group, heads=heads, keys=n)


def segments(n: int, batch: int, heads: int, seed: int) -> KeyRanges:
    """Packed causal documents, other ones in each batch row; the first rows are padding that
    sees nothing."""
    rng = np.random.default_rng(seed)
    i = np.arange(n)
    lo = np.zeros((batch, n), dtype=np.int64)
    hi = np.zeros((batch, n), dtype=np.int64)
    for b in range(batch):
        cuts = np.sort(rng.choice(n, size=min(4, n), replace=False))
        which = np.searchsorted(cuts, i, side="right")
        lo[b] = np.concatenate([[0], cuts])[which]
        hi[b] = np.where(which == 0, lo[b], i + 1)
    return key_ranges(lo, hi, np.repeat(np.arange(batch)[:, None], heads, 1), heads=heads, keys=n)


def scattered(
    n: int, batch: int, heads: int, keys: int, ranges: int, seed: int, *, smooth: bool = False
) -> KeyRanges:
    """Random disjoint ranges in every row, some rows without any; other ones for each head of
    each batch row.

    Args:
        smooth: neighbouring rows nearly alike, as real patterns are, instead of independent.
    """
    rng = np.random.default_rng(seed)
    groups = batch * heads
    shape = (groups, 1 if smooth else n, 2 * ranges)
    edges = np.sort(rng.integers(0, keys + 1, size=shape), axis=2)
    if smooth:
        edges = np.sort(np.clip(edges + rng.integers(-3, 4, (groups, n, 1)), 0, keys), axis=2)
    lo, hi = edges[..., ::2].copy(), edges[..., 1::2].copy()
    hi[rng.random((groups, n)) < 0.1] = 0
    unused = lo >= hi
    lo[unused], hi[unused] = 0, 0
    order = np.argsort(unused, axis=2, kind="stable")
    lo, hi = (np.take_along_axis(x, order, axis=2) for x in (lo, hi))
    group = np.arange(groups).reshape(batch, heads)
    return key_ranges(lo, hi, group, heads=heads, keys=keys)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes and the ranges that go with them."""

    name: str
    make: Callable[[Case], KeyRanges]
    B: int = 1
    H: int = 4
    K: int = 2
    N: int = 150
    M: int | None = None
    D: int = 16
    Dv: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def keys(self) -> int:
        return self.N if self.M is None else self.M

    def ranges(self) -> KeyRanges:
        return self.make(self)


CASES = [
    Case(name="causal", make=lambda c: causal(c.N, c.H)),
    Case(name="causal-long-thin", make=lambda c: causal(c.N, c.H), H=1, K=1, N=1153, D=8),
    Case(name="window", make=lambda c: window(c.N, c.H, 40), N=777, H=2, K=2),
    Case(name="window-even", make=lambda c: window(c.N, c.H, 64), N=512, H=2, K=2),
    Case(name="window-one-head", make=lambda c: window(c.N, c.H, 130), N=701, H=1, K=1),
    Case(name="window-one-key", make=lambda c: window(c.N, c.H, 1)),
    Case(name="window-two-batches", make=lambda c: window(c.N, c.H, 50), B=2, N=333),
    Case(name="gqa-1", make=lambda c: window(c.N, c.H, 60), H=8, K=8),
    Case(name="gqa-4", make=lambda c: window(c.N, c.H, 60), H=8, K=2, N=301),
    Case(name="gqa-8", make=lambda c: window(c.N, c.H, 60), H=8, K=1, B=2, N=301),
    Case(name="value-wider", make=lambda c: window(c.N, c.H, 33), Dv=24),
    Case(name="value-narrower", make=lambda c: causal(c.N, c.H), Dv=5),
    Case(name="chunk", make=lambda c: chunk(c.N, c.H, 128), N=700),
    Case(name="chunk-odd", make=lambda c: chunk(c.N, c.H, 37), N=223),
    Case(name="scca-flow", make=lambda c: scca_flow(c.N, c.H, 64), N=500, H=4, K=4),
    Case(name="scca-flow-odd-gqa", make=lambda c: scca_flow(c.N, c.H, 50), N=420, H=8, K=2),
    Case(name="shifted-chunk", make=lambda c: shifted_chunk(c.N, c.H, 128), N=600, H=8, K=4),
    Case(name="shifted-chunk-split-group", make=lambda c: shifted_chunk(c.N, c.H, 64), H=6, K=1),
    Case(name="sink-window", make=lambda c: sink_window(c.N, c.H, 4, 100), N=500),
    Case(name="sink-window-narrow", make=lambda c: sink_window(c.N, c.H, 70, 3), N=400),
    Case(name="dense-cross", make=lambda c: dense(c.N, c.H, c.keys), N=70, M=211),
    Case(name="decode-one", make=lambda c: cached_window(c.N, c.H, c.keys, 100), N=1, M=333),
    Case(name="decode-all", make=lambda c: dense(c.N, c.H, c.keys), N=1, M=999, B=2, H=8),
    Case(name="decode-few", make=lambda c: cached_window(c.N, c.H, c.keys, 64), N=5, M=301, B=2),
    Case(name="one-token", make=lambda c: causal(c.N, c.H), N=1),
    Case(
        name="nothing-visible",
        make=lambda c: key_ranges(np.zeros(c.N), np.zeros(c.N), heads=c.H, keys=c.N),
        N=40,
    ),
    Case(name="segments", make=lambda c: segments(c.N, c.B, c.H, 0), B=2, N=401),
    Case(
        name="rolling-keys-backwards",
        make=lambda c: key_ranges(
            np.arange(c.N)[::-1], np.arange(c.N)[::-1] + 100, heads=c.H, keys=c.keys
        ),
        N=400,
        M=500,
    ),
    Case(
        name="creeping-keys",
        make=lambda c: key_ranges(
            np.arange(c.N) // 64, np.arange(c.N) // 64 + 300, heads=c.H, keys=c.keys
        ),
        N=900,
        M=400,
        H=1,
        K=1,
    ),
    Case(
        name="scattered-1",
        make=lambda c: scattered(c.N, c.B, c.H, c.keys, 1, 1),
        B=2,
        N=131,
        M=180,
    ),
    Case(name="scattered-3", make=lambda c: scattered(c.N, c.B, c.H, c.keys, 3, 2), N=200, M=97),
    Case(
        name="scattered-8",
        make=lambda c: scattered(c.N, c.B, c.H, c.keys, 8, 3),
        B=2,
        H=2,
        K=1,
        N=90,
        M=400,
    ),
    Case(
        name="scattered-smooth",
        make=lambda c: scattered(c.N, c.B, c.H, c.keys, 4, 4, smooth=True),
        B=2,
        N=260,
        M=1500,
    ),
]


def make_qkv(
    case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q [B, H, N, D], k [B, K, M, D], v [B, K, M, Dv]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (case.B, case.H, case.N, case.D),
        (case.B, case.K, case.keys, case.D),
        (case.B, case.K, case.keys, case.D if case.Dv is None else case.Dv),
    )
    q, k, v = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes
    )
    return q, k, v


def to_device(ranges: KeyRanges, device: str) -> KeyRanges:
    return KeyRanges(
        ranges.lo_GNm.to(device), ranges.hi_GNm.to(device), ranges.group_BH.to(device), ranges.keys
    )


def run(kernel, qkv, ranges: KeyRanges, *, seed: int = 1) -> dict[str, Tensor]:
    """Output, lse and the gradients of a random linear function of both."""
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv)
    out, lse = kernel(q, k, v, ranges, q.shape[-1] ** -0.5)
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse)
    seen = lse.isfinite()
    total = (out * dout).sum() + torch.where(seen, lse * dlse, 0.0).sum()
    dq, dk, dv = torch.autograd.grad(total, (q, k, v))
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def added_in_place(grads, into, after):
    """Gradients of q, k and v as halves with places hand them back."""
    dq, *others = grads
    if after is None:
        return grads
    for place, grad in zip(into[1:], others, strict=True):
        place.add_(grad)
    return dq, *into[1:]


class On:
    """A tensor's looks on a device that is not here."""

    def __init__(self, *shape, dtype=torch.bfloat16, grad=False):
        self.shape, self.dtype, self.requires_grad = shape, dtype, grad
        self.device = torch.device("cuda", 0)
