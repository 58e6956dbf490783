"""Keys of a pass for each key head alone, where heads see keys of their own.

    all heads   | rem 0 | rem 1 | rem 2 | rem 3 |        head 0  | rem 0 |
                                                    ->   head 1  | rem 1 |   ...

A branch of LongNet or a strided pattern lets each head see one remainder. An order of keys for
all heads holds every remainder; gathered for each key head alone it holds one. O(n m) time for
each class of heads, O(keys) memory.

Axes: C classes of heads, N query rows, m ranges per query, K key heads, P places.
"""

from __future__ import annotations

import numpy as np

from longspan.planning import Pass
from longspan.planning.passes import Rows
from longspan.planning.trim import times_seen

# With more of the places than this left there is too little to gain.
_MOST_SHARE = 0.75


def own_keys(one: Pass, key_heads: int) -> tuple[Rows, Rows, Rows] | None:
    """The order of keys of each key head, and the ranges in it.

    Args:
        one: a pass in which all heads take part.
        key_heads: key heads K.

    Returns:
        first and last places [1, C, N, m], and order [1, K, P], -1 for places without a key. None
        where heads of one key head differ, or where it would save little.
    """
    if one.key_order is None or len(one.lo) > 1 or len(one.key_order) > 1:
        return None
    of_key_head = np.array(one.head_class).reshape(key_heads, -1)
    if (of_key_head != of_key_head[:, :1]).any():
        return None
    order = one.key_order[0]
    tables = zip(one.lo[0], one.hi[0], strict=True)
    seen = [times_seen(own_lo, own_hi, len(order)) > 0 for own_lo, own_hi in tables]
    places = max(int(s.sum()) for s in seen)
    if not 0 < places <= _MOST_SHARE * len(order):
        return None
    lo, hi = np.empty_like(one.lo), np.empty_like(one.hi)
    table = np.full((len(seen), places), -1, np.int32)
    for c, own in enumerate(seen):
        # All places inside a range are seen, so they lie side by side again.
        before = np.concatenate([[0], own.cumsum()]).astype(np.int32)
        used = one.lo[0, c] < one.hi[0, c]
        for old, new in ((one.lo, lo), (one.hi, hi)):
            new[0, c] = np.where(used, before[old[0, c]], 0)
        table[c, : before[-1]] = order[own]
    return lo, hi, table[of_key_head[:, 0]][None]
