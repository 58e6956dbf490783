"""Key ranges as what the programs of ``hopper`` go through: tasks and their tiles of keys.

A task is 128 queries of one head. Each range of its queries, from the least lower bound to the
greatest upper one, is cut into tiles of 128 keys, the first of which begins at that lower bound: a
tile may begin anywhere. Where all queries see the whole tile, it needs no mask; in the others, its
edges, each query sees what its own bounds of that range say. The ranges of a query are disjoint,
so that each pair counts once even where tiles of two ranges overlap. Where the queries leave out
keys between them (blocks that differ from one half of a task to the other), no tile lies in the
gap. Of an edge each half of the queries may need half of the keys only, and most are cut on one
side alone.

Where there are fewer tasks than processors, long ones are split by keys (see ``_hopper_parts``).
Where tiles are mostly in vain, as with blocks of 64, they are put together from halves, for two
query heads or one (see ``_hopper_pairs``). In which order tasks come is in ``_hopper_tasks``.

O(N m) time and memory, and the tiles; on the device of the ranges, with a few waits.

Axes: B batch, H query heads, A batch rows of keys, K key heads, S query heads of a key head in all
batch rows that share it, N query rows in Q tiles, G range groups, m ranges per query, P = G m rows
of bounds, T tasks, E tiles, R runs of tiles, X = G Q m, s some of those, W halves of 64 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.kept import Kept
from longspan.ops.kernels._hopper_pairs import HALF, paired
from longspan.ops.kernels._hopper_parts import PROGRAMS, parts_of, split
from longspan.ops.kernels._hopper_tasks import TILE, in_order, tasks_of
from longspan.ops.ranges import KeyRanges
from longspan.ops.row_tiles import RowTiles, by_tile, row_tiles

# Tiles are refused rather than allowed to crowd out the model: 2 GiB. That is enough for a million
# causal rows whose heads differ eightfold.
MOST_TILES = 1 << 28
# Eight numbers each, which are counted in int32.
MOST_TASKS = (1 << 28) - 1
# Rows of bounds, which share a number with six bits.
MOST_PLANES = 1 << 25
# Of the L2 cache for keys and values; queries and outputs pass through it too.
_SECTION_BYTES = 32 << 20
# Halves are looked at where there are so many times the tiles that the pairs would fill,
_IN_VAIN = 1.1
# no more than this, for halves are listed before they are put together,
_MOST_PAIRED = 1 << 23
# and so many tiles of queries, of which none is split by keys.
_FEW = PROGRAMS
# Taken where they take so many times the time at most: for two heads as long as other tiles do,
_WORTH = 0.95
# for one head, which have half of the pairs, so many times as long.
_ALONE = 0.65


@dataclass(frozen=True, eq=False)
class HopperPlan:
    """What the kernel reads besides its tensors.

    Attributes:
        lo_PN: int32, lower bounds, those of range t of group g in row ``g m + t``.
        hi_PN: the same of the upper bounds.
        entries: int32 [E, 2], the first key of each tile, and 64 times the row of its bounds with
            the bits that ``_hopper_forward`` describes.
        tasks: int32 [T, 8], for each task its first query row, head, batch row, first entry,
            number of entries before those that are whole (the first one counts, and is whole if
            any is), number of entries, and its first entry. Where tasks are split, part s of
            batch row b has batch row ``s B + b``, and its first entry may need a mask in any
            case.
        parts: into which each task is split by keys.
        halves: query heads of a task where tasks and tiles are those of ``_hopper_pairs``, 1 or
            2: int32 [T, 16], ten of which count, and [E, 4]; else 0.
    """

    lo_PN: Tensor
    hi_PN: Tensor
    entries: Tensor
    tasks: Tensor
    parts: int
    halves: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.lo_PN, self.hi_PN, self.entries, self.tasks


PLANS: Kept[HopperPlan] = Kept(lambda plan: plan.tensors)
_runs: WeakKeyDictionary[KeyRanges, dict[int | None, _Runs]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Runs:
    """Tiles that follow each other, in the order of their tasks.

    Attributes:
        key_R: the first key.
        length_R: how many tiles.
        at_R: whose they are, of X.
        edge_R: whether they need a mask.
        count_GQ: tiles of each task.
        edges_GQ: the first one, and all that need a mask.
        tiles: the bounds of the rows of each task.
        size: rows of a task, and keys of a tile.
    """

    key_R: Tensor
    length_R: Tensor
    at_R: Tensor
    edge_R: Tensor
    count_GQ: Tensor
    edges_GQ: Tensor
    tiles: RowTiles
    size: int


def most_tiles(ranges: KeyRanges) -> int:
    """At most how many tiles of 128 keys the plan lists: exact where there may be too many."""
    groups, rows, count = ranges.lo_GNm.shape
    most = groups * count * -(-rows // TILE) * (-(-ranges.keys // TILE) + 1)
    if most <= MOST_TILES:
        return most
    return int(task_tiles(ranges).sum(dtype=torch.int64))


def task_tiles(ranges: KeyRanges) -> Tensor:
    """Tiles of keys of each task of a range group [G, Q]."""
    return _runs_of(ranges).count_GQ


def plan_of(
    ranges: KeyRanges,
    heads: tuple[int, ...],
    key_heads: tuple[int, ...],
    row_bytes: int,
    length: int | None = None,
) -> HopperPlan:
    """The plan of the given ranges, made once.

    Args:
        ranges: visible keys.
        heads: batch rows of the queries and query heads, (B, H).
        key_heads: batch rows of the keys, which divide the others, and key heads, (A, K).
        row_bytes: bytes of a key and its value.
        length: None, or the keys in one batch row of several whose keys all queries share, one
            after another: a multiple of 128; A is 1 then.
    """
    section = max(1, _SECTION_BYTES // max(1, ranges.keys * row_bytes))
    more = ranges.more and ranges.more.numbering
    kind = (heads, key_heads, section, length, more, ranges.keys, ranges.lo_GNm.device)
    content = (ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH)

    # Training reads what is made here, whoever asks first.
    @torch.inference_mode(False)
    def make(lo_GNm: Tensor, hi_GNm: Tensor, group_BH: Tensor) -> HopperPlan:
        runs, group_BH = _runs_of(ranges, length), group_BH.expand(heads)
        halves, each = (None, 0) if length else _halves(ranges, runs, group_BH, key_heads)
        about = _entries(ranges, runs) if halves is None else _pairs(ranges, halves)
        entries, about_GQ3 = about
        tasks = in_order(tasks_of(about_GQ3, entries, group_BH, key_heads, each), section)
        parts = parts_of(tasks[:, 5], len(entries) - 1) if halves is None else 1
        if parts > 1:
            unseen = runs.tiles.last.amax().int()
            tasks = split(tasks, parts, heads[0], entries, unseen)
        return HopperPlan(
            lo_GNm.mT.flatten(0, 1).contiguous(),
            hi_GNm.mT.flatten(0, 1).contiguous(),
            entries,
            tasks,
            parts,
            each,
        )

    return PLANS.plan_of(ranges, kind, lambda: content, make)


def _runs_of(ranges: KeyRanges, length: int | None = None) -> _Runs:
    kept = _runs.setdefault(ranges, {})
    if length not in kept:
        kept[length] = _find_runs(ranges, length, TILE)
    return kept[length]


def _halves(
    ranges: KeyRanges, runs: _Runs, group_BH: Tensor, key_heads: tuple[int, ...]
) -> tuple[_Runs | None, int]:
    """Halves of tiles where they make far fewer of them, and for how many heads; else None and 0.

    Args:
        ranges: visible keys.
        runs: their tiles.
        group_BH: range group of each query head.
        key_heads: batch rows of the keys, and key heads.
    """
    count_GQ = runs.count_GQ
    tasks = group_BH.numel() * (ranges.queries // TILE)
    # At most twice as many tasks, of twice the numbers.
    if not _FEW <= tasks < MOST_TASKS // 4:
        return None, 0
    seen = (ranges.hi_GNm - ranges.lo_GNm).clamp(min=0).sum(dtype=torch.int64)
    same = _neighbours_alike(group_BH, key_heads)
    tiles, pairs, same = torch.stack([count_GQ.sum(), seen, same.long()]).tolist()
    # A half tile is half of the queries with the keys of a whole one.
    each, worth, least = (2, 2.0, _IN_VAIN) if same else (1, 1 / _ALONE, 2 * _ALONE / _WORTH)
    if tiles > _MOST_PAIRED or tiles * TILE**2 < least * pairs:
        return None, 0
    halves = _find_runs(ranges, None, HALF)
    found = int(((halves.count_GQ + 1) // 2).sum())
    return (halves, each) if found <= _WORTH * worth * tiles else (None, 0)


def _neighbours_alike(group_BH: Tensor, key_heads: tuple[int, ...]) -> Tensor:
    """Whether each two neighbouring query heads share a key head and see the same, bool []."""
    if group_BH.shape[1] // key_heads[1] % 2:
        return torch.zeros((), dtype=torch.bool, device=group_BH.device)
    return (group_BH[:, ::2] == group_BH[:, 1::2]).all()


def _find_runs(ranges: KeyRanges, in_row: int | None, size: int) -> _Runs:
    tiles = row_tiles(ranges, size)
    if in_row is not None or ranges.more is not None:
        # No tile reads keys of two batch rows, or of two tensors.
        first, last = (_part(ranges, in_row, x) for x in (tiles.first, tiles.last - 1))
        tiles.first.sub_((tiles.first % size).masked_fill(first == last, 0))
    groups, rows, count = tiles.first.shape
    # A task without keys reads a tile that it does not see.
    none_GQ = (tiles.last == 0).all(-1)
    tiles.first[..., 0].masked_fill_(none_GQ, 0)
    tiles.last[..., 0].masked_fill_(none_GQ, 1)
    first, begun, ended, last, every = (x.flatten() for x in tiles)
    # Tiles before the ones that all rows see whole, these, and tiles behind them.
    length = _tiles(last - first, size)
    before = torch.minimum(_tiles(begun - first, size), length)
    whole = ((ended - first) // size - before).clamp(min=0) * every
    before = before.where(whole > 0, length)
    behind = length - before - whole
    gaps = (begun > ended).nonzero()[:, 0]
    key_s, length_s, at_s = _without_gaps(ranges, first, gaps, size)
    before_key, whole_key, behind_key = (
        first,
        first + before * size,
        first + (before + whole) * size,
    )
    before = before.index_fill(0, gaps, 0)
    # A whole tile leads where there is one: the first product of a task then needs no mask.
    some = (whole > 0).view(-1, count)
    lead = (some & (some.cumsum(1) == 1)).flatten().long()
    at = torch.arange(len(first), device=first.device)
    key_R = torch.cat([whole_key, before_key, behind_key, key_s, whole_key + lead * size])
    length_R = torch.cat([lead, before, behind, length_s, whole - lead])
    at_R = torch.cat([at, at, at, at_s, at])
    place_R = torch.arange(len(key_R), device=at.device)
    leads_R, full_R = place_R < len(at), place_R >= len(key_R) - len(at)
    task_R = at_R // count
    count_GQ, edges_GQ = (
        x_R.new_zeros(groups * rows).index_add_(0, task_R, x_R).view(groups, rows)
        for x_R in (length_R, length_R.masked_fill(full_R, 0))
    )
    used = length_R.nonzero()[:, 0]
    used = used[(3 * task_R + 1 + full_R.long() - leads_R.long())[used].argsort(stable=True)]
    edge_R = ~(leads_R | full_R)
    runs = (key_R[used], length_R[used], at_R[used], edge_R[used])
    return _Runs(*runs, count_GQ, edges_GQ, tiles, size)


def _part(ranges: KeyRanges, in_row: int | None, key: Tensor) -> Tensor:
    """Which stretch of memory keys lie in."""
    if in_row is not None:
        return key // in_row
    assert ranges.more is not None
    return ranges.more.part(key)


def _tiles(keys: Tensor, size: int) -> Tensor:
    return -(-keys.clamp(min=0) // size)


def _without_gaps(
    ranges: KeyRanges, first_X: Tensor, at_s: Tensor, size: int
) -> tuple[Tensor, ...]:
    """Runs of tiles of some ranges whose rows have no key in common.

    Args:
        ranges: visible keys.
        first_X: the first key of each [G, Q, m].
        at_s: which ones.
        size: rows of a task, and keys of a tile.

    Returns:
        First key and number of tiles of each run, and whose it is.
    """
    lo, hi = (
        by_tile(x, size, 0).transpose(2, 3).flatten(0, 2)[at_s]
        for x in (ranges.lo_GNm, ranges.hi_GNm)
    )
    # All counted in tiles from the first key on. Rows in the order in which their tiles begin;
    # those without any last.
    some, first = lo < hi, first_X[at_s, None]
    most = ranges.keys // size + 1
    lo, order = ((lo - first) // size).where(some, most).sort(dim=1)
    seen = _tiles(hi - first, size).where(some, 0).gather(1, order).cummax(1).values
    begins = lo < most
    begins[:, 1:] &= lo[:, 1:] > seen[:, :-1]
    at = begins.flatten().nonzero()[:, 0]
    # Each run ends before the next one begins, and some row begins the first one of its rows.
    stop = torch.cat([at[1:], at.new_tensor([begins.numel()])])[: len(at)] - 1
    whose, begin = at // size, lo.flatten()[at]
    return first[whose, 0] + begin * size, seen.flatten()[stop] - begin, at_s[whose]


def _entries(ranges: KeyRanges, runs: _Runs) -> tuple[Tensor, Tensor]:
    """Tiles of all tasks: int32 [E + 1, 2], one more than there are, for who reads ahead.

    And for each task the first one, how many come before those that are whole, and all [G, Q, 3].
    """
    entries_E2, edge_s, at_s = _listed(ranges, runs)
    entries_E2[edge_s, 1] += _bits(ranges, runs.tiles, entries_E2[edge_s, 0], at_s)
    end_GQ = runs.count_GQ.flatten().cumsum(0, dtype=torch.int64).view_as(runs.count_GQ)
    about = (end_GQ - runs.count_GQ, runs.edges_GQ, runs.count_GQ)
    return entries_E2, torch.stack(about, -1)


def _pairs(ranges: KeyRanges, halves: _Runs) -> tuple[Tensor, Tensor]:
    """The same of tiles of two halves each: int32 [E + 1, 4]."""
    half_E2, edge_s, at_s = _listed(ranges, halves)
    lower_s, upper_s = cuts(halves.tiles, half_E2[edge_s, 0], at_s, HALF)
    half_E2[edge_s, 1] += 1 + (lower_s.int() << (4 + upper_s.int()))
    counts = (x.flatten().long() for x in (halves.count_GQ, halves.edges_GQ))
    entries_E4, *about = paired(half_E2[:-1], *counts, behind=ranges.keys)
    return entries_E4, torch.stack(about, -1).view(*halves.count_GQ.shape, 3)


def _listed(ranges: KeyRanges, runs: _Runs) -> tuple[Tensor, Tensor, Tensor]:
    """Runs written out: int32 [E + 1, 2]; which have a mask, and whose those are, of X."""
    length_R, size = runs.length_R, runs.size
    start_R = length_R.cumsum(0, dtype=torch.int64) - length_R
    count = int(start_R[-1] + length_R[-1])
    entries_E2 = runs.key_R.new_zeros(count + 1, 2, dtype=torch.int32)
    for column, number_R in enumerate((runs.key_R - size * start_R, _plane(ranges, runs))):
        number_E = number_R.repeat_interleave(length_R, output_size=count)
        if column == 0:
            number_E += torch.arange(0, size * count, size, device=number_E.device)
        entries_E2[:-1, column] = number_E
    entries_E2[:, 1] *= 64
    # The edges alone once more, with whose they are.
    length_R, start_R, at_R = (x[runs.edge_R] for x in (length_R, start_R, runs.at_R))
    shift_R = start_R - (length_R.cumsum(0, dtype=torch.int64) - length_R)
    at_s, edge_s = (x.repeat_interleave(length_R) for x in (at_R, shift_R))
    edge_s += torch.arange(len(edge_s), device=edge_s.device)
    return entries_E2, edge_s, at_s


def _plane(ranges: KeyRanges, runs: _Runs) -> Tensor:
    """The row of bounds of each run."""
    _, rows, count = ranges.lo_GNm.shape
    at_R = runs.at_R
    return at_R // (-(-rows // runs.size) * count) * count + at_R % count


def _bits(ranges: KeyRanges, tiles: RowTiles, key_s: Tensor, at_s: Tensor) -> Tensor:
    """How tiles that need a mask are cut: the bits of ``_hopper_forward``.

    Args:
        ranges: visible keys.
        tiles: their bounds by tasks.
        key_s: the first key of each tile.
        at_s: whose it is, of X.
    """
    lower_s, upper_s = cuts(tiles, key_s, at_s)
    # 16 where only lower bounds cut, 32 where both do.
    bits_s = lower_s.int() << (4 + upper_s.int())
    halves = row_tiles(ranges, TILE // 2)
    for half, (first_s, last_s) in enumerate(zip(*_by_half(halves, at_s), strict=True)):
        middle_s = key_s + TILE // 2
        sees_first = (middle_s > first_s) & (key_s < last_s)
        sees_last = (key_s + TILE > first_s) & (middle_s < last_s)
        kind_s = torch.where(sees_last, torch.where(sees_first, 1, 3), 2)
        bits_s = bits_s + (kind_s << (2 * half))
    return bits_s.int()


def cuts(tiles: RowTiles, key_s: Tensor, at_s: Tensor, size: int = TILE) -> tuple[Tensor, Tensor]:
    """Whether lower bounds, and upper bounds, cut some tiles of keys.

    Args:
        tiles: bounds by tiles of rows.
        key_s: the first key of each tile.
        at_s: whose it is, of X.
        size: keys of a tile.
    """
    begun_s, ended_s, whole_s = (
        x.flatten().index_select(0, at_s) for x in (tiles.begun, tiles.ended, tiles.whole)
    )
    # Rows that lack the range say so by both of their bounds.
    return (key_s < begun_s) | ~whole_s, (key_s + size > ended_s) | ~whole_s


def _by_half(halves: RowTiles, at_s: Tensor) -> tuple[Tensor, Tensor]:
    """First and last of some of X for each half of their rows, [W, s]."""

    def paired(x_GQm: Tensor, fill: int) -> Tensor:
        x_GQWm = by_tile(x_GQm, 2, fill)
        return x_GQWm.transpose(2, 3).reshape(-1, 2)[at_s].T

    return paired(halves.first, 0), paired(halves.last, 0)
