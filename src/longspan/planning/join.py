"""Passes over several orders of keys as one pass, with the orders side by side.

    keys     | own order      | by remainder mod 32 | listed |
    ranges     window           strided - window      sinks

Two passes read every query twice and merge two outputs; one pass over twice the keys does that in
the kernel's own softmax. What it takes more is a copy of the keys, which grouped queries share. A
pair that two of the passes hold counts twice, as it does when passes are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from longspan.planning.passes import Pass, Rows


def joined(passes: Sequence[Pass], keys: int) -> tuple[Pass, ...]:
    """The same pairs with fewer passes: those whose queries stay in place become one.

    Args:
        passes: of one plan.
        keys: key rows.
    """
    side = [one for one in passes if one.query_order is None]
    # Few queries over many keys, as in decoding: copying the keys would cost more than merging.
    if len(side) < 2 or 2 * side[0].lo.shape[2] < keys:
        return tuple(passes)
    return (_side_by_side(side, keys), *(one for one in passes if one.query_order is not None))


def _side_by_side(passes: Sequence[Pass], keys: int) -> Pass:
    own = np.arange(keys, dtype=np.int32)[None]
    orders = [own if one.key_order is None else one.key_order for one in passes]
    starts = [0, *accumulate(order.shape[1] for order in orders)]
    # Heads are alike where they are alike in every pass.
    each = list(zip(*(one.head_class for one in passes), strict=True))
    classes = {c: index for index, c in enumerate(dict.fromkeys(each))}
    tables = [
        (one.lo[:, taken], one.hi[:, taken])
        for one, taken in zip(passes, map(list, zip(*classes, strict=True)), strict=True)
    ]
    lo, hi = (
        _beside(
            [
                np.where(t[0] < t[1], t[edge] + s, 0)
                for t, s in zip(tables, starts[:-1], strict=True)
            ]
        )
        for edge in (0, 1)
    )
    # Unused ranges come last, and are left out where no query needs them.
    order = np.argsort(lo >= hi, axis=-1, kind="stable")
    width = max(1, int((lo < hi).sum(axis=-1).max()))
    lo, hi = (np.take_along_axis(t, order, axis=-1)[..., :width].copy() for t in (lo, hi))
    steps = tuple(step for one in passes for step in one.steps)
    return Pass(lo, hi, tuple(classes[c] for c in each), _beside(orders), None, steps)


def _beside(tables: Sequence[Rows]) -> Rows:
    """Along the last axis, for the most batch rows that any of them has."""
    batch = max(len(table) for table in tables)
    full = [np.broadcast_to(table, (batch, *table.shape[1:])) for table in tables]
    return np.concatenate(full, axis=-1).astype(np.int32)
