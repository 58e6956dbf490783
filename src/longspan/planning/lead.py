"""A few keys that nearly all queries see, in front of the keys that they see next.

    keys     window | by remainder           keys     window | sink, remainder 0 | sink, rem...
    ranges   sink, window, strided     ->    ranges   window, sink and strided in one

A sink is a handful of keys, but a kernel visits a tile for them, and in the backward all queries
wait for that one tile. Behind a copy of the sink the strided keys of a class begin, so that two
ranges become one and the tile is gone. Each such stretch begins at a tile's edge.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from longspan.planning.passes import Pass, Rows, used_first, used_of

# Rows of a tile, as GPU kernels see them.
_TILE = 128
# Keys that a copy may have, and what share of all queries has to see it.
_MOST_KEYS = 32
_LEAST_SHARE = 0.5


def led(one: Pass) -> Pass:
    """The same pairs, with a narrow first range put in front of the last range of each class.

    Args:
        one: a pass, of any number of orders of keys side by side.
    """
    if one.key_order is None or len(one.lo) > 1 or len(one.key_order) > 1 or one.lo.shape[3] < 2:
        return one
    lo, hi = one.lo[0], one.hi[0]
    begin, end = int(lo[0, -1, 0]), int(hi[0, -1, 0])
    if not 0 < end - begin <= _MOST_KEYS:
        return one
    # Where the last range of each class begins, as its last query has it.
    cut, _ = _last(lo[:, -1], hi[:, -1])
    cuts = np.unique(cut)
    if cuts[0] < end:
        return one
    order, shift = _with_copies(one.key_order[0], cuts, begin, end)
    # Growing the keys by half would cost more than the tile.
    if len(order) > 1.5 * len(one.key_order[0]):
        return one
    lo, hi, count = lo.copy(), hi.copy(), 0
    ends = np.append(cuts, len(one.key_order[0]))
    # Class by class: a million queries of many heads are gigabytes at once.
    for own_lo, own_hi, first in zip(lo, hi, cut, strict=True):
        used = own_lo < own_hi
        segment = np.searchsorted(cuts, own_lo, side="right")
        if (used & (own_hi > ends[segment])).any():
            return one
        start, last = _last(own_lo, own_hi)
        moved = (own_lo[:, 0] == begin) & (own_hi[:, 0] == end) & (last > 0) & (start == first)
        move = shift[segment] * used
        for table in (own_lo, own_hi):
            table += move
        row = np.flatnonzero(moved)
        own_lo[row, last[row]] -= end - begin
        own_lo[row, 0] = own_hi[row, 0] = 0
        count += len(row)
    if count < _LEAST_SHARE * lo.shape[0] * lo.shape[1]:
        return one
    lo, hi = used_first(lo[None], hi[None])
    return replace(one, lo=lo, hi=hi, key_order=order[None])


def _last(lo: Rows, hi: Rows) -> tuple[Rows, NDArray[np.int32]]:
    """Where the last used range of each row begins, and which one it is, -1 for none."""
    last = used_of(lo < hi) - 1
    return np.take_along_axis(lo, last.clip(min=0)[:, None], axis=1)[:, 0], last


def _with_copies(
    order: Rows, cuts: NDArray[np.integer], begin: int, end: int
) -> tuple[Rows, NDArray[np.int32]]:
    """The order with copies of places ``begin`` to ``end`` in front of each cut.

    Also by how much the places move, before the first cut and after each.
    """
    parts, shift, size = [order[: cuts[0]]], [0], int(cuts[0])
    for at, first in enumerate(cuts):
        stop = cuts[at + 1] if at + 1 < len(cuts) else len(order)
        gap = -size % _TILE
        parts += [np.full(gap, -1, np.int32), order[begin:end], order[first:stop]]
        shift.append(size + gap + end - begin - int(first))
        size += gap + end - begin + int(stop - first)
    # Kernels are faster where all tiles are whole.
    parts.append(np.full(-size % _TILE, -1, np.int32))
    return np.concatenate(parts).astype(np.int32), np.array(shift, np.int32)
