"""All heads of a layer together, as a relation "query sees key" that is never written out.

``keys(rows)`` answers which keys a set of queries sees, from the ranges of a plan: a range opens
at ``lo`` and closes at ``hi``, and a running sum over all of them is positive where some range is
open. O(N m) memory for m ranges per query, O(N + ranges) time per question.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from longspan.pattern.algebra import Mask
from longspan.planning import Pass, Plan, Ranges

# Merging the ranges of all heads pays for chunks and windows, which touch; not for scattered ones.
_MERGED = 64


class Relation:
    """Which keys the queries of a plan see, whatever the head.

    Args:
        plan: of one batch row.
        heads: heads that count; default all.
    """

    def __init__(self, plan: Plan, heads: Sequence[int] | None = None) -> None:
        self.n, self._keys = plan.n, plan.keys
        counted = range(plan.heads) if heads is None else heads
        self._parts = [_Part(part, plan, counted) for part in plan.passes]

    def keys(self, rows: Mask) -> Mask:
        """Keys that some query of ``rows`` [n] sees in some head, as flags [keys]."""
        seen = np.zeros(self._keys, bool)
        for part in self._parts:
            part.mark(rows, seen)
        return seen


def keys_per_query(plan: Plan) -> NDArray[np.int64]:
    """Number of keys of each query [heads, n]."""
    found = np.zeros((plan.heads, plan.n), np.int64)
    for part in plan.passes:
        per_class = (part.hi[0] - part.lo[0]).sum(axis=-1, dtype=np.int64)
        for head, own in enumerate(part.head_class):
            rows = part.rows(0, own, plan.n)
            found[head, rows[rows >= 0]] += per_class[own, rows >= 0]
    return found


class _Part:
    """One pass, its heads merged where that makes less of them."""

    def __init__(self, part: Pass, plan: Plan, heads: Sequence[int]) -> None:
        numbers = sorted({part.head_class[head] for head in heads})
        self.classes = [(part.lo[0, one], part.hi[0, one]) for one in numbers]
        alike = part.query_order is None or part.query_order.shape[1] == 1
        if alike and len(self.classes) * part.lo.shape[3] <= _MERGED:
            each = [Ranges(lo.astype(np.int64), hi.astype(np.int64)) for lo, hi in self.classes]
            merged = reduce(Ranges.__or__, each)
            self.classes = [(merged.lo, merged.hi)]
            numbers = numbers[:1]
        self.queries = [part.rows(0, one, plan.n) for one in numbers]
        self.order = None if part.key_order is None else part.key_order[0]
        self.places = plan.keys if self.order is None else len(self.order)

    def mark(self, rows: Mask, seen: Mask) -> None:
        """Set the flags of the keys that ``rows`` see."""
        edge = np.zeros(self.places + 1, np.int64)
        for (lo, hi), queries in zip(self.classes, self.queries, strict=True):
            asked = np.flatnonzero(rows[queries])
            edge += np.bincount(lo[asked].ravel(), minlength=self.places + 1)
            edge -= np.bincount(hi[asked].ravel(), minlength=self.places + 1)
        inside = np.cumsum(edge)[: self.places] > 0
        if self.order is None:
            seen |= inside
        else:
            seen[self.order[inside]] = True
