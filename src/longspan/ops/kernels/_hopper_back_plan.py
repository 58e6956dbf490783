"""Key ranges as what the programs of the backward of ``hopper`` go through.

A task is 128 keys of one key head, with all query heads of it. For each of these heads it has a
part: the tiles of 64 queries that see some of its keys, one entry for each range that does, since
the ranges of a query are disjoint and every pair must count once. Entries with a mask come first;
behind them whole ones, the last queries first: causal keys begin to be seen at different queries,
but most are seen to the end, and programs that run at the same time then read the same queries.
Tasks with the most entries come first.

O(N m) time and memory, and the entries; on the device of the ranges, with two waits.

Axes: B batch, H query heads, K key heads, S query heads of a key head, N query rows in Q tiles of
64, M key rows in J tiles of 128, G range groups, m ranges per query, T tasks, E entries, X = G Q
m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.ops.empty import Index, index_of
from longspan.ops.kept import Kept
from longspan.ops.ranges import KeyRanges
from longspan.ops.row_tiles import row_tiles

KEYS, ROWS = 128, 64


@dataclass(frozen=True, eq=False)
class HopperBackPlan:
    """What the backward kernel reads besides its tensors and the bounds of the forward plan.

    Attributes:
        entries_E2: int32, the first query of each tile, and 64 times the row of its bounds with
            the bits that ``_hopper_backward`` describes. One more than there are.
        parts_TS4: int32, for each task and query head its first entry, those with a mask, all.
        tasks_T4: int32, the first key, key head and batch row of each task.
        empty: the rows [B, H, N] that see no key; None if every one sees some.
    """

    entries_E2: Tensor
    parts_TS4: Tensor
    tasks_T4: Tensor
    empty: Index | None

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        return sum(x.nbytes for x in (self.entries_E2, self.parts_TS4, self.tasks_T4))


PLANS: Kept[HopperBackPlan] = Kept(lambda plan: plan.nbytes)


def most_entries(ranges: KeyRanges) -> int:
    """At most how many entries the plan has."""
    groups, rows, count = ranges.lo_GNm.shape
    most = groups * count * -(-rows // ROWS) * (-(-ranges.keys // KEYS))
    return most if most < 1 << 20 else int(_lengths(ranges)[2].sum())


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
        order = parts_BKJS4[..., 2].sum(-1).flatten().argsort(descending=True, stable=True)
        return HopperBackPlan(
            entries_E2,
            parts_BKJS4.flatten(0, 2)[order].contiguous(),
            where_BKJ4.flatten(0, 2)[order].contiguous(),
            index_of(~(lo_GNm < hi_GNm).any(-1)[group_BH.expand(batch, heads)]),
        )

    return PLANS.plan_of(ranges, kind, lambda: content, make)


def _lengths(ranges: KeyRanges) -> tuple[Tensor, Tensor, Tensor]:
    """First and last key, and how many tiles of keys these touch, for each of X."""
    tiles = row_tiles(ranges, ROWS)
    first, last = tiles.first.flatten().long(), tiles.last.flatten().long()
    return first, last, (-(-last // KEYS) - first // KEYS).clamp(min=0)


def _entries(ranges: KeyRanges) -> tuple[Tensor, Tensor]:
    """Entries by group and tile of keys, and first, masked and all of each [G, J, 3]."""
    tiles = row_tiles(ranges, ROWS)
    groups, rows, count = tiles.first.shape
    first, _, length = _lengths(ranges)
    at = torch.arange(len(first), device=first.device).repeat_interleave(length)
    start = length.cumsum(0) - length
    tile = first[at] // KEYS + torch.arange(len(at), device=at.device) - start[at]
    key = tile * KEYS
    begun, ended, whole = (x.flatten()[at] for x in (tiles.begun, tiles.ended, tiles.whole))
    # Rows that lack the range say so by both of their bounds.
    lower = (key < begun) | ~whole
    upper = (key + KEYS > ended) | ~whole
    masked = lower | upper
    group, row, plane = at // (rows * count), at // count % rows, at % count
    whose = group * -(-ranges.keys // KEYS) + tile
    order = ((2 * whose + ~masked) * rows + rows - 1 - row).argsort(stable=True)
    entries_E2 = first.new_zeros(len(at) + 1, 2, dtype=torch.int32)
    entries_E2[:-1, 0] = (row * ROWS)[order]
    bits = 16 * (lower & ~upper) + 32 * (lower & upper)
    entries_E2[:-1, 1] = ((group * count + plane) * 64 + bits)[order]
    size = groups * -(-ranges.keys // KEYS)
    masked_J = torch.bincount(whose[masked], minlength=size)
    all_J = torch.bincount(whose, minlength=size)
    about = torch.stack([all_J.cumsum(0) - all_J, masked_J, all_J], -1)
    return entries_E2, about.int().view(groups, -1, 3)
