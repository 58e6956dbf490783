"""Key ranges as what the programs of the backward of ``hopper`` go through.

A task is 128 keys of one key head, with all query heads of it. For each of these heads it has a
part: the tiles of 64 queries that see some of its keys, one entry for each range that does, since
the ranges of a query are disjoint and every pair must count once. Entries with a mask come first;
behind them whole ones, the last queries first: causal keys begin to be seen at different queries,
but most are seen to the end, and programs that run at the same time then read the same queries.
Tasks come by key head, the first keys first, so that programs that run at the same time read the
same queries; but those that are much longer than others come before all.

O(N m) time and memory, and the entries; on the device of the ranges, with a few waits.

Axes: B batch, H query heads, K key heads, S query heads of a key head, N query rows in Q tiles of
64, M key rows in J tiles of 128, G range groups, m ranges per query, T tasks, E entries, X = G Q
m.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.empty import Index, index_of
from longspan.ops.kept import Kept
from longspan.ops.kernels._hopper_plan import MOST_TILES, cuts
from longspan.ops.ranges import KeyRanges
from longspan.ops.row_tiles import RowTiles, row_tiles

KEYS, ROWS = 128, 64
# Times the mean: tasks that would keep all others waiting at the end.
_LONG = 2


@dataclass(frozen=True, eq=False)
class HopperBackPlan:
    """What the backward kernel reads besides its tensors and the bounds of the forward plan.

    Attributes:
        entries_E2: int32, the first query of each tile, and the row of its bounds. One more than
            there are.
        parts_TS4: int32, for each task and query head its first entry, those with a mask, all.
        tasks_T4: int32, the first key, key head and batch row of each task.
        empty: the rows [B, H, N] that see no key; None if every one sees some.
    """

    entries_E2: Tensor
    parts_TS4: Tensor
    tasks_T4: Tensor
    empty: Index | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        rows = [x for x in self.empty or () if isinstance(x, Tensor)]
        return self.entries_E2, self.parts_TS4, self.tasks_T4, *rows


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
        entries_E2, about_GJ3 = _entries(ranges)
        group_BKS = group_BH.expand(batch, heads).unflatten(1, (key_heads, -1))
        parts_BKJS4 = torch.nn.functional.pad(about_GJ3[group_BKS].transpose(2, 3), (0, 1))
        where_BKJ4 = torch.zeros(
            *parts_BKJS4.shape[:3], 4, dtype=torch.int32, device=lo_GNm.device
        )
        for at, (size, step) in enumerate(
            ((parts_BKJS4.shape[2], KEYS), (key_heads, 1), (batch, 1))
        ):
            number = torch.arange(0, size * step, step, dtype=torch.int32, device=lo_GNm.device)
            where_BKJ4[..., at] = number.view(*(-1 if axis == 2 - at else 1 for axis in range(3)))
        order = _order(parts_BKJS4[..., 2].sum(-1).flatten())
        return HopperBackPlan(
            entries_E2,
            parts_BKJS4.flatten(0, 2)[order].contiguous(),
            where_BKJ4.flatten(0, 2)[order].contiguous(),
            index_of(~(lo_GNm < hi_GNm).any(-1)[group_BH.expand(batch, heads)]),
        )

    return PLANS.plan_of(ranges, kind, lambda: content, make)


def _order(length_T: Tensor) -> Tensor:
    """Long tasks first, the longest of them at the head, and the others as they come."""
    long_T = length_T > _LONG * length_T.float().mean()
    return length_T.where(long_T, 0).argsort(descending=True, stable=True)


def _touched(tiles: RowTiles) -> tuple[Tensor, Tensor]:
    """The first tile of keys that each range touches, and how many, [G, Q, m] each."""
    first_GQm = tiles.first // KEYS
    return first_GQm, (-(-tiles.last // KEYS) - first_GQm).clamp(min=0)


def _entries(ranges: KeyRanges) -> tuple[Tensor, Tensor]:
    """Entries by group and tile of keys, and first, masked and all of each [G, J, 3]."""
    # The last queries first: sorting keeps that order.
    tiles = RowTiles(*(x.flip(1) for x in row_tiles(ranges, ROWS)))
    groups, rows, count = tiles.first.shape
    columns, device = -(-ranges.keys // KEYS), tiles.first.device
    tile_X, length_X = (x.flatten() for x in _touched(tiles))
    end_X = length_X.cumsum(0, dtype=torch.int64)
    size = int(end_X[-1])
    at_X = torch.arange(len(end_X), device=device)
    row_X, group_X = at_X // count % rows, at_X // (rows * count)
    about_X2 = torch.stack(
        [ROWS * (rows - 1 - row_X), group_X * count + at_X % count], dim=1
    ).int()
    # There are many entries: no number takes more room than it needs.
    at_E = at_X.int().repeat_interleave(length_X, output_size=size)
    tile_E = (tile_X + length_X - end_X).int().index_select(0, at_E)
    tile_E += torch.arange(size, dtype=torch.int32, device=device)
    lower_E, upper_E = cuts(tiles, KEYS * tile_E, at_E)
    masked_E = lower_E | upper_E
    numbers = torch.int32 if groups * columns < 1 << 30 else torch.int64
    whose_E = (group_X * columns).to(numbers).index_select(0, at_E) + tile_E
    masked_J = torch.bincount(whose_E[masked_E], minlength=groups * columns)
    all_J = torch.bincount(whose_E, minlength=groups * columns)
    order_E = (2 * whose_E + ~masked_E).argsort(stable=True)
    entries_E2 = about_X2.new_zeros(size + 1, 2)
    entries_E2[:-1] = about_X2.index_select(0, at_E.index_select(0, order_E))
    about_J3 = torch.stack([all_J.cumsum(0) - all_J, masked_J, all_J], dim=-1).int()
    return entries_E2, about_J3.view(groups, -1, 3)
