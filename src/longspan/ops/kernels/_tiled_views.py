"""The batches of a schedule as strided views, their logits and their masks.

Axes: C jobs of a batch, H heads of a bundle, T query rows (of all heads of a bundle where there
is no H), S keys of a job, R and L all query and key rows laid end to end, D head width, m ranges
per query.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.ops.kernels._tiled_schedule import Batch, Run
from longspan.ops.ranges import KeyRanges


def query_rows(x_RD: Tensor, batch: Batch, queries: int) -> Tensor:
    """View of the batch's rows [C, H, T, D]; heads lie ``queries`` rows apart."""
    width = x_RD.shape[1]
    return x_RD.as_strided(
        (batch.count, batch.heads, batch.run.rows, width),
        (batch.row_step * width, queries * width, width, 1),
        x_RD.storage_offset() + batch.row * width,
    )


def key_rows(x_LD: Tensor, batch: Batch, start: int = 0, stop: int | None = None) -> Tensor:
    """View [C, stop - start, D] of each job's keys (or values) from ``start`` to ``stop`` of its
    span.

    Jobs may overlap: only write where they do not.
    """
    width = x_LD.shape[1]
    stop = batch.run.span if stop is None else stop
    return x_LD.as_strided(
        (batch.count, stop - start, width),
        (batch.key_step * width, width, 1),
        x_LD.storage_offset() + (batch.key + start) * width,
    )


def add_to_key_rows(
    grad_LD: Tensor, w_CTS: Tensor, x_CTD: Tensor, batch: Batch, alpha: float
) -> None:
    """Add alpha w^T x to the rows of the batch's keys, whose spans may overlap."""
    span, step = batch.run.span, batch.key_step
    if batch.count > 1 and step == 0:
        # All jobs share their keys: they are one taller job.
        w_1TS, x_1TD = w_CTS.flatten(0, 1)[None], x_CTD.flatten(0, 1)[None]
        key_rows(grad_LD, batch)[:1].baddbmm_(w_1TS.transpose(1, 2), x_1TD, alpha=alpha)
        return
    # Slices no wider than a step fall on disjoint rows, whichever jobs they belong to.
    width = span if batch.count == 1 else min(step, span)
    for start in range(0, span, width):
        stop = min(start + width, span)
        w_CST = w_CTS[..., start:stop].transpose(1, 2)
        key_rows(grad_LD, batch, start, stop).baddbmm_(w_CST, x_CTD, alpha=alpha)


class Logits:
    """Masked logits of one batch after another, in a work buffer; masks are kept while a run
    lasts."""

    def __init__(self, ranges: KeyRanges, area: int, factor: float, like: Tensor) -> None:
        """Logits are ``factor`` q k; ``area`` is the most of them in any batch."""
        self._ranges = ranges
        self._factor = factor
        self._buffer = like.new_empty(area)
        self._run: Run | None = None
        self._biases: list[tuple[slice, Tensor]] = []

    def __call__(self, q_CTD: Tensor, k_CSD: Tensor, batch: Batch) -> Tensor:
        """Logits [C, T, S], -inf where a row does not see a key."""
        shape = (batch.count, q_CTD.shape[1], batch.run.span)
        s_CTS = self._buffer[: math.prod(shape)].view(shape)
        k_CDS = k_CSD.transpose(1, 2)
        torch.baddbmm(s_CTS, q_CTD, k_CDS, beta=0, alpha=self._factor, out=s_CTS)
        if self._run is not batch.run:
            self._run, self._biases = batch.run, self._masks(batch.run, batch.group)
        s_CHTS = s_CTS.unflatten(1, (batch.heads, batch.run.rows))
        for columns, bias_TS in self._biases:
            s_CHTS[..., columns].add_(bias_TS)
        return s_CTS

    def _masks(self, run: Run, group: int) -> list[tuple[slice, Tensor]]:
        rows = slice(run.row, run.row + run.rows)
        lo_Tm1 = self._ranges.lo_GNm[group, rows, :, None] - run.key
        hi_Tm1 = self._ranges.hi_GNm[group, rows, :, None] - run.key
        masks: list[tuple[slice, Tensor]] = []
        for start, stop in ((0, run.left), (run.right, run.span)):
            if start < stop:
                column_S = torch.arange(start, stop, dtype=torch.int32, device=lo_Tm1.device)
                visible_TS = ((lo_Tm1 <= column_S) & (column_S < hi_Tm1)).any(1)
                bias_TS = self._buffer.new_zeros(visible_TS.shape)
                masks.append((slice(start, stop), bias_TS.masked_fill_(~visible_TS, -torch.inf)))
        return masks
