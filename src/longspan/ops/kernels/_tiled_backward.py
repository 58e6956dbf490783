"""Backward pass of the tiled kernel: weights recomputed from lse, gradients of shared keys added
job by job.

    P = exp(S - lse),    dV += P^T dO,    dS = P * (dO V^T - delta),    dQ += scale dS K,    dK
    += scale dS^T Q

Axes: as in _tiled_views; J = A C jobs of a batch, T rows of every head of a bundle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.ops.kernels._tiled_schedule import Batch, Schedule
from longspan.ops.kernels._tiled_views import Biases, key_rows, query_rows
from longspan.ops.kernels._tiled_workers import run_parts

# Vector units compute powers of two faster than powers of e, so logits carry this factor here.
_LOG2E = math.log2(math.e)


def backward(
    q_RD: Tensor,
    k_LD: Tensor,
    v_LD: Tensor,
    dout_RD: Tensor,
    lse_R1: Tensor,
    delta_R1: Tensor,
    schedule: Schedule,
    biases: Biases,
    queries: int,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, those that are needed.

    Args:
        q_RD, k_LD, v_LD, dout_RD: rows laid end to end, in the dtype that is computed in.
        lse_R1: finite, also where a row sees nothing.
        delta_R1: rowsum(dO * O) - dlse.
    """
    dq_RD, dk_LD, dv_LD = (
        torch.zeros_like(x) if need else None
        for x, need in zip((q_RD, k_LD, v_LD), needs, strict=True)
    )
    lse_R1 = lse_R1 * _LOG2E

    def part(i: int) -> None:
        p_buffer, ds_buffer = q_RD.new_empty(2, schedule.area)
        for batch in schedule.batches(i, grid=False):
            q_JTD, dout_JTD, lse_JT1, delta_JT1 = (
                query_rows(x, batch, queries).flatten(0, 1).flatten(1, 2)
                for x in (q_RD, dout_RD, lse_R1, delta_R1)
            )
            k_JSD, v_JSD = key_rows(k_LD, batch).flatten(0, 1), key_rows(v_LD, batch).flatten(0, 1)
            shape = (*q_JTD.shape[:2], batch.run.span)
            p_JTS, ds_JTS = (x[: math.prod(shape)].view(shape) for x in (p_buffer, ds_buffer))

            torch.baddbmm(
                p_JTS, q_JTD, k_JSD.transpose(1, 2), beta=0, alpha=scale * _LOG2E, out=p_JTS
            )
            p_JHTS = p_JTS.unflatten(1, (batch.heads, batch.run.rows))
            mask = batch.run.mask
            if mask is not None:
                left_TS, right_TS = biases.edges(mask, q_RD)
                p_JHTS[..., : mask.left].add_(left_TS)
                p_JHTS[..., mask.right :].add_(right_TS)
            p_JTS.sub_(lse_JT1).exp2_()
            if dv_LD is not None:
                _add_to_keys(dv_LD, p_JTS, dout_JTD, batch, 1.0)
            if dq_RD is None and dk_LD is None:
                continue
            torch.bmm(dout_JTD, v_JSD.transpose(1, 2), out=ds_JTS)
            ds_JTS.sub_(delta_JT1).mul_(p_JTS)
            if dq_RD is not None:
                dq_ACHTD = query_rows(dq_RD, batch, queries)
                dq_ACHTD.add_(torch.bmm(ds_JTS, k_JSD).view_as(dq_ACHTD), alpha=scale)
            if dk_LD is not None:
                _add_to_keys(dk_LD, ds_JTS, q_JTD, batch, scale)

    run_parts(part, len(schedule.parts))
    return dq_RD, dk_LD, dv_LD


def _add_to_keys(
    grad_LD: Tensor, w_JTS: Tensor, x_JTD: Tensor, batch: Batch, alpha: float
) -> None:
    """Add alpha w^T x to the rows of the batch's keys."""
    jobs = len(w_JTS)
    step = batch.steps[1] if batch.count > 1 else batch.lane_steps[1]
    if jobs > 1 and step == 0:
        # All jobs share their keys: they are one taller job.
        w_JTS, x_JTD, jobs = w_JTS.flatten(0, 1)[None], x_JTD.flatten(0, 1)[None], 1
    grad_JSD = key_rows(grad_LD, batch).flatten(0, 1)[:jobs]
    if jobs == 1 or step >= batch.run.span:
        grad_JSD.baddbmm_(w_JTS.transpose(1, 2), x_JTD, alpha=alpha)
    else:
        # Jobs on overlapping keys take turns.
        for grad_SD, w_TS, x_TD in zip(grad_JSD, w_JTS, x_JTD, strict=True):
            grad_SD.addmm_(w_TS.T, x_TD, alpha=alpha)
