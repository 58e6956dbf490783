"""Batches of a schedule as strided views: nothing is gathered, nothing copied.

Axes: A lanes and C jobs of a batch, H heads of a bundle, T query rows of a job, S its keys, D
width; R and L all query and all key rows laid end to end; m ranges per query.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longspan.ops.kernels._tiled_schedule import Batch, Mask

# Numbers that the masks of one schedule may keep.
_ROOM = 1 << 22


def query_rows(x_RD: Tensor, batch: Batch, queries: int) -> Tensor:
    """The batch's rows [A, C, H, T, D]; heads lie ``queries`` rows apart."""
    width = x_RD.shape[1]
    return x_RD.as_strided(
        (batch.lanes, batch.count, batch.heads, batch.run.rows, width),
        (batch.lane_steps[0] * width, batch.steps[0] * width, queries * width, width, 1),
        x_RD.storage_offset() + batch.row * width,
    )


def key_rows(x_LD: Tensor, batch: Batch, start: int = 0, stop: int | None = None) -> Tensor:
    """The batch's keys or values [A, C, S, D], or those from ``start`` to ``stop`` of each span.

    Jobs may overlap: only write where they do not.
    """
    width = x_LD.shape[1]
    stop = batch.run.span if stop is None else stop
    return x_LD.as_strided(
        (batch.lanes, batch.count, stop - start, width),
        (batch.lane_steps[1] * width, batch.steps[1] * width, width, 1),
        x_LD.storage_offset() + (batch.key + start) * width,
    )


class Biases:
    """What masks add to logits, 0 or -inf; kept from call to call as far as they are small.

    A regular pattern has a handful of masks. Irregular ranges have one for every job, which are
    then made again each time.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
        self._room = _ROOM

    def edges(self, mask: Mask, like: Tensor) -> tuple[Tensor, ...]:
        """Bias [T, left] on the first columns and [T, span - right] on the last."""
        return self._keep(
            (mask, like.dtype, like.device),
            lambda: (_bias(mask, 0, mask.left, like), _bias(mask, mask.right, mask.span, like)),
        )

    def whole(self, mask: Mask, heads: int, like: Tensor) -> tuple[Tensor, ...]:
        """Bias [H T, S], and -inf for the rows [H T] that see nothing, if there are any."""
        return self._keep(
            (mask, heads, like.dtype, like.device), lambda: _whole(mask, heads, like)
        )

    def _keep(
        self, name: tuple[object, ...], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        found = self._kept.get(name)
        if found is None:
            found = make()
            size = sum(x.numel() for x in found)
            if size <= self._room:
                self._room -= size
                self._kept[name] = found
        return found


def _whole(mask: Mask, heads: int, like: Tensor) -> tuple[Tensor, ...]:
    bias_TS = like.new_zeros(len(mask.lo_Tm), mask.span)
    bias_TS[:, : mask.left] = _bias(mask, 0, mask.left, like)
    bias_TS[:, mask.right :] = _bias(mask, mask.right, mask.span, like)
    bias_TS = bias_TS.repeat(heads, 1)
    if mask.left < mask.right:
        return (bias_TS,)
    return bias_TS, bias_TS.amax(-1)


def _bias(mask: Mask, start: int, stop: int, like: Tensor) -> Tensor:
    lo_Tm1, hi_Tm1 = (
        torch.from_numpy(x).to(like.device)[..., None] for x in (mask.lo_Tm, mask.hi_Tm)
    )
    column_S = torch.arange(start, stop, dtype=torch.int32, device=like.device)
    visible_TS = ((lo_Tm1 <= column_S) & (column_S < hi_Tm1)).any(1)
    return like.new_zeros(visible_TS.shape).masked_fill_(~visible_TS, -torch.inf)
