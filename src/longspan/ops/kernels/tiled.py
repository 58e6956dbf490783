"""Tiled attention in plain PyTorch: computes the tiles that the ranges touch, on any device,
with its own backward.

FlashAttention's recurrence (Dao, arXiv 2307.08691, Algorithms 1 and 2) on batches of equal
tiles: for a tile of query rows and a span of keys

    S = scale Q K^T + mask,   m = rowmax S,   O = exp(S - m) V,   lse = m + log rowsum exp(S - m)

and spans of one tile are joined by O <- O + sigmoid(lse' - lse) (O' - O), lse <- logaddexp(lse,
lse'). The backward recomputes P = exp(S - lse) and, with D = rowsum(dO * O) - dlse,

    dV += P^T dO,   dS = P * (dO V^T - D),   dQ += scale dS K,   dK += scale dS^T Q.

Time O(visible pairs * D), memory O(N D) beyond the inputs plus a work buffer of fixed size. Half
precision is computed in float32.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width; R = B H N and
L = B K M rows laid end to end; C jobs of a batch, T rows and S keys of a job (T counts every
head of a bundle), G range groups.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.ops.kernels._tiled_schedule import Schedule, build_schedule
from longspan.ops.kernels._tiled_views import Logits, add_to_key_rows, key_rows, query_rows
from longspan.ops.kernels._tiled_workers import can_share_threads, run_parts
from longspan.ops.ranges import KeyRanges

# Vector units compute powers of two faster than powers of e, so logits carry this factor and
# exp2 takes exp's place.
_LOG2E = math.log2(math.e)
# Scores of a batch per thread: large enough to feed the cores, small enough to stay in their
# caches.
_AREA_PER_THREAD = 1 << 18
# Calls with fewer multiplications than this are over before other threads have started.
_WORTH_THREADS = 1 << 27

_schedules: WeakKeyDictionary[KeyRanges, dict[tuple[int, ...], Schedule]] = WeakKeyDictionary()


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
        out [B, H, N, Dv] in the dtype of ``q``, and lse [B, H, N] in float32 (float64 for
        float64 inputs). Both are differentiable once.
    """
    return _Tiled.apply(q_BHND, k_BKMD, v_BKMD, ranges, scale)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
    ) -> tuple[Tensor, Tensor]:
        call = _Call(ranges, q_BHND, k_BKMD, scale)
        # Autocast would round the logits.
        with torch.autocast(q_BHND.device.type, enabled=False):
            out_RD, lse_R1 = call.forward(_rows(q_BHND), _rows(k_BKMD), _rows(v_BKMD))
        out_BHND = out_RD.view(*q_BHND.shape[:3], -1).to(q_BHND.dtype)
        lse_BHN = lse_R1.view(q_BHND.shape[:3])
        ctx.save_for_backward(q_BHND, k_BKMD, v_BKMD, out_BHND, lse_BHN)
        ctx.call = call
        return out_BHND, lse_BHN

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        dout_BHND, dlse_BHN = grad_outputs
        q_BHND, k_BKMD, v_BKMD, out_BHND, lse_BHN = ctx.saved_tensors
        dout_RD = _rows(dout_BHND)
        lse_R1, dlse_R1 = lse_BHN.reshape(-1, 1), dlse_BHN.reshape(-1, 1)
        delta_R1 = (dout_RD * _rows(out_BHND)).sum(-1, keepdim=True) - dlse_R1
        # Rows that see nothing have only weights of zero: whatever reaches them must stay finite.
        empty_R1 = lse_R1.isneginf()
        with torch.autocast(q_BHND.device.type, enabled=False):
            grads = ctx.call.backward(
                _rows(q_BHND),
                _rows(k_BKMD),
                _rows(v_BKMD),
                dout_RD,
                lse_R1.masked_fill(empty_R1, 0.0).mul_(_LOG2E),
                delta_R1.masked_fill_(empty_R1, 0.0),
                ctx.needs_input_grad[:3],
            )
        dq, dk, dv = (
            None if grad is None else grad.view(like.shape).to(like.dtype)
            for grad, like in zip(grads, (q_BHND, k_BKMD, v_BKMD), strict=True)
        )
        return dq, dk, dv, None, None


def _rows(x_BHND: Tensor) -> Tensor:
    """All rows laid end to end, in the dtype that is computed in."""
    work = torch.promote_types(x_BHND.dtype, torch.float32)
    return x_BHND.to(work).contiguous().view(-1, x_BHND.shape[-1])


class _Call:
    """The schedule of one call and the two passes over it."""

    def __init__(self, ranges: KeyRanges, q_BHND: Tensor, k_BKMD: Tensor, scale: float) -> None:
        self._ranges = ranges
        self._schedule = _schedule(ranges, q_BHND, k_BKMD)
        self._queries = q_BHND.shape[2]
        self._scale = scale

    def forward(self, q_RD: Tensor, k_LD: Tensor, v_LD: Tensor) -> tuple[Tensor, Tensor]:
        """Output [R, Dv] and lse [R, 1]."""
        out_RD = q_RD.new_zeros(len(q_RD), v_LD.shape[1])
        lse_R1 = q_RD.new_full((len(q_RD), 1), -torch.inf)
        lowest, tiny = torch.finfo(q_RD.dtype).min, torch.finfo(q_RD.dtype).tiny

        def part(i: int) -> None:
            logits = self._logits(q_RD)
            for batch in self._schedule.batches(i):
                q_CHTD = query_rows(q_RD, batch, self._queries)
                shape_CHT = q_CHTD.shape[:3]
                s_CTS = logits(q_CHTD.flatten(1, 2), key_rows(k_LD, batch), batch)
                # A row that sees none of these keys has maximum -inf: a finite stand-in turns
                # its weights into 0, not NaN.
                max_CT1 = s_CTS.amax(-1, keepdim=True).clamp_min_(lowest)
                p_CTS = torch.exp2(s_CTS.sub_(max_CT1), out=s_CTS)
                sum_CT1 = p_CTS.sum(-1, keepdim=True)
                o_CHTD = torch.bmm(p_CTS, key_rows(v_LD, batch)).view(*shape_CHT, -1)
                lse_CHT1 = max_CT1.add_(sum_CT1.log2()).div_(_LOG2E).view(*shape_CHT, 1)
                sum_CHT1 = sum_CT1.clamp_min_(tiny).view(*shape_CHT, 1)
                out_CHTD = query_rows(out_RD, batch, self._queries)
                old_CHT1 = query_rows(lse_R1, batch, self._queries)
                if batch.run.wave == 0:
                    torch.div(o_CHTD, sum_CHT1, out=out_CHTD)
                    old_CHT1.copy_(lse_CHT1)
                else:
                    # Where neither side has a key the difference is NaN, and any weight will do
                    # between zeros.
                    weight_CHT1 = torch.sigmoid(lse_CHT1 - old_CHT1).nan_to_num_(0.0)
                    out_CHTD.lerp_(o_CHTD.div_(sum_CHT1), weight_CHT1)
                    old_CHT1.copy_(torch.logaddexp(old_CHT1, lse_CHT1))

        run_parts(part, len(self._schedule.parts))
        return out_RD, lse_R1

    def backward(
        self,
        q_RD: Tensor,
        k_LD: Tensor,
        v_LD: Tensor,
        dout_RD: Tensor,
        lse_R1: Tensor,
        delta_R1: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the inputs that need one; lse is in units of log 2."""
        dq_RD, dk_LD, dv_LD = (
            torch.zeros_like(x) if need else None
            for x, need in zip((q_RD, k_LD, v_LD), needs, strict=True)
        )

        def part(i: int) -> None:
            logits = self._logits(q_RD)
            buffer = q_RD.new_empty(self._schedule.area)
            for batch in self._schedule.batches(i):
                q_CTD, dout_CTD, lse_CT1, delta_CT1 = (
                    query_rows(x, batch, self._queries).flatten(1, 2)
                    for x in (q_RD, dout_RD, lse_R1, delta_R1)
                )
                k_CSD = key_rows(k_LD, batch)
                s_CTS = logits(q_CTD, k_CSD, batch)
                p_CTS = torch.exp2(s_CTS.sub_(lse_CT1), out=s_CTS)
                if dv_LD is not None:
                    add_to_key_rows(dv_LD, p_CTS, dout_CTD, batch, 1.0)
                if dq_RD is None and dk_LD is None:
                    continue
                ds_CTS = buffer[: p_CTS.numel()].view_as(p_CTS)
                torch.bmm(dout_CTD, key_rows(v_LD, batch).transpose(1, 2), out=ds_CTS)
                ds_CTS.sub_(delta_CT1).mul_(p_CTS)
                if dq_RD is not None:
                    dq_CHTD = query_rows(dq_RD, batch, self._queries)
                    dq_CHTD.add_(torch.bmm(ds_CTS, k_CSD).view_as(dq_CHTD), alpha=self._scale)
                if dk_LD is not None:
                    add_to_key_rows(dk_LD, ds_CTS, q_CTD, batch, self._scale)

        run_parts(part, len(self._schedule.parts))
        return dq_RD, dk_LD, dv_LD

    def _logits(self, like: Tensor) -> Logits:
        return Logits(self._ranges, self._schedule.area, self._scale * _LOG2E, like)


def _schedule(ranges: KeyRanges, q_BHND: Tensor, k_BKMD: Tensor) -> Schedule:
    batch, heads, queries, width = q_BHND.shape
    key_heads = k_BKMD.shape[1]
    threads = torch.get_num_threads()
    shared = q_BHND.device.type == "cpu" and can_share_threads()
    cached = _schedules.setdefault(ranges, {})
    key = (batch, heads, key_heads, threads if shared else 0)
    if key not in cached:
        lo_GNm, hi_GNm, group_BH = (
            x.cpu().numpy().astype("int64")
            for x in (ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH.expand(batch, heads))
        )
        pairs = (hi_GNm - lo_GNm).sum(axis=(1, 2))[group_BH].sum()
        parts = threads if shared and pairs * width > _WORTH_THREADS else 1
        # Low tiles waste few scores at the edges; bundled heads make up for the height that
        # matrix products want.
        tile = 64 if heads == key_heads else 32
        cached[key] = build_schedule(
            lo_GNm,
            hi_GNm,
            group_BH,
            keys=ranges.keys,
            key_heads=key_heads,
            tile=max(1, min(tile, queries)),
            area=threads * _AREA_PER_THREAD // min(parts, batch * key_heads),
            parts=parts,
        )
    return cached[key]
