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

from longspan.ops.kernels._tiled_schedule import Batch, Schedule, build_schedule
from longspan.ops.ranges import KeyRanges

# Vector units compute powers of two faster than powers of e, so logits carry this factor and
# exp2 takes exp's place.
_LOG2E = math.log2(math.e)
# Scores of a batch per thread: large enough to feed the cores, small enough to stay in their
# caches.
_AREA_PER_THREAD = 1 << 18

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
        schedule = _schedule(ranges, q_BHND, k_BKMD)
        work = _Work(schedule, ranges, q_BHND, k_BKMD, scale)
        out_RD, lse_R = _forward(work, _rows(q_BHND), _rows(k_BKMD), _rows(v_BKMD))
        out_BHND = out_RD.view(*q_BHND.shape[:3], -1).to(q_BHND.dtype)
        lse_BHN = lse_R.view(q_BHND.shape[:3])
        ctx.save_for_backward(q_BHND, k_BKMD, v_BKMD, out_BHND, lse_BHN)
        ctx.ranges, ctx.scale, ctx.schedule = ranges, scale, schedule
        return out_BHND, lse_BHN

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        dout_BHND, dlse_BHN = grad_outputs
        q_BHND, k_BKMD, v_BKMD, out_BHND, lse_BHN = ctx.saved_tensors
        empty_R = lse_BHN.reshape(-1).isneginf()
        dout_RD = _rows(dout_BHND)
        delta_R = (dout_RD * _rows(out_BHND)).sum(-1) - dlse_BHN.reshape(-1)
        grads = _backward(
            _Work(ctx.schedule, ctx.ranges, q_BHND, k_BKMD, ctx.scale),
            _rows(q_BHND),
            _rows(k_BKMD),
            _rows(v_BKMD),
            dout_RD,
            lse_BHN.reshape(-1).masked_fill(empty_R, 0.0).mul_(_LOG2E),
            delta_R.masked_fill_(empty_R, 0.0),
            tuple(ctx.needs_input_grad[:3]),
        )
        dq, dk, dv = (
            None if grad is None else grad.view(like.shape).to(like.dtype)
            for grad, like in zip(grads, (q_BHND, k_BKMD, v_BKMD), strict=True)
        )
        return dq, dk, dv, None, None


def _schedule(ranges: KeyRanges, q_BHND: Tensor, k_BKMD: Tensor) -> Schedule:
    batch, heads, queries, _ = q_BHND.shape
    key_heads = k_BKMD.shape[1]
    threads = torch.get_num_threads()
    cached = _schedules.setdefault(ranges, {})
    key = (batch, heads, key_heads, threads)
    if key not in cached:
        # Low tiles waste few scores at the edges; bundled heads make up for the height that
        # matrix products want.
        tile = 64 if heads == key_heads else 32
        cached[key] = build_schedule(
            ranges.lo_GNm.cpu().numpy().astype("int64"),
            ranges.hi_GNm.cpu().numpy().astype("int64"),
            ranges.group_BH.cpu().expand(batch, heads).numpy(),
            ranges.keys,
            key_heads,
            max(1, min(tile, queries)),
            threads * _AREA_PER_THREAD,
        )
    return cached[key]


def _rows(x_BHND: Tensor) -> Tensor:
    """All rows laid end to end, in the dtype that is computed in."""
    work = torch.promote_types(x_BHND.dtype, torch.float32)
    return x_BHND.to(work).contiguous().view(-1, x_BHND.shape[-1])


class _Work:
    """What forward and backward share: views of the batches, their logits, and the masks."""

    def __init__(
        self, schedule: Schedule, ranges: KeyRanges, q_BHND: Tensor, k_BKMD: Tensor, scale: float
    ) -> None:
        self.schedule = schedule
        self.queries = q_BHND.shape[2]
        self.scale = scale
        self._ranges = ranges
        self._run: object = None
        self._biases: list[tuple[slice, Tensor]] = []

    def scores(self, like: Tensor) -> Tensor:
        """A work buffer that holds the scores of any batch."""
        return like.new_empty(self.schedule.area)

    def query_rows(self, x_RD: Tensor, batch: Batch) -> Tensor:
        """View of the batch's rows [C, heads, rows, D]."""
        width = x_RD.shape[1]
        return x_RD.as_strided(
            (batch.count, batch.heads, batch.run.rows, width),
            (batch.row_step * width, self.queries * width, width, 1),
            x_RD.storage_offset() + batch.row * width,
        )

    def key_rows(self, x_LD: Tensor, batch: Batch) -> Tensor:
        """View of the batch's keys or values [C, S, D]; spans may overlap, so read only."""
        return key_slice(x_LD, batch, 0, batch.run.span)

    def logits(self, buffer: Tensor, q_CTD: Tensor, k_CSD: Tensor, batch: Batch) -> Tensor:
        """Masked logits [C, T, S] in units of log 2."""
        shape = (batch.count, q_CTD.shape[1], batch.run.span)
        s_CTS = buffer[: math.prod(shape)].view(shape)
        torch.baddbmm(
            s_CTS, q_CTD, k_CSD.transpose(1, 2), beta=0, alpha=self.scale * _LOG2E, out=s_CTS
        )
        heads_CHTS = s_CTS.view(batch.count, batch.heads, batch.run.rows, batch.run.span)
        for columns, bias_TS in self._masks(batch, s_CTS.dtype):
            heads_CHTS[..., columns].add_(bias_TS)
        return s_CTS

    def _masks(self, batch: Batch, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
        run = batch.run
        if self._run is not run:
            self._run = run
            rows = slice(run.row, run.row + run.rows)
            lo_Tm1 = self._ranges.lo_GNm[batch.group, rows, :, None] - run.key
            hi_Tm1 = self._ranges.hi_GNm[batch.group, rows, :, None] - run.key
            self._biases = []
            for start, stop in ((0, run.left), (run.right, run.span)):
                if start < stop:
                    column_S = torch.arange(start, stop, dtype=torch.int32, device=lo_Tm1.device)
                    visible_TS = ((lo_Tm1 <= column_S) & (column_S < hi_Tm1)).any(1)
                    bias_TS = torch.zeros(visible_TS.shape, dtype=dtype, device=lo_Tm1.device)
                    self._biases.append(
                        (slice(start, stop), bias_TS.masked_fill_(~visible_TS, -torch.inf))
                    )
        return self._biases


def key_slice(x_LD: Tensor, batch: Batch, start: int, stop: int) -> Tensor:
    """View [C, stop - start, D] of columns ``start`` to ``stop`` of each job's span."""
    width = x_LD.shape[1]
    return x_LD.as_strided(
        (batch.count, stop - start, width),
        (batch.key_step * width, width, 1),
        x_LD.storage_offset() + (batch.key + start) * width,
    )


def _forward(work: _Work, q_RD: Tensor, k_LD: Tensor, v_LD: Tensor) -> tuple[Tensor, Tensor]:
    out_RD = q_RD.new_zeros(len(q_RD), v_LD.shape[1])
    lse_R1 = q_RD.new_full((len(q_RD), 1), -torch.inf)
    buffer = work.scores(q_RD)
    lowest = torch.finfo(q_RD.dtype).min
    tiny = torch.finfo(q_RD.dtype).tiny
    for batch in work.schedule.batches():
        q_CHTD = work.query_rows(q_RD, batch)
        s_CTS = work.logits(buffer, q_CHTD.flatten(1, 2), work.key_rows(k_LD, batch), batch)
        # A row that sees none of these keys has maximum -inf: a finite stand-in turns its
        # weights into 0, not NaN.
        max_CT1 = s_CTS.amax(-1, keepdim=True).clamp_min_(lowest)
        p_CTS = torch.exp2(s_CTS.sub_(max_CT1), out=s_CTS)
        sum_CT1 = p_CTS.sum(-1, keepdim=True)
        o_CHTD = torch.bmm(p_CTS, work.key_rows(v_LD, batch)).view(*q_CHTD.shape[:3], -1)
        lse_CHT1 = max_CT1.add_(sum_CT1.log2()).div_(_LOG2E).view(*q_CHTD.shape[:3], 1)
        sum_CHT1 = sum_CT1.clamp_min_(tiny).view_as(lse_CHT1)
        out_CHTD, old_CHT1 = work.query_rows(out_RD, batch), work.query_rows(lse_R1, batch)
        if batch.run.wave == 0:
            torch.div(o_CHTD, sum_CHT1, out=out_CHTD)
            old_CHT1.copy_(lse_CHT1)
        else:
            # Where neither side has a key the difference is NaN, and any weight will do between
            # zeros.
            weight_CHT1 = torch.sigmoid(lse_CHT1 - old_CHT1).nan_to_num_(0.0)
            out_CHTD.lerp_(o_CHTD.div_(sum_CHT1), weight_CHT1)
            old_CHT1.copy_(torch.logaddexp(old_CHT1, lse_CHT1))
    return out_RD, lse_R1[:, 0]


def _backward(
    work: _Work,
    q_RD: Tensor,
    k_LD: Tensor,
    v_LD: Tensor,
    dout_RD: Tensor,
    lse_R: Tensor,
    delta_R: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dq_RD, dk_LD, dv_LD = (
        torch.zeros_like(x) if need else None
        for x, need in zip((q_RD, k_LD, v_LD), needs, strict=True)
    )
    p_buffer, ds_buffer = work.scores(q_RD), work.scores(q_RD)
    for batch in work.schedule.batches():
        q_CTD = work.query_rows(q_RD, batch).flatten(1, 2)
        dout_CTD = work.query_rows(dout_RD, batch).flatten(1, 2)
        lse_CT1 = work.query_rows(lse_R[:, None], batch).flatten(1, 2)
        k_CSD = work.key_rows(k_LD, batch)
        s_CTS = work.logits(p_buffer, q_CTD, k_CSD, batch)
        p_CTS = torch.exp2(s_CTS.sub_(lse_CT1), out=s_CTS)
        if dv_LD is not None:
            _add_to_keys(dv_LD, p_CTS, dout_CTD, batch, 1.0)
        if dq_RD is None and dk_LD is None:
            continue
        ds_CTS = ds_buffer[: p_CTS.numel()].view_as(p_CTS)
        torch.bmm(dout_CTD, work.key_rows(v_LD, batch).transpose(1, 2), out=ds_CTS)
        delta_CT1 = work.query_rows(delta_R[:, None], batch).flatten(1, 2)
        ds_CTS.sub_(delta_CT1).mul_(p_CTS)
        if dq_RD is not None:
            dq_CHTD = work.query_rows(dq_RD, batch)
            dq_CHTD.add_(torch.bmm(ds_CTS, k_CSD).view_as(dq_CHTD), alpha=work.scale)
        if dk_LD is not None:
            _add_to_keys(dk_LD, ds_CTS, q_CTD, batch, work.scale)
    return dq_RD, dk_LD, dv_LD


def _add_to_keys(
    grad_LD: Tensor, w_CTS: Tensor, x_CTD: Tensor, batch: Batch, alpha: float
) -> None:
    """Add alpha w^T x to the rows of the batch's keys, whose spans may overlap."""
    span, step = batch.run.span, batch.key_step
    if batch.count > 1 and step == 0:
        # All jobs share their keys: they are one taller job.
        w_CTS, x_CTD = w_CTS.flatten(0, 1)[None], x_CTD.flatten(0, 1)[None]
        grad_CSD = key_slice(grad_LD, batch, 0, span)[:1]
        grad_CSD.baddbmm_(w_CTS.transpose(1, 2), x_CTD, alpha=alpha)
        return
    # Slices one step wide fall on disjoint rows, whichever jobs they belong to.
    width = span if batch.count == 1 else min(step, span)
    for start in range(0, span, width):
        stop = min(start + width, span)
        grad_CSD = key_slice(grad_LD, batch, start, stop)
        grad_CSD.baddbmm_(w_CTS[..., start:stop].transpose(1, 2), x_CTD, alpha=alpha)
