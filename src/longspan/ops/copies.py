"""Keys that far more queries see than others, copied, so that programs share their gradients.

In the backward of FlexAttention, and of ``hopper``, one program adds up dK and dV of a key tile,
over all query tiles that see it, one after the other; in that of cuDNN one does so for each query
head. A tile of a window is seen by few of them; the tile of a sink by all, and those of strided
keys by most: when the other programs are done, these have hardly begun. Here the queries are cut
into stretches, and each stretch sees copies of its own of such keys. The gradients of copies add
up in the key. Nothing else changes: every query sees the same keys as before.

Axes: G range groups, N query rows, M key rows, m ranges per query, C key tiles, B batch, H query
heads, P programs of a key tile, K key heads, E rows behind the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.kernels._flex_tiles import count_tiles
from longspan.ops.libraries import processors
from longspan.ops.ranges import KeyRanges

# Work is counted in query tiles, over all heads of a key head. A program may do this many times
# the work of the mean one.
_MEANS = 2
# Copies are made where a program would do this many times that, and this much at least; then of
# all tiles that have the second number of times that.
_TOO_MUCH = 1.25
_LEAST = 64
_HOT = 0.75
# What a copied tile costs for each of its programs, in query tiles that one walks meanwhile: keys
# and values gathered, gradients cleared, added, converted and added up.
_PRICE = 1 / 48


@dataclass(frozen=True, eq=False)
class Copies:
    """Ranges over the keys and some copies behind them.

    Attributes:
        ranges: the same visible keys, seen in their copies.
        row_E: int64, the key row that each row behind the M keys repeats; -1 for none.
    """

    ranges: KeyRanges
    row_E: Tensor

    def take(self, x_BKMD: Tensor) -> Tensor:
        """Keys or values with the copies behind them [B, K, M + E, D]."""
        return torch.cat([x_BKMD, x_BKMD.index_select(2, self.row_E.clamp(min=0))], dim=2)


_copies: WeakKeyDictionary[KeyRanges, dict[tuple[int, int], Copies | None]] = WeakKeyDictionary()


def copies_of(ranges: KeyRanges, heads: int, programs: int) -> Copies | None:
    """Copies of the hot keys, or None where no key is hot; kept as long as ``ranges`` lives.

    Args:
        ranges: visible keys.
        heads: query heads.
        programs: how many programs share the heads of one key tile; it divides ``heads``.
    """
    kept = _copies.setdefault(ranges, {})
    name = (heads, programs)
    if name not in kept:
        kept[name] = found = _find(ranges, *name)
        if found is not None:
            # Copied once is enough.
            _copies[found.ranges] = {name: None}
    return kept[name]


def _find(ranges: KeyRanges, heads: int, programs: int) -> Copies | None:
    counts = count_tiles(ranges)
    tile, queries, keys = counts.tile, ranges.queries, ranges.keys
    seen_GC = counts.q_GC + counts.full_q_GC
    group_BH = ranges.group_BH.expand(-1, heads)
    work_BPC = seen_GC[group_BH].unflatten(1, (programs, -1)).sum(2).float()
    used = work_BPC > 0
    if not bool(used.any()):
        return None
    work_C = work_BPC.amax((0, 1))
    mean, total, most = torch.stack(
        [work_BPC[used].mean(), work_BPC.sum(2).mean(), work_C.max()]
    ).tolist()
    # Heads come one after another, and dQ is as much work again: a program may also do as much as
    # falls to each processor for one head, because then the others do the rest.
    fair = max(_MEANS * mean, 2 * total / _processors(work_BPC.device))
    if most <= max(_TOO_MUCH * fair, _LEAST):
        return None
    hot_C = work_C > _HOT * fair
    # Each stretch is whole query tiles; the first one keeps the keys themselves.
    stretch = -(-queries // (int(-(-most // fair)) * tile)) * tile
    copies = _by_stretch(ranges, hot_C, stretch, tile)
    price = _PRICE * programs * (copies.ranges.keys - keys) / tile
    return copies if price < most - fair and copies.ranges.keys <= 2 * keys else None


def _by_stretch(ranges: KeyRanges, hot_C: Tensor, stretch: int, tile: int) -> Copies:
    """Let ranges that touch mostly hot tiles lie among copies of all tiles that they touch."""
    tiles, device = len(hot_C), hot_C.device
    lo_GNm, hi_GNm = ranges.lo_GNm.clone(), ranges.hi_GNm.clone()
    before_C = torch.nn.functional.pad(hot_C.cumsum(0), (1, 0))
    # Copies begin at a tile of their own.
    gap = -ranges.keys % tile
    row = [torch.full((gap,), -1, device=device)]
    end = ranges.keys + gap
    for first in range(stretch, ranges.queries, stretch):
        lo, hi = (x[:, first : first + stretch] for x in (lo_GNm, hi_GNm))
        begin, stop = lo // tile, -(-hi // tile)
        hot = before_C[stop.clamp(max=tiles)] - before_C[begin.clamp(max=tiles)]
        # A query that sees all keys is no reason to copy all of them.
        moved = (lo < hi) & (2 * hot >= stop - begin)
        change = torch.zeros(tiles + 1, dtype=torch.int64, device=device)
        one = torch.ones((), dtype=torch.int64, device=device)
        change.index_put_((begin[moved],), one, accumulate=True)
        change.index_put_((stop[moved],), -one, accumulate=True)
        used_C = change.cumsum(0)[:tiles] > 0
        # A range touches tiles in a row, so their copies lie in a row too.
        shift_C = end + (used_C.cumsum(0) - 1 - torch.arange(tiles, device=device)) * tile
        move = torch.where(moved, shift_C[begin.clamp(max=tiles - 1)], 0).int()
        lo += move
        hi += move
        used = torch.nonzero(used_C)
        found = (used * tile + torch.arange(tile, device=device)).flatten()
        row.append(found.where(found < ranges.keys, -1))
        end += len(found)
    # Ranges in copies have moved behind the others.
    first = lo_GNm.where(lo_GNm < hi_GNm, end).argsort(dim=2, stable=True)
    lo_GNm, hi_GNm = lo_GNm.gather(2, first), hi_GNm.gather(2, first)
    return Copies(KeyRanges(lo_GNm, hi_GNm, ranges.group_BH, end), torch.cat(row))


def _processors(device: torch.device) -> int:
    """Programs that run at the same time; those of an H200 where there is no GPU."""
    return processors(device) if device.type == "cuda" else 132
