"""Leave out keys that no query sees from the order of a pass.

    keys    | own order | rem 0 | rem 1 | rem 2 | rem 3 |    heads stride by 4, from 0 and from 2
        ->  | own order | rem 0 | rem 2 |

An order by remainder holds all keys once, but with fewer heads than remainders, or few queries,
much of it is seen by none; gathering it costs memory for nothing. Whole tiles go, so that what
begins at a tile's edge still does. O(n m) time for each class of heads, O(keys) memory.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from longspan.planning.passes import Pass, Rows

# Rows of a tile, as GPU kernels see them.
_TILE = 128
# Less than this share of the keys is not worth moving the ranges.
_LEAST_SHARE = 1 / 8


def trimmed(one: Pass) -> Pass:
    """The same pairs over fewer keys, if a good part of them is seen by no query."""
    if one.key_order is None or len(one.lo) > 1 or len(one.key_order) > 1:
        return one
    order = one.key_order[0]
    starts, stops = _idle(one, len(order))
    if (stops - starts).sum() < _LEAST_SHARE * len(order):
        return one
    change = np.zeros(len(order) + 1, np.int64)
    change[starts] += 1
    change[stops] -= 1
    gone = change.cumsum().astype(bool)
    if gone[:-1].all():
        return one
    # How many of the keys before each place go; bounds are places, or one behind the last.
    before = np.concatenate([[0], gone[:-1].cumsum()]).astype(np.int32)
    lo, hi = np.empty_like(one.lo), np.empty_like(one.hi)
    # Class by class: a million queries of many heads are gigabytes at once.
    for c in range(one.lo.shape[1]):
        used = one.lo[0, c] < one.hi[0, c]
        for old, new in ((one.lo, lo), (one.hi, hi)):
            new[0, c] = np.where(used, old[0, c] - before[old[0, c]], 0)
    return replace(one, lo=lo, hi=hi, key_order=order[~gone[:-1]][None])


def _idle(one: Pass, places: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stretches of whole tiles that no range touches: where they start and stop."""
    times = sum(times_seen(lo, hi, places) for lo, hi in zip(one.lo[0], one.hi[0], strict=True))
    idle = np.concatenate([[False], np.equal(times, 0), [False]])
    turns = np.flatnonzero(idle[1:] != idle[:-1])
    starts, stops = turns[::2], turns[1::2]
    # From the end of a stretch backwards, so that what follows keeps its place in its tile.
    starts = stops - (stops - starts) // _TILE * _TILE
    some = starts < stops
    return starts[some], stops[some]


def times_seen(lo: Rows, hi: Rows, places: int) -> NDArray[np.int64]:
    """How many of the ranges hold each place."""
    used = lo < hi
    change = np.bincount(lo[used], minlength=places + 1)
    change -= np.bincount(hi[used], minlength=places + 1)
    return change[:places].cumsum()
