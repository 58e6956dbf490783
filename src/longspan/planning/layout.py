"""Rows, positions and segments: how the tokens of a pattern lie in a tensor.

Every query row and key row carries a position and a segment. A row sees only rows of its own
segment, patterns speak of positions inside it, and a negative segment marks padding, which neither
sees nor is seen. Left padding, packed documents, a cache with holes, one-token decoding and a
shard of a longer sequence differ in these numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longspan.errors import PlanError
from longspan.pattern.algebra import END, Positions
from longspan.planning.ranges import Ranges


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions and segments of one batch row.

    Attributes:
        query_position: [n] int64, where each query stands in its segment.
        query_segment: [n] int64, negative for padding.
        key_position: [m] int64, rising inside each segment.
        key_segment: [m] int64, negative for padding; rows of a segment lie side by side but for
            padding.
        counted: known to be ``plain``, as where nobody said anything of the rows: a look at all
            keys for each new token would take longer than its attention.
    """

    query_position: Positions
    query_segment: Positions
    key_position: Positions
    key_segment: Positions
    counted: bool = False

    @classmethod
    def of_last(cls, n: int, keys: int) -> Layout:
        """One segment of keys, whose last rows are the queries."""
        position, segment = np.arange(keys), np.zeros(keys, np.int64)
        return cls(position[keys - n :], segment[keys - n :], position, segment, counted=True)

    @cached_property
    def query_lengths(self) -> Positions:
        """For each query, one past the last key position of its segment (0 for padding) [n]."""
        if self.counted:
            return np.full(len(self.query_segment), len(self.key_segment))
        rows, number, own = self.numbers
        # Positions rise inside a segment, so that the greatest one is the last.
        last = np.flatnonzero(np.diff(number, append=-1))
        ends = np.append(self.key_position[rows[last]] + 1, 0)
        return ends[own]

    def rows_of(self, positions: Ranges) -> Ranges:
        """Key rows of each query's segment whose positions lie in the query's ranges.

        Args:
            positions: ranges of positions [n, t], one row per query.

        Returns:
            Ranges of key rows [n, t']; padding rows are left out, and padding queries have none.
        """
        if self.plain:
            end = len(self.key_position)
            return Ranges(np.minimum(positions.lo, end), np.minimum(positions.hi, end))
        rows, number, own = self.numbers
        if len(rows) == 0:
            return Ranges.of([], len(self.query_position))
        # (segment, position) rises along the rows.
        key = number * (END + 1) + self.key_position[rows]
        base = own[:, None] * (END + 1)
        lo = np.searchsorted(key, base + positions.lo)
        hi = np.searchsorted(key, base + positions.hi)
        absent = (own < 0)[:, None] | (positions.lo >= positions.hi)
        hi = np.where(absent, lo, hi)
        return self._skip_padding(lo, hi, rows)

    @cached_property
    def numbers(self) -> tuple[Positions, Positions, Positions]:
        """Segments counted in the order in which they appear.

        Returns:
            The key rows that are no padding, the number of the segment of each of them, and that
            of each query, -1 where no key belongs to it.
        """
        rows = np.flatnonzero(self.key_segment >= 0)
        segment = self.key_segment[rows]
        border = np.flatnonzero(np.diff(segment, prepend=-1))
        number = np.repeat(np.arange(len(border)), np.diff(border, append=len(rows)))
        known = {int(segment[at]): index for index, at in enumerate(border)}
        asked, place = np.unique(self.query_segment, return_inverse=True)
        own = np.array([known.get(int(s), -1) for s in asked], np.int64)[place]
        return rows, number, own

    @cached_property
    def plain(self) -> bool:
        """True if there is one segment, and key row j stands at position j: the common case."""
        if self.counted:
            return True
        segments = (self.query_segment, self.key_segment)
        return all((segment == self.key_segment[0]).all() for segment in segments) and bool(
            self.key_segment[0] >= 0
            and self.key_position[0] == 0
            and self.key_position[-1] == len(self.key_position) - 1
        )

    def _skip_padding(self, lo: Positions, hi: Positions, rows: Positions) -> Ranges:
        """Turn ranges over the unpadded rows into ranges over all rows."""
        used = lo < hi
        first = np.where(used, rows[np.minimum(lo, len(rows) - 1)], 0)
        last = np.where(used, rows[hi - 1] + 1, 0)
        pairs = [(first[:, t], last[:, t]) for t in range(lo.shape[1])]
        found = Ranges.of(pairs, len(lo))
        # Padding in the middle of what is used would fall inside a range: cut it out.
        breaks = np.flatnonzero(np.diff(rows) > 1)
        if len(breaks) == 0:
            return found
        run_lo = np.concatenate([[rows[0]], rows[breaks + 1]])
        run_hi = np.concatenate([rows[breaks] + 1, [rows[-1] + 1]])
        return found & Ranges.of(list(zip(run_lo, run_hi, strict=True)), len(lo))


def layouts(
    n: int,
    keys: int,
    positions: ArrayLike | None = None,
    segments: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    key_segments: ArrayLike | None = None,
) -> list[Layout]:
    """Check what the caller said of rows and fill in the defaults.

    Args:
        n: query rows.
        keys: key rows.
        positions: query positions [n] or [batch, n]; default: counted inside each segment.
        segments: query segments, same shape; default: one segment.
        key_positions: key positions [keys] or [batch, keys]; default: those of the queries where
            the numbers of rows agree, else 0, 1, 2, ... with the queries as the last rows.
        key_segments: key segments, same shape; default: those of the queries, likewise.

    Returns:
        One layout, or one per batch row where any argument differs between batch rows.

    Raises:
        PlanError: for shapes that do not fit, positions that do not rise, or a segment in two
            places.
    """
    if n < 1 or keys < 1:
        raise PlanError(f"expected at least one query row and one key row, got {n} and {keys}")
    given = (positions, segments, key_positions, key_segments)
    if n <= keys and all(one is None for one in given):
        return [Layout.of_last(n, keys)]
    query_segment = table("segments", segments, n)
    key_segment = table("key_segments", key_segments, keys)
    query_position = table("positions", positions, n)
    key_position = table("key_positions", key_positions, keys)
    if n > keys and (query_position is None or key_position is None):
        raise PlanError(
            f"{n} query rows but only {keys} key rows: say where both stand with positions= and "
            "key_positions="
        )
    if query_segment is not None and key_segment is None and n != keys:
        raise PlanError(f"segments= is for {n} query rows; {keys} key rows need key_segments= too")
    if key_segment is not None and query_segment is None and n > keys:
        raise PlanError(f"key_segments= is for {keys} key rows; {n} query rows need segments= too")
    if key_segment is None:
        key_segment = np.zeros((1, keys), np.int64) if query_segment is None else query_segment
    if query_segment is None:
        query_segment = key_segment[:, keys - n :] if n <= keys else np.zeros((1, n), np.int64)
    if key_position is None:
        key_position = np.stack([_count(row) for row in key_segment])
        if query_position is not None and n == keys:
            key_position = query_position
    if query_position is None:
        query_position = key_position[:, keys - n :]
    tables = [query_position, query_segment, key_position, key_segment]
    batch = max(map(len, tables))
    if any(len(one) not in (1, batch) for one in tables):
        raise PlanError(f"batch sizes differ: {[len(one) for one in tables]}")
    full = [np.broadcast_to(one, (batch, one.shape[1])) for one in tables]
    found = [Layout(*(one[b] for one in full)) for b in range(batch)]
    for b, layout in enumerate(found):
        _check(layout, b)
    alike = all((one[:1] == one).all() for one in full)
    return found[:1] if alike else found


def table(name: str, value: ArrayLike | None, rows: int) -> Positions | None:
    """Positions or segments as int64 [1 or batch, rows]; None stays None.

    Raises:
        PlanError: for other shapes, or what is no whole number.
    """
    if value is None:
        return None
    try:
        array: NDArray[Any] = np.asarray(value)
    # What numpy and tensors say that it cannot read.
    except (ValueError, TypeError, RuntimeError) as error:
        raise PlanError(f"{name} must have shape [{rows}] or [batch, {rows}]: {error}") from None
    if array.ndim not in (1, 2) or array.shape[-1] != rows:
        raise PlanError(
            f"{name} must have shape [{rows}] or [batch, {rows}], got {list(array.shape)}"
        )
    if array.dtype.kind not in "iu":
        raise PlanError(f"{name} must be whole numbers, got {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise PlanError(f"{name} must be below 2**63, got {array.max()}")
    return np.atleast_2d(array).astype(np.int64)


def _count(segment: Positions) -> Positions:
    """Position of each row inside its segment, padding not counted."""
    rows = np.flatnonzero(segment >= 0)
    position = np.zeros(len(segment), np.int64)
    if len(rows):
        used = segment[rows]
        starts = np.flatnonzero(np.diff(used, prepend=used[0] - 1))
        first = np.repeat(starts, np.diff(starts, append=len(rows)))
        position[rows] = np.arange(len(rows)) - first
    return position


def _check(layout: Layout, batch_row: int) -> None:
    rows = np.flatnonzero(layout.key_segment >= 0)
    segment, position = layout.key_segment[rows], layout.key_position[rows]
    where = f" (batch row {batch_row})"
    starts = np.flatnonzero(np.diff(segment, prepend=-1)) if len(rows) else rows
    names, seen = np.unique(segment[starts], return_counts=True)
    if (seen > 1).any():
        raise PlanError(
            f"segment {names[seen > 1][0]} appears in two places{where}: the rows of a segment "
            "must lie side by side"
        )
    inside = np.diff(segment) == 0
    if (np.diff(position)[inside] <= 0).any():
        row = int(rows[1:][inside & (np.diff(position) <= 0)][0])
        raise PlanError(
            f"key positions must rise inside a segment, but row {row}{where} holds "
            f"{layout.key_position[row]} after {layout.key_position[row - 1]}; documents that are "
            "packed side by side need segments="
        )
    valid = layout.query_position[layout.query_segment >= 0]
    for what, numbers in (("key", position), ("query", valid)):
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < END):
            raise PlanError(
                f"{what} positions must be from 0 to {END - 1}{where}, got "
                f"{numbers.min()} to {numbers.max()}"
            )
