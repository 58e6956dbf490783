"""Passes over a few queries computed among all the others, as one pass.

    pass 0   all queries, a window each         | i   window
    pass 1   queries 0, 5000 and 20000, all keys ->  5000   all keys
                                                | i   window

Queries that see far more than their neighbours, such as global tokens, have a pass of their own,
where they fill a tile. A kernel that goes through a list of tiles, the longest ones first, takes
them in their own places as well: there each drags a tile of queries along, but no query is
gathered, no second kernel runs on a few processors, nothing is merged, and no gradients of two
passes are added up. That is worth a number of tiles for each row, however far the rows see.

Tiles are counted as such a kernel lists them (``_hopper_plan``), for tiles of queries with one of
the few alone: O(m) for each of their rows. The joined ranges take O(N m) time and memory.

Axes: N query rows, m ranges per query, P few queries with their batch rows and classes of heads, T
tiles of queries with one of them, G groups of ranges, Q tiles of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.ops.kernels._hopper_plan import task_tiles
from longspan.ops.kernels._hopper_tasks import TILE
from longspan.ops.ranges import KeyRanges
from longspan.planning import Pass
from longspan.planning.passes import Rows, alike

# Tiles that a pass less is worth, over all heads and batch rows. On an H200 a pass of few rows
# takes 0.6 ms of the host with backward, as long as so many tiles take the kernels; for long rows
# tiles of queries that see all keys are what others wait for.
_WORTH = 6000
_END = torch.iinfo(torch.int32).max


def few_rows(passes: Sequence[Pass]) -> tuple[tuple[int, ...], Pass] | None:
    """Passes of a plan that are better computed as one, by a kernel that takes long rows.

    Args:
        passes: all of a plan.

    Returns:
        Which they are, and the pass of the same pairs; None if there are none.
    """
    for at, whole in enumerate(passes):
        which, one = [at], whole
        for index, few in enumerate(passes):
            if whole.query_order is None and (found := _joined(one, few)):
                which.append(index)
                one = found
        if len(which) > 1:
            return tuple(sorted(which)), one
    return None


def _joined(whole: Pass, few: Pass) -> Pass | None:
    """Both as one pass; None where that cannot be, or costs too much."""
    shift = _shift(whole, few)
    if shift is None or few.query_order is None:
        return None
    head_class, (own, other) = alike([whole, few])
    own, other = np.array(own), np.array(other)
    batch = max(len(whole.lo), len(few.lo), len(few.query_order))
    order = few.query_order[:, other % few.query_order.shape[1]]
    b_P, c_P, place_P = np.nonzero(np.broadcast_to(order, (batch, *order.shape[1:])) >= 0)
    row_P = order[b_P % len(order), c_P, place_P].astype(np.int64)
    if not len(row_P):
        return None

    def both(edge: str) -> Rows:
        first, last = getattr(whole, edge), getattr(few, edge)
        found = last[b_P % len(last), other[c_P], place_P]
        return np.concatenate([first[b_P % len(first), own[c_P], row_P], found + shift], axis=1)

    lo_Pm, hi_Pm = _in_order(both("lo"), both("hi"))
    # Branches of a mixture may share keys: those count twice, which ranges cannot say.
    if (lo_Pm[:, 1:] < hi_Pm[:, :-1])[lo_Pm[:, 1:] < hi_Pm[:, 1:]].any():
        return None
    n, width = whole.lo.shape[2:]
    width = max(width, int((lo_Pm < hi_Pm).sum(axis=1).max(initial=0)))
    lo_Pm, hi_Pm = lo_Pm[:, :width], hi_Pm[:, :width]
    more_C = _more(whole, own, (b_P, c_P, row_P), (lo_Pm, hi_Pm))
    extra = (np.bincount(head_class) * more_C).sum() - batch * _alone(few)
    if extra > _WORTH:
        return None
    lo, hi = (np.zeros((batch, len(own), n, width), np.int32) for _ in range(2))
    for found, given, few_Pm in ((lo, whole.lo, lo_Pm), (hi, whole.hi, hi_Pm)):
        # Class by class: a million queries of many heads are gigabytes at once.
        for c, taken in enumerate(own):
            found[:, c, :, : given.shape[3]] = given[:, taken]
        found[b_P, c_P, row_P] = few_Pm
    return replace(whole, lo=lo, hi=hi, head_class=head_class)


def _more(
    whole: Pass,
    own: NDArray[np.int64],
    at: tuple[NDArray[np.int64], ...],
    given: tuple[Rows, Rows],
) -> NDArray[np.int64]:
    """How many tiles more the pass over all queries has in each class, over all batch rows.

    Args:
        whole: the pass.
        own: which of its classes each class is.
        at: batch row, class and row of the few queries [P].
        given: their bounds then.
    """
    b_P, c_P, row_P = at
    name_P = np.stack([b_P, c_P, row_P // TILE])
    (b_T, c_T, tile_T), at_P = np.unique(name_P, axis=1, return_inverse=True)
    old = [_rows_of(table, b_T, own[c_T], tile_T) for table in (whole.lo, whole.hi)]
    wider = given[0].shape[1] - whole.lo.shape[3]
    new = [np.pad(table, ((0, 0), (0, 0), (0, wider))) for table in old]
    for table, few_Pm in zip(new, given, strict=True):
        table[at_P.ravel(), row_P % TILE] = few_Pm
    more_T = (_tiles(*new) - _tiles(*old))[:, 0]
    return np.bincount(c_T, more_T, len(own)).astype(np.int64)


def _shift(whole: Pass, few: Pass) -> int | None:
    """How much later than in their own order keys lie in the pass of all queries; None if not so.

    They may lie behind others, as behind copies of global columns.
    """
    if few.query_order is None or few.key_order is not None:
        return None
    if whole.key_order is None:
        return 0
    used = few.lo < few.hi
    begin, end = int(few.lo[used].min(initial=_END)), int(few.hi[used].max(initial=0))
    key = np.arange(begin, end)
    for at in np.flatnonzero(whole.key_order[0] == begin):
        found = whole.key_order[:, at : at + len(key)]
        if found.shape[1] == len(key) and (found == key).all():
            return int(at) - begin
    return None


def _in_order(lo_Pm: Rows, hi_Pm: Rows) -> tuple[Rows, Rows]:
    """The ranges of each query sorted, unused ones last and 0."""
    used = lo_Pm < hi_Pm
    order = np.where(used, lo_Pm, _END).argsort(axis=1, kind="stable")
    lo_Pm, hi_Pm = (
        np.take_along_axis(np.where(used, table, 0).astype(np.int32), order, axis=1)
        for table in (lo_Pm, hi_Pm)
    )
    return lo_Pm, hi_Pm


def _rows_of(
    table: Rows, b_T: NDArray[np.int64], c_T: NDArray[np.int64], tile_T: NDArray[np.int64]
) -> Rows:
    """Bounds of all queries of some tiles [T, 128, m], 0 behind the last query."""
    row = tile_T[:, None] * TILE + np.arange(TILE)
    there = row < table.shape[2]
    found = table[(b_T % len(table))[:, None], c_T[:, None], np.where(there, row, 0)]
    return np.where(there[..., None], found, 0).astype(np.int32)


def _alone(few: Pass) -> float:
    """Tiles that the pass of few queries has, per batch row."""
    batch, classes, *rest = few.lo.shape
    tiles_GQ = _tiles(*(table.reshape(-1, *rest) for table in (few.lo, few.hi)))
    return float(tiles_GQ.sum(1).reshape(batch, classes)[:, list(few.head_class)].sum() / batch)


def _tiles(lo_GNm: Rows, hi_GNm: Rows) -> NDArray[np.int64]:
    """Tiles of keys of each tile of queries [G, Q]."""
    lo, hi = torch.from_numpy(lo_GNm), torch.from_numpy(hi_GNm)
    group = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    return task_tiles(KeyRanges(lo, hi, group, int(hi_GNm.max(initial=1)))).numpy()
