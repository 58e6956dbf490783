"""Tiled attention in plain PyTorch: computes the tiles that the ranges touch, on any device.

FlashAttention's recurrence (Dao, arXiv 2307.08691, Algorithms 1 and 2) on batches of equal tiles:
for a tile of query rows and a span of keys

    S = scale Q K^T + mask,    lse = log rowsum exp S,    O = exp(S - lse) V

and spans of one tile are joined by O <- O + sigmoid(lse' - lse) (O' - O). The backward recomputes
P = exp(S - lse) and, with delta = rowsum(dO * O) - dlse,

    dV += P^T dO,    dS = P * (dO V^T - delta),    dQ += scale dS K,    dK += scale dS^T Q

Time O(visible pairs * D), memory O((N + M) D) and work buffers of fixed size. Nothing is compiled.
What is computed when is planned in _tiled_schedule; _tiled_forward and _tiled_backward compute it.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width; R = B H N and
L = B K M rows laid end to end.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.ops.kernels._tiled_backward import backward
from longspan.ops.kernels._tiled_forward import forward
from longspan.ops.kernels._tiled_schedule import Schedule, build_schedule
from longspan.ops.kernels._tiled_views import Biases
from longspan.ops.kernels._tiled_workers import can_share_threads
from longspan.ops.ranges import KeyRanges

# Query rows of a tile. Low tiles waste few scores at the edges, high ones multiply faster: 64 is
# the best of 32 to 256 for windows from 256 keys on. Bundled heads add to the height.
_TILE = 64
# Rows of a tall tile, and how much faster the forward multiplies them; for ranges whose ends move
# together, as in chunks, that is worth more than what is wasted at the edges.
_TALL, _FASTER = 256, 1.2
# Most scores of one job: what its rows and keys may cover before its keys are split.
_JOB = 1 << 18
# Scores of a forward batch. They never exist at once; this bounds the copy of its output.
_FORWARD_AREA = 1 << 25
# Scores of a backward batch per thread, which do exist: enough to outweigh the calls, few enough
# to stay in cache.
_BACKWARD_AREA = 1 << 18
# Calls with fewer multiplications than this are over before other threads have started.
_WORTH_THREADS = 1 << 27
# Keys in common from which on the forward puts neighbouring tiles on top of each other. The
# backward multiplies as fast without.
_BODY = 512
_NO_BODY = 1 << 40

_plans: WeakKeyDictionary[KeyRanges, dict[tuple[int, ...], tuple[Schedule, Biases]]] = (
    WeakKeyDictionary()
)


def tiled(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D].
        k_BKMD: keys [B, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
        v_BKMD: values [B, K, M, Dv].
        ranges: visible keys.
        scale: factor on the logits.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, and lse [B, H, N] in float32 (float64 for float64
        inputs). Both are differentiable, once.
    """
    return _Tiled.apply(q_BHND, k_BKMD, v_BKMD, ranges, scale)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
    ) -> tuple[Tensor, Tensor]:
        schedule, biases = _plan(ranges, q_BHND, k_BKMD, _FORWARD_AREA, _BODY)
        # Autocast would round the logits.
        with torch.autocast(q_BHND.device.type, enabled=False):
            out_RD, lse_R1 = forward(
                _rows(q_BHND),
                _rows(k_BKMD),
                _rows(v_BKMD),
                schedule,
                biases,
                ranges.queries,
                scale,
            )
        out_BHND = out_RD.view(*q_BHND.shape[:3], -1)
        lse_BHN = lse_R1.view(q_BHND.shape[:3])
        ctx.save_for_backward(q_BHND, k_BKMD, v_BKMD, out_BHND, lse_BHN)
        ctx.ranges, ctx.scale = ranges, scale
        return out_BHND, lse_BHN

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        dout_BHND, dlse_BHN = grad_outputs
        q_BHND, k_BKMD, v_BKMD, out_BHND, lse_BHN = ctx.saved_tensors
        # Sums over many keys: half precision is computed in float32.
        q_RD, k_LD, v_LD, dout_RD = (
            _rows(x.to(lse_BHN.dtype)) for x in (q_BHND, k_BKMD, v_BKMD, dout_BHND)
        )
        lse_R1, dlse_R1 = lse_BHN.reshape(-1, 1), dlse_BHN.reshape(-1, 1)
        delta_R1 = (dout_RD * _rows(out_BHND)).sum(-1, keepdim=True) - dlse_R1
        # Rows that see nothing have weights of 0: whatever meets these must be finite.
        empty_R1 = lse_R1.isneginf()
        threads = torch.get_num_threads()
        schedule, biases = _plan(ctx.ranges, q_BHND, k_BKMD, threads * _BACKWARD_AREA, _NO_BODY)
        with torch.autocast(q_BHND.device.type, enabled=False):
            grads = backward(
                q_RD,
                k_LD,
                v_LD,
                dout_RD,
                lse_R1.masked_fill(empty_R1, 0.0),
                delta_R1.masked_fill_(empty_R1, 0.0),
                schedule,
                biases,
                ctx.ranges.queries,
                ctx.scale,
                ctx.needs_input_grad[:3],
            )
        dq, dk, dv = (
            None if grad is None else grad.view(like.shape).to(like.dtype)
            for grad, like in zip(grads, (q_BHND, k_BKMD, v_BKMD), strict=True)
        )
        return dq, dk, dv, None, None


def _rows(x_BHND: Tensor) -> Tensor:
    """All rows laid end to end."""
    return x_BHND.contiguous().view(-1, x_BHND.shape[-1])


def _plan(
    ranges: KeyRanges, q_BHND: Tensor, k_BKMD: Tensor, area: int, body: int
) -> tuple[Schedule, Biases]:
    """The schedule for inputs of these shapes and batches of ``area`` scores over all threads."""
    batch, heads, queries, width = q_BHND.shape
    key_heads = k_BKMD.shape[1]
    on_cpu = q_BHND.device.type == "cpu" and can_share_threads()
    threads = torch.get_num_threads() if on_cpu else 1
    plans = _plans.setdefault(ranges, {})
    name = (batch, heads, key_heads, width, area, body, threads)
    if name not in plans:
        lo_GNm, hi_GNm, group_BH = (
            x.cpu().numpy().astype("int64")
            for x in (ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH.expand(batch, heads))
        )
        pairs = (hi_GNm - lo_GNm).sum(axis=(1, 2))[group_BH].sum()
        parts = min(threads, batch * key_heads) if threads > 1 else 1
        if pairs * width < _WORTH_THREADS:
            parts = 1
        tile = _TILE if heads == key_heads else _TILE // 2
        if body == _BODY and _scores(lo_GNm, hi_GNm, _TALL) < _FASTER * _scores(
            lo_GNm, hi_GNm, tile
        ):
            tile = _TALL * tile // _TILE
        tile = max(1, min(tile, queries))
        schedule = build_schedule(
            lo_GNm,
            hi_GNm,
            group_BH,
            keys=ranges.keys,
            key_heads=key_heads,
            tile=tile,
            span=max(256, _JOB // (tile * heads // key_heads)),
            area=area // min(parts, threads),
            parts=parts,
            body=body,
        )
        plans[name] = schedule, Biases()
    return plans[name]


def _scores(lo_GNm: NDArray[np.int64], hi_GNm: NDArray[np.int64], tile: int) -> int:
    """Scores in tiles of this height, if each covers all that its rows see."""
    rows = lo_GNm.shape[1] // tile * tile
    lo_GtX, hi_GtX = (
        x[:, :rows].reshape(len(x), rows // tile, tile * x.shape[2]) for x in (lo_GNm, hi_GNm)
    )
    # Ranges far from each other are tiles of their own: then the low ones waste least.
    if lo_GNm.shape[2] > 1 or not rows:
        return tile
    first = np.where(lo_GtX < hi_GtX, lo_GtX, np.iinfo(np.int64).max).min(axis=2)
    return int((hi_GtX.max(axis=2) - first).clip(0).sum()) * tile
