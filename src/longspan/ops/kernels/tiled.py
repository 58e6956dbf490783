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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.empty import idle_rows, quiet
from longspan.ops.kernels._tiled_backward import backward
from longspan.ops.kernels._tiled_forward import forward
from longspan.ops.kernels._tiled_runs import Costs
from longspan.ops.kernels._tiled_schedule import Schedule, build_schedule
from longspan.ops.kernels._tiled_views import Biases, lay, rows_of, steps_of
from longspan.ops.once import once
from longspan.ops.ranges import KeyRanges
from longspan.ops.workers import can_share_threads

# Query rows of the lowest job. Low jobs waste few scores at the edges, high ones multiply faster:
# 64 is the best of 32 to 256 for windows from 256 keys on. Bundled heads add to the height.
_LEAF = 64
# Calls with fewer multiplications than this are over before other threads have started.
_WORTH_THREADS = 1 << 27


@dataclass(frozen=True)
class _Way:
    """How a pass over the scores is cut.

    Attributes:
        leaves: height of a tile in leaves, where its rows see nearly the same.
        job: scores of one job, beyond which its keys are split.
        area: scores of a batch per thread.
        costs: what a call, a score and a gathered key take.
    """

    leaves: int
    job: int
    area: int
    costs: Costs


# Scores of a forward batch never exist at once; the area bounds the copy of its output.
_FORWARD = _Way(leaves=8, job=1 << 19, area=1 << 25, costs=Costs(call=80e3, score=4.6, copy=25.0))
# Those of a backward batch do: enough to outweigh the calls, few enough to stay in cache.
_BACKWARD = _Way(
    leaves=4, job=1 << 18, area=1 << 19, costs=Costs(call=80e3, score=11.0, copy=100.0)
)

_plans: WeakKeyDictionary[KeyRanges, dict[tuple[object, ...], tuple[Schedule, Biases]]] = (
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
        rows = (q_BHND, k_BKMD, v_BKMD)
        out_BHND, lse_BHN = _attend(*rows, ranges, scale)
        # Looking at all rows first would cost more than attention, as in decoding with a window.
        if not (_finite(out_BHND) and float(lse_BHN.amax()) < math.inf):
            rows = _quiet(*rows, ranges)
            out_BHND, lse_BHN = _attend(*rows, ranges, scale)
        ctx.save_for_backward(*rows, out_BHND, lse_BHN)
        ctx.ranges, ctx.scale = ranges, scale
        return out_BHND, lse_BHN

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        q_BHND, k_BKMD, v_BKMD, *found = ctx.saved_tensors
        dout_BHND, dlse_BHN = grad_outputs
        given = (ctx.ranges, ctx.scale, ctx.needs_input_grad[:3])
        grads = _gradients((q_BHND, k_BKMD, v_BKMD), found, (dout_BHND, dlse_BHN), *given)
        if not all(grad is None or _finite(grad) for grad in grads):
            rows = _quiet(q_BHND, k_BKMD, v_BKMD, ctx.ranges)
            dout_BHND = quiet(dout_BHND, idle_rows(ctx.ranges, q_BHND, k_BKMD)[0])
            grads = _gradients(rows, found, (dout_BHND, dlse_BHN), *given)
        return *grads, None, None


def _attend(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    schedule, biases = _plan(ranges, q_BHND, k_BKMD, _FORWARD)
    # Autocast would round the logits.
    with torch.autocast(q_BHND.device.type, enabled=False):
        q_RD = rows_of(q_BHND, schedule.row_steps)
        k_LD, v_LD = (rows_of(x, schedule.key_steps) for x in (k_BKMD, v_BKMD))
        out_RD, lse_R1 = forward(q_RD, k_LD, v_LD, schedule, biases, scale)
    out_BHND = lay(out_RD, q_BHND.shape, schedule.row_steps)
    return out_BHND, lay(lse_R1, q_BHND.shape, schedule.row_steps)[..., 0]


def _gradients(
    rows: tuple[Tensor, Tensor, Tensor],
    found: Sequence[Tensor],
    slopes: tuple[Tensor, Tensor],
    ranges: KeyRanges,
    scale: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    (q_BHND, k_BKMD, v_BKMD), (out_BHND, lse_BHN), (dout_BHND, dlse_BHN) = rows, found, slopes
    schedule, biases = _plan(ranges, q_BHND, k_BKMD, _BACKWARD)
    # Sums over many keys: half precision is computed in float32.
    q_RD, dout_RD, out_RD, lse_R1, dlse_R1 = (
        rows_of(x.to(lse_BHN.dtype), schedule.row_steps)
        for x in (q_BHND, dout_BHND, out_BHND, lse_BHN[..., None], dlse_BHN[..., None])
    )
    k_LD, v_LD = (rows_of(x.to(lse_BHN.dtype), schedule.key_steps) for x in (k_BKMD, v_BKMD))
    delta_R1 = (dout_RD * out_RD).sum(-1, keepdim=True) - dlse_R1
    # Rows that see nothing have weights of 0: whatever meets these must be finite.
    empty_R1 = lse_R1.isneginf()
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
            scale,
            wanted,
        )
    places = (schedule.row_steps, schedule.key_steps, schedule.key_steps)
    return tuple(
        None if grad is None else lay(grad, like.shape, steps).to(like.dtype)
        for grad, like, steps in zip(grads, rows, places, strict=True)
    )


def _finite(x: Tensor) -> bool:
    """Whether all numbers are, by their sum; one that overflows only costs a second look."""
    return math.isfinite(float(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))))


def _quiet(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges
) -> tuple[Tensor, Tensor, Tensor]:
    """The same rows, those that take no part without NaN and infinity."""
    idle_q, idle_k = idle_rows(ranges, q_BHND, k_BKMD)
    return quiet(q_BHND, idle_q), quiet(k_BKMD, idle_k), quiet(v_BKMD, idle_k)


def _plan(ranges: KeyRanges, q_BHND: Tensor, k_BKMD: Tensor, way: _Way) -> tuple[Schedule, Biases]:
    """The schedule for inputs of these shapes."""
    batch, heads, queries, width = q_BHND.shape
    key_heads = k_BKMD.shape[1]
    on_cpu = q_BHND.device.type == "cpu" and can_share_threads()
    threads = torch.get_num_threads() if on_cpu else 1
    plans = _plans.setdefault(ranges, {})
    row_steps, key_steps = steps_of(q_BHND), steps_of(k_BKMD)
    name = (batch, heads, key_heads, width, threads, way, row_steps, key_steps)
    if name not in plans:
        lo_GNm, hi_GNm, group_BH = (
            x.cpu().numpy().astype("int64")
            for x in (ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH.expand(batch, heads))
        )
        pairs = (hi_GNm - lo_GNm).sum(axis=(1, 2))[group_BH].sum()
        parts = min(threads, batch * key_heads) if threads > 1 else 1
        if pairs * width < _WORTH_THREADS:
            parts = 1
        leaf = min(_LEAF if heads == key_heads else _LEAF // 2, queries)
        tile = leaf * way.leaves if queries >= leaf * way.leaves else leaf
        schedule = build_schedule(
            lo_GNm,
            hi_GNm,
            group_BH,
            keys=ranges.keys,
            key_heads=key_heads,
            tile=tile,
            leaf=leaf,
            job=way.job,
            area=way.area * (threads // parts),
            parts=parts,
            row_steps=row_steps,
            key_steps=key_steps,
            # Elsewhere sums over repeated rows would come in any order.
            costs=way.costs if q_BHND.device.type == "cpu" else None,
        )
        plans[name] = schedule, Biases()
    return plans[name]
