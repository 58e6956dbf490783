"""Batches of a schedule as strided views, and their logits: nothing is gathered, nothing copied.

Axes: J jobs of a batch, H heads of a bundle, T query rows of a job with all heads, S its keys, D
width; R and L all query and all key rows laid end to end; m ranges per query.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from longspan.ops.kernels._tiled_schedule import Batch, Mask

# Vector units compute powers of two faster than powers of e, so logits carry this factor.
LOG2E = math.log2(math.e)
# Numbers that the masks of one schedule may keep.
_ROOM = 1 << 22


def query_rows(x_RD: Tensor, batch: Batch, queries: int) -> Tensor:
    """The batch's rows [J, H, T / H, D]; heads lie ``queries`` rows apart."""
    width = x_RD.shape[1]
    return x_RD.as_strided(
        (batch.jobs, batch.heads, batch.run.rows, width),
        (batch.row_step * width, queries * width, width, 1),
        x_RD.storage_offset() + batch.row * width,
    )


def key_rows(x_LD: Tensor, batch: Batch) -> Tensor:
    """The batch's keys or values [J, S, D]. Jobs may overlap: only write where they do not."""
    width = x_LD.shape[1]
    return x_LD.as_strided(
        (batch.jobs, batch.run.span, width),
        (batch.key_step * width, width, 1),
        x_LD.storage_offset() + batch.key * width,
    )


def logits(
    q_JTD: Tensor, k_JSD: Tensor, batch: Batch, biases: Biases, scale: float, buffer: Tensor
) -> Tensor:
    """log2(e) scale Q K^T with -inf where a row sees nothing [J, T, S], inside ``buffer``."""
    shape = (*q_JTD.shape[:2], batch.run.span)
    s_JTS = buffer[: math.prod(shape)].view(shape)
    torch.baddbmm(s_JTS, q_JTD, k_JSD.transpose(1, 2), beta=0, alpha=scale * LOG2E, out=s_JTS)
    mask = batch.run.mask
    if mask is not None:
        s_JHTS = s_JTS.unflatten(1, (batch.heads, batch.run.rows))
        left_TS, right_TS = biases.edges(mask, q_JTD)
        s_JHTS[..., : mask.left].add_(left_TS)
        s_JHTS[..., mask.right :].add_(right_TS)
    return s_JTS


def add_product(
    sum_RD: Tensor,
    w_JTS: Tensor,
    x_JSD: Tensor,
    batch: Batch,
    queries: int,
    *,
    alpha: float = 1.0,
    first: bool = False,
) -> None:
    """Add alpha w x to the batch's rows, or write it there if it is the first."""
    sum_JHTD = query_rows(sum_RD, batch, queries)
    if batch.heads == 1 and sum_JHTD.is_contiguous():
        sum_JTD = sum_JHTD[:, 0]
        torch.baddbmm(sum_JTD, w_JTS, x_JSD, beta=0 if first else 1, alpha=alpha, out=sum_JTD)
        return
    new_JHTD = torch.bmm(w_JTS, x_JSD).view_as(sum_JHTD)
    if first:
        torch.mul(new_JHTD, alpha, out=sum_JHTD)
    else:
        sum_JHTD.add_(new_JHTD, alpha=alpha)


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
    if heads > 1:
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
