"""Key ranges as what the programs of the backward of ``hopper`` go through.

A task is 128 keys of one key head, with all query heads of it, in all batch rows that share these
keys. For each of these heads that sees some of them it has a part: the tiles of 64 queries that
do, one entry for each range, since the ranges of a query are disjoint and every pair must count
once. Entries with a mask come first; behind them whole ones, the last queries first: causal keys
begin to be seen at different queries, but most are seen to the end, and programs that run at the
same time then read the same queries.

Keys that many queries see (strided ones, sinks) are cut: they have a task for each stretch of the
queries, and gradients of these tasks are added up in memory. No program is then kept busy when
all others are done, and what programs read and add at the same time stays in the L2 cache.

Tasks come by key head, in it the last stretch of queries first, in that the first keys first, so
that programs that run at the same time read the same queries. But the last tasks of all come the
longest first, and behind any that is far longer than others, as of a global column, there are
enough others for all programs, so that programs end together.

O(N m) time and memory, and the entries; on the device of the ranges, with a few waits.

Axes: B batch, H query heads, A batch rows of keys, K key heads, S query heads of a key head in all
batch rows that share it, N query rows in Q tiles of 64 and in Y stretches, M key rows in J tiles
of 128, G range groups, m ranges per query, T tasks, P parts, C tiles of keys that are cut, E
entries, X = G Q m.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.empty import Index, empty_rows
from longspan.ops.kept import Kept
from longspan.ops.kernels._hopper_parts import PROGRAMS
from longspan.ops.kernels._hopper_plan import MOST_TILES, cuts
from longspan.ops.kernels._hopper_tasks import by_key_head, heads_of
from longspan.ops.ranges import KeyRanges
from longspan.ops.row_tiles import RowTiles, by_tile, row_tiles

KEYS, ROWS = 128, 64
# Entries with a mask that are looked at together, where there are very many.
_AT_ONCE = 1 << 24
# Both halves of the keys are seen by all.
_WHOLE = 2 + (2 << 2)
# The last tasks, which are sorted by length, and how many may begin later than one that is far
# longer.
_LAST, _TAIL = PROGRAMS, 4 * PROGRAMS
# Entries from which on a task is cut, and the queries of a stretch; less where that would be more
# than two thirds of what a program has to do.
_MOST, _LEAST = 192, 32
_STRETCH, _SHORT = 4096, 512
# Row, key head and batch row of keys in memory, by batch row, key head and tile.
Where = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
# Five numbers each, which are counted in int32.
MOST_PARTS = (1 << 31) // 5 - 1


@dataclass(frozen=True, eq=False)
class HopperBackPlan:
    """What the backward kernel reads besides its tensors and the bounds of the forward plan.

    Attributes:
        entries_E2: int32, the first query of each tile, and 16 times the row of its bounds with
            two bits for each half of the keys: 0 nobody sees any, 1 masked, 2 all see all. One
            more than there are.
        parts_P5: int32, the first entry of each part, those with a mask, all, and its query head
            and batch row.
        tasks_T7: int32, the row of the first key of each task, its key head, the batch row of its
            keys, ~ of it where these are further keys, which of the C these are, -1 for none, its
            first part, the number of parts, and its first key as the bounds count it.
        cut_C4: int32, row of the first key, key head and batch row, given alike, of keys that have
            several tasks.
        empty: the rows [B, H, N] that see no key; None if every one sees some.
    """

    entries_E2: Tensor
    parts_P5: Tensor
    tasks_T7: Tensor
    cut_C4: Tensor
    empty: Index | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        rows = [x for x in self.empty or () if isinstance(x, Tensor)]
        return self.entries_E2, self.parts_P5, self.tasks_T7, self.cut_C4, *rows


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


def back_plan_of(
    ranges: KeyRanges,
    heads: tuple[int, ...],
    key_heads: tuple[int, ...],
    length: int | None = None,
) -> HopperBackPlan:
    """The plan of the given ranges, made once.

    Args:
        ranges: visible keys.
        heads: batch rows of the queries and query heads, (B, H).
        key_heads: batch rows of the keys, which divide the others, and key heads, (A, K).
        length: None, or the keys in one batch row of several whose keys all queries share, one
            after another: a multiple of 128; A is 1 then.
    """
    more = ranges.more and ranges.more.numbering
    kind = (heads, key_heads, length, more, ranges.keys, ranges.lo_GNm.device)
    content = (ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH)

    # Training reads what is made here, whoever asks first.
    @torch.inference_mode(False)
    def make(lo_GNm: Tensor, hi_GNm: Tensor, group_BH: Tensor) -> HopperBackPlan:
        group_BH = group_BH.expand(heads)
        group_AKS = by_key_head(group_BH, key_heads)
        entries_E2, about_GJY4 = _entries(ranges, group_AKS, heads[0] // key_heads[0])
        whose_AKS2 = torch.stack([by_key_head(x, key_heads) for x in heads_of(group_BH)], -1)
        tasks_T7, parts_P5, cut_C4 = _tasks(
            about_GJY4, group_AKS, whose_AKS2, functools.partial(_where, ranges, length)
        )
        return HopperBackPlan(
            entries_E2,
            parts_P5,
            tasks_T7,
            cut_C4,
            empty_rows(ranges, heads[0]),
        )

    return PLANS.plan_of(ranges, kind, lambda: content, make)


def _tasks(
    about_GJY4: Tensor, group_AKS: Tensor, whose_AKS2: Tensor, where: Where
) -> tuple[Tensor, Tensor, Tensor]:
    """Tasks, their parts, and the keys that are cut.

    Args:
        about_GJY4: what ``_entries`` says about its entries.
        group_AKS: range groups of the query heads.
        whose_AKS2: their numbers, and their batch rows.
        where: where keys lie in memory.
    """
    used_AKJY = torch.stack([about_GJY4[one_AK, ..., 2] > 0 for one_AK in group_AKS.unbind(2)])
    used_AKJY = used_AKJY.any(0)
    # Keys that nobody sees have a gradient of 0.
    used_AKJY[..., 0] |= ~used_AKJY.any(-1)
    cut_AKJ = used_AKJY.sum(-1) > 1
    slot_AKJ = (cut_AKJ.flatten().cumsum(0).view_as(cut_AKJ) - 1).where(cut_AKJ, -1)
    batch_T, head_T, tile_T, stretch_T = used_AKJY.nonzero().unbind(1)
    slot_T = slot_AKJ[batch_T, head_T, tile_T]
    about_TS4 = about_GJY4[group_AKS[batch_T, head_T], tile_T[:, None], stretch_T[:, None]]
    last_T = about_TS4[..., 3].amax(1)
    head_AK = batch_T * group_AKS.shape[1] + head_T
    order_T = _order(head_AK * (last_T.max() + 1) - last_T, about_TS4[..., 2].sum(1))
    tasks_T4 = torch.stack([*where(batch_T, head_T, tile_T), slot_T], 1)[order_T]
    about_TS4, whose_TS2 = about_TS4[order_T], whose_AKS2[batch_T, head_T][order_T]
    used_TS = about_TS4[..., 2] > 0
    count_T = used_TS.sum(1)
    parts_P5 = torch.cat([about_TS4[..., :3], whose_TS2], 2)[used_TS]
    if len(parts_P5) > MOST_PARTS:
        raise Refusal(
            f"the backward of hopper takes {MOST_PARTS:,} parts of tasks at most, one for each "
            f"query head and {KEYS} keys that some of up to {_STRETCH:,} queries see; got "
            f"{len(parts_P5):,}"
        )
    more_T3 = torch.stack([count_T.cumsum(0) - count_T, count_T, KEYS * tile_T[order_T]], 1)
    batch_C, head_C, tile_C = cut_AKJ.nonzero().unbind(1)
    cut_C = [*where(batch_C, head_C, tile_C), torch.zeros_like(tile_C)]
    return (
        torch.cat([tasks_T4, more_T3], 1).int(),
        parts_P5,
        torch.stack(cut_C, 1).int(),
    )


def _where(
    ranges: KeyRanges, length: int | None, batch: Tensor, head: Tensor, tile: Tensor
) -> tuple[Tensor, ...]:
    """Row, key head and batch row of tiles of keys; ~ of it where they are further keys."""
    key, more = KEYS * tile, ranges.more
    if more is None:
        length = length or ranges.keys
        return key % length, head, batch + key // length
    part = more.part(key)
    row = (key - more.border) % (more.length or ranges.keys)
    return (
        torch.where(part > 0, row, key),
        head,
        torch.where(part > 0, ~(batch + part - 1), batch),
    )


def _order(rank_T: Tensor, length_T: Tensor) -> Tensor:
    """Tasks by rank, as they come where it is the same; but the last ones by length, and before
    them any that are far longer."""
    order_T = rank_T.argsort(stable=True)
    length_T = length_T[order_T]
    most = length_T.max()
    tail_T = length_T.flip(0).cumsum(0).flip(0) <= PROGRAMS * most
    tail_T[:-_TAIL] = False
    # Only what is far longer than others moves so far: those before the last ones read the same
    # queries as their neighbours.
    long_T = tail_T & (length_T * tail_T.sum() > 2 * (length_T * tail_T).sum())
    turn_T = torch.where(tail_T, 2, 0)
    turn_T[-_LAST:] = 3
    turn_T[long_T] = 1
    sorted_T = (turn_T % 2) * (most - length_T)
    return order_T[(turn_T * (most + 1) + sorted_T).argsort(stable=True)]


def _touched(tiles: RowTiles) -> tuple[Tensor, Tensor]:
    """The first tile of keys that each range touches, and how many, [G, Q, m] each."""
    first_GQm = tiles.first // KEYS
    return first_GQm, (-(-tiles.last // KEYS) - first_GQm).clamp(min=0)


def _entries(ranges: KeyRanges, group_AKS: Tensor, share: int) -> tuple[Tensor, Tensor]:
    """Entries by group, tile of keys and stretch of queries; and about each [G, J, Y, 4].

    These are the first of its entries, those with a mask, all, and the stretch of its last query,
    0 the first one.

    Args:
        ranges: visible keys.
        group_AKS: range groups of the query heads of each key head.
        share: batch rows that share keys.
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
    about_X2 = torch.stack([row_X, 16 * (group_X * count + at_X % count)], dim=1).int()
    # There are many entries: no number takes more room than it needs.
    at_E = at_X.int().repeat_interleave(length_X, output_size=size)
    tile_E = (tile_X + length_X - end_X).int().index_select(0, at_E)
    tile_E += torch.arange(size, dtype=torch.int32, device=device)
    if (seen_E := _outside_gaps(ranges, tiles, tile_E, at_E)) is not None:
        tile_E, at_E = tile_E[seen_E], at_E[seen_E]
        size = len(at_E)
    lower_E, upper_E = cuts(tiles, KEYS * tile_E, at_E)
    whole_E = ~(lower_E | upper_E)
    numbers = torch.int32 if groups * columns < 1 << 30 else torch.int64
    whose_E = (group_X * columns).to(numbers).index_select(0, at_E) + tile_E
    all_GJ = torch.bincount(whose_E, minlength=groups * columns).view(groups, -1)
    long_J, stretch = _long(all_GJ, group_AKS, share)
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
    kind_E = torch.full_like(whole_E, _WHOLE, dtype=torch.int8)
    for cut_s in (~whole_E).nonzero()[:, 0].split(_AT_ONCE):
        kind_E[cut_s] = _kinds(tiles, KEYS * tile_E[cut_s], at_E[cut_s])
    entries_E2 = about_X2.new_zeros(size + 1, 2)
    entries_E2[:-1] = about_X2.index_select(0, at_E.index_select(0, order_E))
    entries_E2[:-1, 1] += kind_E.index_select(0, order_E)
    about_P4 = torch.stack([all_P.cumsum(0) - all_P, masked_P, all_P, last_P], dim=-1).int()
    return entries_E2, about_P4.view(groups, columns, stretches, 4)


def _outside_gaps(
    ranges: KeyRanges, tiles: RowTiles, tile_E: Tensor, at_E: Tensor
) -> Tensor | None:
    """The entries whose keys some query sees; None if all do.

    Queries of a tile may leave out keys between them, as the first one of a chunk that keeps
    itself where the others begin with strided keys.

    Args:
        ranges: visible keys.
        tiles: their bounds by tiles of 64 rows, the last ones first.
        tile_E: tile of keys of each entry.
        at_E: whose it is, of X.
    """
    begun_X, ended_X = tiles.begun.flatten(), tiles.ended.flatten()
    # Tiles of keys that some query of each X may leave out: from here on, and before there.
    from_X, to_X = -(-ended_X // KEYS), begun_X // KEYS
    if not bool((from_X < to_X).any()):
        return None
    doubt_E = (tile_E >= from_X.index_select(0, at_E)) & (tile_E < to_X.index_select(0, at_E))
    lo_XR, hi_XR = (
        by_tile(x_GNm, ROWS, 0).flip(1).transpose(2, 3).flatten(0, 2)
        for x_GNm in (ranges.lo_GNm, ranges.hi_GNm)
    )
    seen_E = ~doubt_E
    for some_s in doubt_E.nonzero()[:, 0].split(_AT_ONCE // ROWS):
        key_s1 = KEYS * tile_E[some_s, None]
        lo_sR, hi_sR = (x_XR.index_select(0, at_E[some_s]) for x_XR in (lo_XR, hi_XR))
        seen_sR = (lo_sR < hi_sR) & (lo_sR < key_s1 + KEYS) & (key_s1 < hi_sR)
        seen_E[some_s] = seen_sR.any(1)
    return seen_E


def _kinds(tiles: RowTiles, key_s: Tensor, at_s: Tensor) -> Tensor:
    """How each half of some tiles of keys is seen, two bits each, int8.

    Args:
        tiles: bounds by tiles of rows.
        key_s: the first key of each tile.
        at_s: whose it is, of X.
    """
    first_s, last_s = (x.flatten().index_select(0, at_s) for x in (tiles.first, tiles.last))
    kind_s = torch.zeros_like(key_s, dtype=torch.int8)
    for half in range(2):
        own_s = key_s + KEYS // 2 * half
        lower_s, upper_s = cuts(tiles, own_s, at_s, KEYS // 2)
        seen_s = (own_s < last_s) & (own_s + KEYS // 2 > first_s)
        kind_s |= (2 - (lower_s | upper_s).to(torch.int8)) * seen_s << (2 * half)
    return kind_s


def _long(all_GJ: Tensor, group_AKS: Tensor, share: int) -> tuple[Tensor | None, int]:
    """Tiles of keys that are cut, in all heads and batch rows, and the queries of a stretch.

    None where no tile has so many entries that it is worth it.
    """
    length_AKJ = torch.stack([all_GJ[one_AK] for one_AK in group_AKS.unbind(2)]).sum(0)
    most = int(min(max(length_AKJ.sum() / (1.5 * PROGRAMS), _LEAST), _MOST))
    stretch = max(_SHORT, 1 << (_STRETCH * most // _MOST).bit_length() - 1)
    long_J = (length_AKJ > most).flatten(0, 1).any(0)
    # As many queries in all batch rows that share the keys.
    return long_J if bool(long_J.any()) else None, max(ROWS, stretch // share)
