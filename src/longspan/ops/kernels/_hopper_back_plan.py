"""Key ranges as what the programs of the backward of ``hopper`` go through.

A task is 128 keys of one key head, with all query heads of it. For each of these heads it has a
part: the tiles of 64 queries that see some of its keys, one entry for each range that does, since
the ranges of a query are disjoint and every pair must count once. Entries with a mask come first;
behind them whole ones, the last queries first: causal keys begin to be seen at different queries,
but most are seen to the end, and programs that run at the same time then read the same queries.

Keys that many queries see (strided ones, sinks) are cut: they have a task for each stretch of the
queries, and gradients of these tasks are added up in memory. No program is then kept busy when
all others are done, and what programs read and add at the same time stays in the L2 cache.

Tasks come by key head, in it the last stretch of queries first, in that the first keys first, so
that programs that run at the same time read the same queries. But the last tasks of all come the
longest first, so that programs end together.

O(N m) time and memory, and the entries; on the device of the ranges, with a few waits.

Axes: B batch, H query heads, K key heads, S query heads of a key head, N query rows in Q tiles of
64 and in Y stretches, M key rows in J tiles of 128, G range groups, m ranges per query, T tasks, C
tiles of keys that are cut, E entries, X = G Q m.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.empty import Index, index_of
from longspan.ops.kept import Kept
from longspan.ops.kernels._hopper_parts import PROGRAMS
from longspan.ops.kernels._hopper_plan import MOST_TILES, cuts
from longspan.ops.ranges import KeyRanges
from longspan.ops.row_tiles import RowTiles, row_tiles

KEYS, ROWS = 128, 64
# The last tasks, which are sorted by length.
_LAST = PROGRAMS
# Entries from which on a task is cut, and the queries of a stretch; less where that would be more
# than two thirds of what a program has to do.
_MOST, _LEAST = 192, 32
_STRETCH, _SHORT = 4096, 512


@dataclass(frozen=True, eq=False)
class HopperBackPlan:
    """What the backward kernel reads besides its tensors and the bounds of the forward plan.

    Attributes:
        entries_E2: int32, the first query of each tile, and the row of its bounds. One more than
            there are.
        parts_TS4: int32, for each task and query head its first entry, those with a mask, all.
        tasks_T4: int32, the first key, key head and batch row of each task, and which of the C
            its keys are, -1 for none.
        cut_C4: int32, first key, key head and batch row of keys that have several tasks.
        empty: the rows [B, H, N] that see no key; None if every one sees some.
    """

    entries_E2: Tensor
    parts_TS4: Tensor
    tasks_T4: Tensor
    cut_C4: Tensor
    empty: Index | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        rows = [x for x in self.empty or () if isinstance(x, Tensor)]
        return self.entries_E2, self.parts_TS4, self.tasks_T4, self.cut_C4, *rows


PLANS: Kept[HopperBackPlan] = Kept(lambda plan: plan.tensors)
_counts: WeakKeyDictionary[KeyRanges, int] = WeakKeyDictionary()


def most_entries(ranges: KeyRanges) -> int:
    """At most how many entries the plan has: exact where there may be too many."""
    groups, rows, count = ranges.lo_GNm.shape
    most = groups * count * -(-rows // ROWS) * (-(-ranges.keys // KEYS))
    if most <= MOST_TILES:
        return most
    if ranges not in _counts:
        _, length_GQm = _touched(row_tiles(ranges, ROWS))
        _counts[ranges] = int(length_GQm.sum(dtype=torch.int64))
    return _counts[ranges]


def back_plan_of(ranges: KeyRanges, batch: int, heads: int, key_heads: int) -> HopperBackPlan:
    """The plan of the given ranges, made once.

    Args:
        ranges: visible keys.
        batch: batch rows.
        heads: query heads.
        key_heads: key heads.
    """
    kind = (batch, heads, key_heads, ranges.keys, ranges.lo_GNm.device)
    content = (ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH)

    # Training reads what is made here, whoever asks first.
    @torch.inference_mode(False)
    def make(lo_GNm: Tensor, hi_GNm: Tensor, group_BH: Tensor) -> HopperBackPlan:
        group_BKS = group_BH.expand(batch, heads).unflatten(1, (key_heads, -1))
        entries_E2, about_GJY4 = _entries(ranges, group_BKS)
        tasks_T4, parts_TS4, cut_C4 = _tasks(about_GJY4, group_BKS)
        return HopperBackPlan(
            entries_E2,
            parts_TS4,
            tasks_T4,
            cut_C4,
            index_of(~(lo_GNm < hi_GNm).any(-1)[group_BH.expand(batch, heads)]),
        )

    return PLANS.plan_of(ranges, kind, lambda: content, make)


def _tasks(about_GJY4: Tensor, group_BKS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tasks, their parts, and the keys that are cut."""
    used_BKJY = torch.stack([about_GJY4[one_BK, ..., 2] > 0 for one_BK in group_BKS.unbind(2)])
    used_BKJY = used_BKJY.any(0)
    # Keys that nobody sees have a gradient of 0.
    used_BKJY[..., 0] |= ~used_BKJY.any(-1)
    cut_BKJ = used_BKJY.sum(-1) > 1
    slot_BKJ = (cut_BKJ.flatten().cumsum(0).view_as(cut_BKJ) - 1).where(cut_BKJ, -1)
    batch_T, head_T, tile_T, stretch_T = used_BKJY.nonzero().unbind(1)
    slot_T = slot_BKJ[batch_T, head_T, tile_T]
    tasks_T4 = torch.stack([KEYS * tile_T, head_T, batch_T, slot_T], 1).int()
    parts_TS4 = about_GJY4[group_BKS[batch_T, head_T], tile_T[:, None], stretch_T[:, None]]
    last_T = parts_TS4[..., 3].amax(1)
    parts_TS4[..., 3] = 0
    head_BK = batch_T * group_BKS.shape[1] + head_T
    order = _order(head_BK * (last_T.max() + 1) - last_T, parts_TS4[..., 2].sum(1))
    batch_C, head_C, tile_C = cut_BKJ.nonzero().unbind(1)
    cut_C4 = torch.stack([KEYS * tile_C, head_C, batch_C, torch.zeros_like(tile_C)], 1).int()
    return tasks_T4[order], parts_TS4[order], cut_C4


def _order(rank_T: Tensor, length_T: Tensor) -> Tensor:
    """Tasks by rank, as they come where it is the same; but the last ones by length."""
    order_T = rank_T.argsort(stable=True)
    tail = order_T[-_LAST:]
    order_T[-_LAST:] = tail[length_T[tail].argsort(descending=True, stable=True)]
    return order_T


def _touched(tiles: RowTiles) -> tuple[Tensor, Tensor]:
    """The first tile of keys that each range touches, and how many, [G, Q, m] each."""
    first_GQm = tiles.first // KEYS
    return first_GQm, (-(-tiles.last // KEYS) - first_GQm).clamp(min=0)


def _entries(ranges: KeyRanges, group_BKS: Tensor) -> tuple[Tensor, Tensor]:
    """Entries by group, tile of keys and stretch of queries; and about each [G, J, Y, 4].

    These are the first of its entries, those with a mask, all, and the stretch of its last query,
    0 the first one.
    """
    # The last queries first: sorting keeps that order.
    tiles = RowTiles(*(x.flip(1) for x in row_tiles(ranges, ROWS)))
    groups, rows, count = tiles.first.shape
    columns, device = -(-ranges.keys // KEYS), tiles.first.device
    tile_X, length_X = (x.flatten() for x in _touched(tiles))
    end_X = length_X.cumsum(0, dtype=torch.int64)
    size = int(end_X[-1])
    at_X = torch.arange(len(end_X), device=device)
    row_X, group_X = ROWS * (rows - 1 - at_X // count % rows), at_X // (rows * count)
    about_X2 = torch.stack([row_X, group_X * count + at_X % count], dim=1).int()
    # There are many entries: no number takes more room than it needs.
    at_E = at_X.int().repeat_interleave(length_X, output_size=size)
    tile_E = (tile_X + length_X - end_X).int().index_select(0, at_E)
    tile_E += torch.arange(size, dtype=torch.int32, device=device)
    lower_E, upper_E = cuts(tiles, KEYS * tile_E, at_E)
    whole_E = ~(lower_E | upper_E)
    numbers = torch.int32 if groups * columns < 1 << 30 else torch.int64
    whose_E = (group_X * columns).to(numbers).index_select(0, at_E) + tile_E
    all_GJ = torch.bincount(whose_E, minlength=groups * columns).view(groups, -1)
    long_J, stretch = _long(all_GJ, group_BKS)
    last_X, stretches = row_X // stretch, 1
    if long_J is not None:
        # Stretches of cut keys, the last one first; others have a single one.
        stretches = -(-ROWS * rows // stretch)
        turn_E = (stretches - 1 - last_X).to(numbers).index_select(0, at_E)
        wide = torch.int64 if groups * columns * stretches >= 1 << 30 else numbers
        whose_E = whose_E.to(wide) * stretches + turn_E * long_J.index_select(0, tile_E)
    places = groups * columns * stretches
    masked_P = torch.bincount(whose_E[~whole_E], minlength=places)
    all_P = torch.bincount(whose_E, minlength=places)
    last_P = all_P.new_zeros(places)
    if long_J is not None:
        last_P.scatter_reduce_(0, whose_E.long(), last_X.index_select(0, at_E), "amax")
    order_E = (2 * whose_E + whole_E).argsort(stable=True)
    entries_E2 = about_X2.new_zeros(size + 1, 2)
    entries_E2[:-1] = about_X2.index_select(0, at_E.index_select(0, order_E))
    about_P4 = torch.stack([all_P.cumsum(0) - all_P, masked_P, all_P, last_P], dim=-1).int()
    return entries_E2, about_P4.view(groups, columns, stretches, 4)


def _long(all_GJ: Tensor, group_BKS: Tensor) -> tuple[Tensor | None, int]:
    """Tiles of keys that are cut, in all heads and batch rows, and the queries of a stretch.

    None where no tile has so many entries that it is worth it.
    """
    length_BKJ = torch.stack([all_GJ[one_BK] for one_BK in group_BKS.unbind(2)]).sum(0)
    most = int(min(max(length_BKJ.sum() / (1.5 * PROGRAMS), _LEAST), _MOST))
    stretch = max(_SHORT, 1 << (_STRETCH * most // _MOST).bit_length() - 1)
    long_J = (length_BKJ > most).flatten(0, 1).any(0)
    return long_J if bool(long_J.any()) else None, stretch
