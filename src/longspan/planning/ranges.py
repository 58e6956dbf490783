"""Sorted interval lists, one list per row, and exact set operations on them.

A row is a set of integers written as disjoint, non-touching, half-open intervals in rising order.
A batch of rows is two arrays ``lo`` and ``hi`` of shape [n, m]; unused places are ``lo == hi ==
0`` and come last, so equal sets have equal arrays up to trailing empty columns. All operations are
vectorised over rows: O(n m log m) time and O(n m) memory for m intervals per row; m stays a
handful for every published pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longspan.pattern.algebra import END, Interval, Positions
from longspan.pattern.lattice import Flags


@dataclass(frozen=True, eq=False)
class Ranges:
    """Interval lists ``lo``, ``hi`` [n, m], int64, in the normal form of the module text."""

    lo: Positions
    hi: Positions

    @classmethod
    def of(cls, intervals: Sequence[Interval], rows: int) -> Ranges:
        """Normalise intervals that may be empty, overlap and come in any order.

        Args:
            intervals: pairs of arrays broadcastable to [rows]; cut to [0, END).
            rows: number of rows n.
        """
        if not intervals:
            return cls(np.zeros((rows, 1), np.int64), np.zeros((rows, 1), np.int64))
        lo = np.stack([np.broadcast_to(lo, rows) for lo, _ in intervals], axis=1)
        hi = np.stack([np.broadcast_to(hi, rows) for _, hi in intervals], axis=1)
        return normal(np.clip(lo, 0, END), np.clip(hi, 0, END))

    @property
    def rows(self) -> int:
        """Number of rows n."""
        return self.lo.shape[0]

    @property
    def width(self) -> int:
        """Places for intervals per row m."""
        return self.lo.shape[1]

    def count(self) -> Positions:
        """Number of integers in each row [n]."""
        return (self.hi - self.lo).sum(axis=1)

    def __or__(self, other: Ranges) -> Ranges:
        return normal(
            np.concatenate([self.lo, other.lo], axis=1),
            np.concatenate([self.hi, other.hi], axis=1),
        )

    def __and__(self, other: Ranges) -> Ranges:
        lo = np.maximum(self.lo[:, :, None], other.lo[:, None, :])
        hi = np.minimum(self.hi[:, :, None], other.hi[:, None, :])
        return normal(lo.reshape(self.rows, -1), hi.reshape(self.rows, -1))

    def __sub__(self, other: Ranges) -> Ranges:
        return self & other.complement()

    def complement(self) -> Ranges:
        """All integers of [0, END) that are not in the row."""
        used = self.lo < self.hi
        gap_lo = np.concatenate([np.zeros((self.rows, 1), np.int64), self.hi], axis=1)
        gap_hi = np.concatenate(
            [np.where(used, self.lo, END), np.full((self.rows, 1), END, np.int64)], axis=1
        )
        # Behind the last used interval every place would repeat the last gap: only its first copy
        # counts.
        gap_lo[:, 1:] = np.where(used, gap_lo[:, 1:], END)
        return normal(gap_lo, gap_hi)

    def keep(self, rows: Flags) -> Ranges:
        """Empty all rows but those marked in ``rows`` [n]."""
        return Ranges(self.lo * rows[:, None], self.hi * rows[:, None])

    def fill_empty(self, start: Positions, rows: Flags | None = None) -> Ranges:
        """Give each empty row, of those marked in ``rows``, the single integer ``start`` [n]."""
        empty = ~(self.lo[:, 0] < self.hi[:, 0])
        if rows is not None:
            empty &= rows
        if not empty.any():
            return self
        lo, hi = self.lo.copy(), self.hi.copy()
        lo[empty, 0] = start[empty]
        hi[empty, 0] = start[empty] + 1
        return Ranges(lo, hi)


def normal(lo: Positions, hi: Positions) -> Ranges:
    """Normal form of any intervals [n, m]: rows may hold empty and overlapping ones, unsorted."""
    used = lo < hi
    if lo.shape[1] > 1:
        # Columns in the order of the last row: for most patterns that sorts nearly all rows.
        column = np.argsort(np.where(used[-1], lo[-1], END), kind="stable")
        if (np.diff(column) < 0).any():
            lo, hi, used = lo[:, column], hi[:, column], used[:, column]
    lo, hi = np.where(used, lo, 0), np.where(used, hi, 0)
    # Sorted and apart, unused ones last: nothing is left to do for such rows.
    ready = ((hi[:, :-1] < lo[:, 1:]) | ~used[:, 1:]).all(axis=1)
    ready &= (used[:, :-1] | ~used[:, 1:]).all(axis=1)
    if not ready.all():
        rest = ~ready
        own_lo, own_hi = _merged(lo[rest], hi[rest])
        width = own_lo.shape[1]
        lo[rest, :width], hi[rest, :width] = own_lo, own_hi
        lo[rest, width:], hi[rest, width:] = 0, 0
    width = lo.shape[1]
    while width > 1 and not hi[:, width - 1].any():
        width -= 1
    return Ranges(lo[:, :width], hi[:, :width])


def _merged(lo: Positions, hi: Positions) -> tuple[Positions, Positions]:
    """Sort rows of intervals and join those that touch; empty ones are 0 and come in any order."""
    # Empty intervals sort behind all others.
    lo = np.where(lo < hi, lo, END)
    order = np.argsort(lo, axis=1, kind="stable")
    lo = np.take_along_axis(lo, order, axis=1)
    hi = np.where(lo < END, np.take_along_axis(hi, order, axis=1), 0)
    reach = np.maximum.accumulate(hi, axis=1)
    # An interval opens a new one unless it touches what came before it.
    opens = lo < END
    opens[:, 1:] &= lo[:, 1:] > reach[:, :-1]
    place = np.cumsum(opens, axis=1) - 1
    out_lo, out_hi = np.zeros_like(lo), np.zeros_like(lo)
    for column in range(lo.shape[1]):
        row = np.flatnonzero(lo[:, column] < END)
        target = place[row, column]
        first = opens[row, column]
        out_lo[row[first], target[first]] = lo[row[first], column]
        out_hi[row, target] = reach[row, column]
    return out_lo, out_hi
