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

# Behind every interval that is written as one number.
_UNUSED = END << 32


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
        both = np.empty((2, rows, len(intervals)), np.int64)
        for t, (lo, hi) in enumerate(intervals):
            # Which refuses fractions.
            np.copyto(both[0, :, t], lo, casting="same_kind")
            np.copyto(both[1, :, t], hi, casting="same_kind")
        np.minimum(np.maximum(both, 0, out=both), END, out=both)
        return normal(*both)

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
        return joint((self, other))

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


def joint(parts: Sequence[Ranges]) -> Ranges:
    """The union of one or more, each row's own; one by one, many would be sorted as often."""
    if len(parts) == 1:
        return parts[0]
    lo, hi = (np.concatenate([getattr(x, edge) for x in parts], axis=1) for edge in ("lo", "hi"))
    return normal(lo, hi)


def normal(lo: Positions, hi: Positions) -> Ranges:
    """Normal form of any intervals [n, m] in [0, END]: they may be empty, overlap, be unsorted."""
    if lo.shape[1] == 1:
        used = lo < hi
        return Ranges(lo * used, hi * used)
    # An interval in one number, so that sorting numbers sorts intervals.
    code = np.where(lo < hi, lo << 32 | hi, _UNUSED)
    if not _rises(code):
        # Columns in the order of the last row: for most patterns that sorts all rows.
        code = code[:, np.argsort(code[-1], kind="stable")]
        if not _rises(code):
            code.sort(axis=1)
    code[code == _UNUSED] = 0
    lo, hi = code >> 32, code & (1 << 32) - 1
    touch = (hi[:, :-1] >= lo[:, 1:]) & (hi[:, 1:] > 0)
    if touch.any():
        rows = touch.any(axis=1)
        lo[rows], hi[rows] = _merged(lo[rows], hi[rows])
    width = lo.shape[1]
    while width > 1 and not hi[:, width - 1].any():
        width -= 1
    return Ranges(lo[:, :width], hi[:, :width])


def _rises(code: Positions) -> bool:
    return bool((code[:, :-1] <= code[:, 1:]).all())


def _merged(lo: Positions, hi: Positions) -> tuple[Positions, Positions]:
    """Join intervals that touch, in sorted rows with unused ones last."""
    used = hi > 0
    reach = np.maximum.accumulate(hi, axis=1)
    # An interval opens a new one unless it touches what came before it.
    opens, closes = used.copy(), used.copy()
    opens[:, 1:] &= lo[:, 1:] > reach[:, :-1]
    closes[:, :-1] &= opens[:, 1:] | ~used[:, 1:]
    # Both rise along a row: sorting brings the ends of each joined interval together.
    lo = np.sort(np.where(opens, lo, _UNUSED), axis=1)
    hi = np.sort(np.where(closes, reach, _UNUSED), axis=1)
    used = lo < _UNUSED
    return lo * used, hi * used
