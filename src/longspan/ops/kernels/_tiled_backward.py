"""Backward pass of the tiled kernel: weights recomputed from lse, gradients of shared keys added
job by job.

    P = exp(S - lse),    dV += P^T dO,    dS = P * (dO V^T - delta),    dQ += scale dS K,    dK
    += scale dS^T Q

Axes: as in _tiled_views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.kernels._tiled_schedule import Batch, Schedule
from longspan.ops.kernels._tiled_views import (
    LOG2E,
    Biases,
    add_product,
    key_rows,
    logits,
    query_rows,
)
from longspan.ops.workers import run_parts


def backward(
    q_RD: Tensor,
    k_LD: Tensor,
    v_LD: Tensor,
    dout_RD: Tensor,
    lse_R1: Tensor,
    delta_R1: Tensor,
    schedule: Schedule,
    biases: Biases,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, those that are needed.

    Args:
        q_RD, k_LD, v_LD, dout_RD: rows as they lie in memory, in the dtype that is computed in.
        lse_R1: finite, also where a row sees nothing.
        delta_R1: rowsum(dO * O) - dlse.
    """
    news = (torch.empty_like if schedule.covers else torch.zeros_like, *[torch.zeros_like] * 2)
    dq_RD, dk_LD, dv_LD = (
        new(x) if need else None
        for new, x, need in zip(news, (q_RD, k_LD, v_LD), needs, strict=True)
    )
    lse_R1 = lse_R1 * LOG2E

    def part(i: int) -> None:
        p_buffer, ds_buffer = q_RD.new_empty(2, schedule.area)
        for batch in schedule.batches(i, apart=True):
            q_JTD, dout_JTD, lse_JT1, delta_JT1 = (
                query_rows(x, batch).flatten(1, 2) for x in (q_RD, dout_RD, lse_R1, delta_R1)
            )
            k_JSD, v_JSD = key_rows(k_LD, batch), key_rows(v_LD, batch)
            p_JTS = logits(q_JTD, k_JSD, batch, biases, scale, p_buffer)
            p_JTS.sub_(lse_JT1).exp2_()
            if dv_LD is not None:
                _add_to_keys(dv_LD, p_JTS, dout_JTD, batch, 1.0)
            if dq_RD is None and dk_LD is None:
                continue
            ds_JTS = ds_buffer[: p_JTS.numel()].view_as(p_JTS)
            torch.bmm(dout_JTD, v_JSD.transpose(1, 2), out=ds_JTS)
            ds_JTS.sub_(delta_JT1).mul_(p_JTS)
            if dq_RD is not None:
                first = schedule.covers and batch.run.wave == 0
                add_product(dq_RD, ds_JTS, k_JSD, batch, alpha=scale, first=first)
            if dk_LD is not None:
                _add_to_keys(dk_LD, ds_JTS, q_JTD, batch, scale)

    run_parts(part, len(schedule.parts))
    return dq_RD, dk_LD, dv_LD


def _add_to_keys(
    grad_LD: Tensor, w_JTS: Tensor, x_JTD: Tensor, batch: Batch, alpha: float
) -> None:
    """Add alpha w^T x to the rows of the batch's keys."""
    if batch.gathered_X is not None:
        new_XD = torch.bmm(w_JTS.transpose(1, 2), x_JTD).flatten(0, 1)
        grad_LD.index_add_(0, torch.from_numpy(batch.gathered_X), new_XD, alpha=alpha)
        return
    grad_JSD = key_rows(grad_LD, batch)
    if batch.key_step == 0:
        # All jobs share their keys: they are one taller job.
        w_JTS, x_JTD, grad_JSD = w_JTS.flatten(0, 1)[None], x_JTD.flatten(0, 1)[None], grad_JSD[:1]
    grad_JSD.baddbmm_(w_JTS.transpose(1, 2), x_JTD, alpha=alpha)
