"""A pass: one run of a kernel, as key ranges per query row, in an order of keys and queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from longspan.planning.tiles import touched_tiles

Rows = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of a kernel: key ranges for every query row.

    Attributes:
        lo: int32 [batch or 1, classes, n', m], first key place of each range.
        hi: int32, same shape, one past the last; unused ranges are empty and come last.
        head_class: the class of each query head.
        key_order: int32 [batch or 1, m'], the key row at each place, where keys are reordered,
            listed or repeated, -1 for none; None where place and row agree.
        query_order: int32 [batch or 1, classes or 1, n'], the query row at each place, each at
            most once, -1 for none; None where place and row agree. Rows that are missing see
            nothing in this pass.
        steps: what orders of keys lie side by side: the modulus of a residue order, 1 for their
            own order, 0 for listed keys.
    """

    lo: Rows
    hi: Rows
    head_class: tuple[int, ...]
    key_order: Rows | None = None
    query_order: Rows | None = None
    steps: tuple[int, ...] = (1,)

    @property
    def nbytes(self) -> int:
        """Memory of the ranges and orders, in bytes."""
        orders = [
            order.nbytes for order in (self.key_order, self.query_order) if order is not None
        ]
        return self.lo.nbytes + self.hi.nbytes + sum(orders)

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Heads that see anything in this pass."""
        used = np.asarray((self.lo < self.hi).any(axis=(0, 2, 3)))
        return tuple(h for h, c in enumerate(self.head_class) if used[c])

    @cached_property
    def _class_sizes(self) -> NDArray[np.int64]:
        return np.bincount(self.head_class, minlength=self.lo.shape[1])

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs per batch row, summed over heads; the mean over batch rows."""
        per_class = (self.hi - self.lo).sum(axis=(2, 3), dtype=np.int64)
        return int((per_class * self._class_sizes).sum() // len(self.lo))

    def tiles(self, block: int = 128) -> int:
        """Tiles of ``block x block`` that hold a pair, per batch row, summed over heads."""
        counts = [
            [touched_tiles(self.lo[b, c], self.hi[b, c], block) for c in range(self.lo.shape[1])]
            for b in range(len(self.lo))
        ]
        return int((np.array(counts) * self._class_sizes).sum() // len(self.lo))

    def counts(self, n: int, keys: int) -> NDArray[np.int64]:
        """Dense form [batch or 1, heads, n, keys]: how often each pair occurs; for tests."""
        tables = (self.lo, self.key_order, self.query_order)
        batch = max(len(table) for table in tables if table is not None)
        dense = np.zeros((batch, len(self.head_class), n, keys), np.int64)
        for b in range(batch):
            lo, hi = (t[b % len(t)][list(self.head_class), ..., None] for t in (self.lo, self.hi))
            key = self.keys(b, keys)
            place = np.arange(len(key))
            inside = np.asarray(((lo <= place) & (place < hi)).any(axis=2))
            for h, used in enumerate(inside):
                row = self.rows(b, self.head_class[h], n)
                # Places without a row see nothing and are not seen.
                at = (row.clip(min=0)[:, None] * keys + key.clip(min=0)).ravel()
                dense[b, h] = np.bincount(at, used.ravel(), n * keys).reshape(n, keys)
        return dense

    def rows(self, batch_row: int, head_class: int, n: int) -> NDArray[np.int64]:
        """The query row at each place of a class of heads, -1 for none."""
        table = self.query_order
        if table is None:
            return np.arange(n)
        return table[batch_row % len(table), head_class % table.shape[1]].astype(np.int64)

    def keys(self, batch_row: int, keys: int) -> NDArray[np.int64]:
        """The key row at each place."""
        if self.key_order is None:
            return np.arange(keys)
        return self.key_order[batch_row % len(self.key_order)].astype(np.int64)


def alike(passes: Sequence[Pass]) -> tuple[tuple[int, ...], list[list[int]]]:
    """Classes of heads that are alike in every one of several passes.

    Returns:
        The class of each head, and for each pass which of its own classes each of them is.
    """
    each = list(zip(*(one.head_class for one in passes), strict=True))
    classes = {own: index for index, own in enumerate(dict.fromkeys(each))}
    return tuple(classes[own] for own in each), list(map(list, zip(*classes, strict=True)))


def used_first(lo: Rows, hi: Rows) -> tuple[Rows, Rows]:
    """The same ranges with unused ones last, and no more of them than some query has.

    Args:
        lo: first keys [..., n, m], overwritten.
        hi: ends, overwritten.
    """
    width = 1
    # One class of heads at a time: a million queries of many heads are gigabytes at once.
    for at in np.ndindex(lo.shape[:-2]):
        own = lo[at], hi[at]
        used = own[0] < own[1]
        count = used_of(used)
        width = max(width, int(count.max()))
        if (used[:, 1:] & ~used[:, :-1]).any():
            front = np.arange(used.shape[1]) < count[:, None]
            for table in own:
                # Faster than sorting each row: both are read in the order of the rows.
                kept = table[used]
                table[...] = 0
                table[front] = kept
    return np.ascontiguousarray(lo[..., :width]), np.ascontiguousarray(hi[..., :width])


def used_of(used: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How many of each row [n, m] are set."""
    # A few columns, each at once, where numpy would go from row to row.
    count = np.zeros(len(used), np.int32)
    for column in used.T:
        count += column
    return count
