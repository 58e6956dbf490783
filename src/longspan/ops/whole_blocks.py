"""Blocks that key ranges see wholly: what block-sparse kernels walk, and what is left over.

    a range of rows of block a:  keys [lo, hi)  =  [lo, c S)  +  blocks c .. d - 1  +  [d S, hi)
    c = ceil(largest lo / S),  d = floor(least hi / S)

The blocks c .. d - 1 are seen by every row of block a. Block patterns leave nothing over but the
rows' own blocks, cut at the diagonal; any other range loses up to a block at each end. O(N m)
time and memory, and the lists; everything on the device of the ranges, with two waits: whether
rows agree, and how long the longest lists are.

Axes: B batch, H query heads, G range groups, N query rows in Q blocks of S, m ranges of a row, W
longest list of blocks, E most ranges that a row has left over.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.kernels._flex_tiles import TILE, touched_tiles
from longspan.ops.ranges import KeyRanges

SIZE = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class WholeBlocks:
    """The whole blocks among some ranges.

    Attributes:
        count_GQ: int32, how many blocks the rows of a block see wholly.
        index_GQW: int32, their numbers in rising order; 0 behind the last one. W is a power of
            two, from 2: what is compiled for a width serves others.
        edges: the rest; None if nothing is left over.
        has_empty: whether some block of rows sees none.
        group_BH: as in the ranges.
    """

    count_GQ: Tensor
    index_GQW: Tensor
    edges: KeyRanges | None
    has_empty: bool
    group_BH: Tensor

    def lists(self, batch: int) -> tuple[Tensor, Tensor]:
        """Counts [B, H, Q] and numbers [B, H, Q, W] for every head."""
        group_BH = self.group_BH.expand(batch, -1)
        return self.count_GQ[group_BH], self.index_GQW[group_BH]


_whole: WeakKeyDictionary[KeyRanges, WholeBlocks | None] = WeakKeyDictionary()
_fills: WeakKeyDictionary[KeyRanges, float] = WeakKeyDictionary()


def starts_at_blocks(ranges: KeyRanges) -> bool:
    """Whether the rows of each block share where their ranges begin: at blocks."""
    if ranges.queries % SIZE or ranges.keys % SIZE:
        return False
    lo_GQSm, hi_GQSm = (x.unflatten(1, (-1, SIZE)) for x in (ranges.lo_GNm, ranges.hi_GNm))
    used = lo_GQSm < hi_GQSm
    first_GQ1m = lo_GQSm.where(used, ranges.keys).amin(2, keepdim=True)
    fits = ~used | ((lo_GQSm == first_GQ1m) & (lo_GQSm % SIZE == 0))
    return bool(fits.all())


def fill(ranges: KeyRanges) -> float:
    """Share of the tiles of 128 x 128 that some row touches which the pairs take up.

    1 where rows do not share where they begin, as in windows: for those the number of keys says
    enough. Kept as long as ``ranges`` lives.
    """
    if ranges not in _fills:
        _fills[ranges] = _fill(ranges) if starts_at_blocks(ranges) else 1.0
    return _fills[ranges]


def _fill(ranges: KeyRanges) -> float:
    lo_GNm, hi_GNm, group_BH = ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH
    # In blocks, so that there are few of them; what is seen in part counts as touched.
    lo_GQm = (lo_GNm // SIZE).unflatten(1, (-1, SIZE))
    hi_GQm = (-(-hi_GNm // SIZE)).unflatten(1, (-1, SIZE)).amax(2)
    used = lo_GNm.unflatten(1, (-1, SIZE)) < hi_GNm.unflatten(1, (-1, SIZE))
    lo_GQm = lo_GQm.where(used, ranges.keys).amin(2)
    some = used.any(2)
    lo_GQm, hi_GQm = (x.where(some, 0).int() for x in (lo_GQm, hi_GQm))
    blocks = KeyRanges(lo_GQm, hi_GQm, group_BH, ranges.keys // SIZE)
    touched_G = touched_tiles(blocks, TILE // SIZE)
    pairs_G = (hi_GNm - lo_GNm).clamp(min=0).sum((1, 2), dtype=torch.int64)
    pairs, touched = (x[group_BH].double().sum() for x in (pairs_G, touched_G))
    return float(pairs / (touched * TILE**2).clamp(min=1))


def whole_blocks(ranges: KeyRanges) -> WholeBlocks | None:
    """The whole blocks of 64 of some ranges; kept as long as ``ranges`` lives.

    None where rows or keys are no multiple of 64, or less than half of the pairs lie in whole
    blocks.
    """
    if ranges not in _whole:
        fits = not (ranges.queries % SIZE or ranges.keys % SIZE)
        _whole[ranges] = _split(ranges) if fits else None
    return _whole[ranges]


def _split(ranges: KeyRanges) -> WholeBlocks | None:
    lo_GNm, hi_GNm = ranges.lo_GNm, ranges.hi_GNm
    lo_GQSm, hi_GQSm = (x.unflatten(1, (-1, SIZE)) for x in (lo_GNm, hi_GNm))
    first_GQm = -(-lo_GQSm.amax(2) // SIZE)
    last_GQm = hi_GQSm.amin(2) // SIZE
    length_GQm = (last_GQm - first_GQm).clamp(min=0)
    whole_GQm = length_GQm > 0
    # What is left over before the whole blocks, or instead of them, and what after.
    used_GQSm = lo_GQSm < hi_GQSm
    before_GQm = (used_GQSm & (lo_GQSm < (first_GQm * SIZE)[:, :, None])).any(2)
    before_GQm |= used_GQSm.any(2) & ~whole_GQm
    after_GQm = (hi_GQSm > (last_GQm * SIZE)[:, :, None]).any(2) & whole_GQm
    left_GQe = torch.stack((before_GQm, after_GQm), -1).flatten(2)
    count_GQ = length_GQm.sum(-1, dtype=torch.int32)
    inside_G = count_GQ.sum(-1, dtype=torch.int64) * SIZE**2
    pairs_G = (hi_GNm - lo_GNm).clamp(min=0).sum((1, 2), dtype=torch.int64)
    group_BH = ranges.group_BH
    most, least, edges, inside, pairs = torch.stack(
        [
            count_GQ.max().long(),
            count_GQ.min().long(),
            left_GQe.sum(-1).max(),
            inside_G[group_BH].sum(),
            pairs_G[group_BH].sum(),
        ]
    ).tolist()
    if 2 * inside <= pairs:
        return None
    return WholeBlocks(
        count_GQ=count_GQ,
        index_GQW=_numbers(first_GQm, length_GQm, most),
        edges=_rest(ranges, left_GQe, whole_GQm, first_GQm, last_GQm, edges) if edges else None,
        has_empty=least == 0,
        group_BH=group_BH,
    )


def _numbers(first_GQm: Tensor, length_GQm: Tensor, most: int) -> Tensor:
    """Runs of blocks written out: int32 [G, Q, W]."""
    width = max(2, 1 << (most - 1).bit_length())
    stop_GQm = length_GQm.cumsum(-1, dtype=torch.int32)
    place_W = torch.arange(width, dtype=torch.int32, device=first_GQm.device)
    index = first_GQm.new_zeros(*first_GQm.shape[:2], width, dtype=torch.int32)
    for g, stop_Qm in enumerate(stop_GQm):
        place_QW = place_W.expand(len(stop_Qm), -1).contiguous()
        run_QW = torch.searchsorted(stop_Qm, place_QW, right=True, out_int32=False)
        run_QW.clamp_(max=stop_Qm.shape[-1] - 1)
        base_Qm = first_GQm[g] + length_GQm[g] - stop_Qm
        beyond = place_QW >= stop_Qm[:, -1:]
        index[g] = (base_Qm.gather(-1, run_QW) + place_QW).masked_fill_(beyond, 0)
    return index


def _rest(
    ranges: KeyRanges,
    left_GQe: Tensor,
    whole_GQm: Tensor,
    first_GQm: Tensor,
    last_GQm: Tensor,
    most: int,
) -> KeyRanges:
    """What rows see beside the whole blocks of their range, as at most ``most`` ranges each."""
    groups, blocks, candidates = left_GQe.shape
    place_GQe = (left_GQe.cumsum(-1) - 1).masked_fill(~left_GQe, most)
    # Which range it is part of, and on which side; what is not left over meets in one place too
    # many.
    which_GQE = left_GQe.new_full((groups, blocks, most + 1), -1, dtype=torch.int64)
    number_e = torch.arange(candidates, device=left_GQe.device)
    which_GQE.scatter_(-1, place_GQe, number_e.expand_as(place_GQe))
    which_GQE = which_GQE[..., :most]
    at_GQE = which_GQE.clamp(min=0) // 2
    behind_GQE = which_GQE % 2 == 1
    first_GQE, last_GQE = (x.gather(-1, at_GQE) * SIZE for x in (first_GQm, last_GQm))
    cut_GQE = whole_GQm.gather(-1, at_GQE)

    def by_row(x_GQE: Tensor) -> Tensor:
        return x_GQE.repeat_interleave(SIZE, 1)

    at_GNE = by_row(at_GQE)
    lo_GNE, hi_GNE = (x.gather(-1, at_GNE) for x in (ranges.lo_GNm, ranges.hi_GNm))
    lo_GNE = torch.where(by_row(behind_GQE), by_row(last_GQE), lo_GNE)
    hi_GNE = torch.where(by_row(cut_GQE & ~behind_GQE), by_row(first_GQE), hi_GNE)
    empty_GNE = (lo_GNE >= hi_GNE) | by_row(which_GQE < 0)
    if most > 1:
        # Unused ranges come last.
        order = empty_GNE.int().argsort(dim=-1, stable=True)
        lo_GNE, hi_GNE, empty_GNE = (x.gather(-1, order) for x in (lo_GNE, hi_GNE, empty_GNE))
    lo_GNE, hi_GNE = (x.masked_fill(empty_GNE, 0).int() for x in (lo_GNE, hi_GNE))
    return KeyRanges(lo_GNE, hi_GNE, ranges.group_BH, ranges.keys)
