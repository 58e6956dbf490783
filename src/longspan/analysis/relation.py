"""All heads of a layer together, as a relation "query sees key" that is never written out.

``keys(rows)`` answers which keys a set of queries sees, from the ranges of a plan: a range opens
at ``lo`` and closes at ``hi``, and a running sum over all of them is positive where some range is
open. O(N m) memory for m ranges per query, O(N + ranges) time per question.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy.typing import NDArray

from longspan.pattern.algebra import Mask
from longspan.planning import Pass, Plan, Ranges

Rows = NDArray[np.int64]


class Relation:
    """Which keys the queries of a plan see, whatever the head.

    Args:
        plan: of one batch row, with as many keys as queries.
    """

    def __init__(self, plan: Plan) -> None:
        self.n = plan.n
        self._parts = [_Part(part, plan.n) for part in plan.passes]

    def keys(self, rows: Mask) -> Mask:
        """Keys that some query of ``rows`` [n] sees in some head, as flags [n]."""
        seen = np.zeros(self.n, bool)
        for part in self._parts:
            seen |= part.keys(rows)
        return seen

    def blind(self) -> Mask:
        """Queries after the first whose predecessor no head sees, as flags [n - 1]."""
        sees = np.zeros(self.n, bool)
        for part in self._parts:
            sees |= part.sees(np.arange(self.n) - 1)
        return ~sees[1:]


def keys_per_query(plan: Plan) -> NDArray[np.int64]:
    """Number of keys of each query [heads, n]."""
    found = np.zeros((plan.heads, plan.n), np.int64)
    for part in plan.passes:
        per_class = (part.hi[0] - part.lo[0]).sum(axis=-1, dtype=np.int64)
        found += per_class[list(part.head_class)]
    return found


class _Part:
    """One pass, all its heads merged."""

    def __init__(self, part: Pass, n: int) -> None:
        classes = [
            Ranges(lo.astype(np.int64), hi.astype(np.int64))
            for lo, hi in zip(part.lo[0], part.hi[0], strict=True)
        ]
        merged = reduce(Ranges.__or__, classes)
        self.lo, self.hi, self.n = merged.lo, merged.hi, n

    def keys(self, rows: Mask) -> Mask:
        edge = np.bincount(self.lo[rows].ravel(), minlength=self.n + 1)
        edge -= np.bincount(self.hi[rows].ravel(), minlength=self.n + 1)
        return np.cumsum(edge)[: self.n] > 0

    def sees(self, key: Rows) -> Mask:
        """Whether each query sees the one key named for it [n]."""
        return np.logical_or.reduce((self.lo <= key[:, None]) & (key[:, None] < self.hi), axis=1)
