"""Batches of a schedule as strided views, and their logits: rows stay where they lie, in whatever
order of axes, and only keys in many short segments are gathered.

Axes: J jobs of a batch, H heads of a bundle, T query rows of a job with all heads, S its keys, D
width; R and L all query and all key rows laid end to end; m ranges per query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.ops.kernels._tiled_runs import Mask
from longspan.ops.kernels._tiled_schedule import Batch, Steps

# Vector units compute powers of two faster than powers of e, so logits carry this factor.
LOG2E = math.log2(math.e)
# Numbers that the masks of one schedule may keep; half of them for whole masks.
_ROOM = 1 << 23


def steps_of(x_BHND: Tensor) -> Steps:
    """How the rows lie, if they fill their memory without gaps; else laid end to end."""
    shape, width = x_BHND.shape[:3], x_BHND.shape[3]
    axes = sorted((x_BHND.stride(axis), axis) for axis in range(3) if shape[axis] > 1)
    steps, size = [0, 0, 0], 1
    dense = x_BHND.stride(3) == 1 or width == 1
    for stride, axis in axes:
        dense &= stride == size * width
        steps[axis] = size
        size *= shape[axis]
    if not dense:
        return Steps(shape[1] * shape[2], shape[2], 1)
    return Steps(*steps)


def lay(x_RD: Tensor, shape: Sequence[int], steps: Steps) -> Tensor:
    """Rows in memory as [B, H, N, D], which begins with ``shape``."""
    width = x_RD.shape[1]
    return x_RD.as_strided((*shape[:3], width), steps.strides(width))


def rows_of(x_BHND: Tensor, steps: Steps) -> Tensor:
    """All rows [R, D] as they lie in memory; a copy if they do not lie at these steps."""
    width = x_BHND.shape[3]
    wanted = steps.strides(width)
    if all(
        size == 1 or is_ == should
        for size, is_, should in zip(x_BHND.shape, x_BHND.stride(), wanted, strict=True)
    ):
        return x_BHND.as_strided((x_BHND.numel() // width, width), (width, 1))
    x_RD = x_BHND.new_empty(x_BHND.numel() // width, width)
    lay(x_RD, x_BHND.shape, steps).copy_(x_BHND)
    return x_RD


def query_rows(x_RD: Tensor, batch: Batch) -> Tensor:
    """The batch's rows [J, H, T / H, D]."""
    width = x_RD.shape[1]
    return x_RD.as_strided(
        (batch.jobs, batch.heads, batch.run.rows, width),
        (batch.row_step * width, batch.row_steps.head * width, batch.row_steps.row * width, 1),
        x_RD.storage_offset() + batch.row * width,
    )


def key_rows(x_LD: Tensor, batch: Batch) -> Tensor:
    """The batch's keys or values [J, S, D]: a copy if they are gathered, else a view, whose jobs
    may overlap: only write where they do not."""
    width = x_LD.shape[1]
    if batch.gathered_X is not None:
        rows_X = torch.from_numpy(batch.gathered_X)
        return x_LD.index_select(0, rows_X).view(batch.jobs, batch.run.span, width)
    return x_LD.as_strided(
        (batch.jobs, batch.run.span, width),
        (batch.key_step * width, batch.key_steps.row * width, 1),
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
        left_TS, right_TS = biases.edges(mask, q_JTD)[:2]
        s_JHTS[..., : mask.left].add_(left_TS)
        s_JHTS[..., mask.right :].add_(right_TS)
    return s_JTS


def add_product(
    sum_RD: Tensor,
    w_JTS: Tensor,
    x_JSD: Tensor,
    batch: Batch,
    *,
    alpha: float = 1.0,
    first: bool = False,
) -> None:
    """Add alpha w x to the batch's rows, or write it there if it is the first."""
    sum_JHTD = query_rows(sum_RD, batch)
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
    """What masks add to logits, 0 or -inf; kept from call to call as far as there is room.

    A regular pattern has a handful of masks, or of edges on the right, which are kept whole.
    Others have one for every job: of those only the edges are kept, and drawn on a canvas when
    their job comes.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
        # Views of what is kept; they take no room of their own.
        self._views: dict[tuple[object, ...], tuple[Tensor]] = {}
        self._room = _ROOM

    def edges(self, mask: Mask, like: Tensor) -> tuple[Tensor, ...]:
        """Bias [T, left] on the first columns and [T, span - right] on the last; where no column
        is seen by every row, also -inf for the rows [T] that see nothing."""
        name = (mask, like.dtype, like.device)
        found = self._kept.get(name)
        return found or self._keep(name, _edges(mask, like), 0)

    def whole(self, mask: Mask, heads: int, canvas: Canvas) -> tuple[Tensor, ...]:
        """Bias [H T, S], and -inf for the rows [H T] that see nothing if there may be any; good
        until the canvas is drawn on again."""
        like = canvas.like
        name = (mask, heads, like.dtype, like.device)
        found = self._kept.get(name) or self._views.get(name)
        if found is not None:
            return found
        left_TL, right_TR, *blind = self.edges(mask, like)
        if mask.left == 0:
            bias_XS = self._behind_zeros(mask, heads, right_TR)
            if bias_XS is not None:
                self._views[name] = (bias_XS,)
                return (bias_XS,)
        blind = tuple(blind_T.repeat(heads) for blind_T in blind)
        if heads == 1 and mask.left == mask.span:
            return left_TL, *blind
        bias_XS = canvas.draw(mask, heads, (left_TL, right_TR))
        if bias_XS.numel() <= self._room - _ROOM // 2:
            return self._keep(name, (bias_XS.clone(), *blind), _ROOM // 2)
        return bias_XS, *blind

    def _behind_zeros(self, mask: Mask, heads: int, right_TR: Tensor) -> Tensor | None:
        """Bias [H T, S] of a mask with an edge on its right only; None if there is no room.

        Spans that grow from tile to tile, as those of strided keys do, end in the same few edges:
        one of them behind enough zeros serves all.
        """
        rows, wide = right_TR.shape
        bounds = (mask.lo_Tm - mask.right, mask.hi_Tm - mask.right)
        shape = b"".join(bound.clip(0, wide).tobytes() for bound in bounds)
        name = ("behind zeros", wide, shape, heads, right_TR.dtype, right_TR.device)
        (kept_XZ,) = self._kept.get(name, (right_TR[:0],))
        if kept_XZ.shape[1] < mask.span or len(kept_XZ) == 0:
            # Spans grow: more zeros than this one needs.
            width = mask.span + mask.span // 4
            more = heads * rows * width - kept_XZ.numel()
            if more > self._room - _ROOM // 2:
                return None
            self._room -= more
            self._views.clear()
            kept_XZ = right_TR.new_zeros(heads * rows, width)
            kept_XZ[:, width - wide :] = right_TR.repeat(heads, 1)
            self._kept[name] = (kept_XZ,)
        return kept_XZ[:, kept_XZ.shape[1] - mask.span :]

    def _keep(
        self, name: tuple[object, ...], made: tuple[Tensor, ...], spare: int
    ) -> tuple[Tensor, ...]:
        """Keep ``made`` if that leaves ``spare`` numbers of room."""
        size = sum(x.numel() for x in made)
        if size <= self._room - spare:
            self._room -= size
            self._kept[name] = made
        return made


class Canvas:
    """Zeros, reused by one thread, on which the edges of one mask at a time are drawn."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._flat = like.new_zeros(0)
        self._drawn: tuple[Tensor, ...] = ()

    def draw(self, mask: Mask, heads: int, edges: tuple[Tensor, Tensor]) -> Tensor:
        """Bias [H T, S] with these edges."""
        for drawn in self._drawn:
            drawn.zero_()
        shape = (heads, len(mask.lo_Tm), mask.span)
        size = math.prod(shape)
        if size > len(self._flat):
            self._flat = self.like.new_zeros(size)
        bias_HTS = self._flat[:size].view(shape)
        self._drawn = bias_HTS[..., : mask.left], bias_HTS[..., mask.right :]
        for drawn, edge in zip(self._drawn, edges, strict=True):
            drawn.copy_(edge)
        return bias_HTS.flatten(0, 1)


def _edges(mask: Mask, like: Tensor) -> tuple[Tensor, ...]:
    left_TL = _bias(mask, 0, mask.left, like)
    right_TR = _bias(mask, mask.right, mask.span, like)
    if mask.left < mask.right:
        return left_TL, right_TR
    return left_TL, right_TR, left_TL.amax(-1)


def _bias(mask: Mask, start: int, stop: int, like: Tensor) -> Tensor:
    lo_Tm1, hi_Tm1 = (
        torch.from_numpy(x).to(like.device)[..., None] for x in (mask.lo_Tm, mask.hi_Tm)
    )
    column_S = torch.arange(start, stop, dtype=torch.int32, device=like.device)
    visible_TS = ((lo_Tm1 <= column_S) & (column_S < hi_Tm1)).any(1)
    return like.new_zeros(visible_TS.shape).masked_fill_(~visible_TS, -torch.inf)
