"""Collect the ranges of one order of keys and make passes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longspan.planning.layout import Layout
from longspan.planning.orders import query_rows
from longspan.planning.passes import Pass, Rows
from longspan.planning.ranges import Ranges
from longspan.planning.tiles import touched_tiles

# Rows of a tile, as kernels see them when nothing else is known.
TILE = 64
# Rows that see something are moved alone if they are at most this share of all.
_MOST_KEPT = 0.75
# A further pass costs about as much as this many pairs for every row, to join its results.
JOIN = 80


class PassBuilder:
    """Ranges of all heads and batch rows in one order of keys; equal ones are kept once.

    Args:
        batch: number of layouts.
        heads: query heads.
        step: what ``order_key`` says of the order.
    """

    def __init__(self, batch: int, heads: int, step: int) -> None:
        self.orders: list[Rows | None] = [None] * batch
        self._step = step
        self._kept: dict[bytes, int] = {}
        self._ranges: list[tuple[Rows, Rows]] = []
        self._which = np.full((heads, batch), -1)

    def put(self, batch_row: int, heads: Sequence[int], places: Ranges) -> None:
        """Set the ranges of some heads in one batch row."""
        lo, hi = places.lo.astype(np.int32), places.hi.astype(np.int32)
        content = hashlib.blake2b(np.ascontiguousarray(lo).data, digest_size=16)
        content.update(np.ascontiguousarray(hi).data)
        name = content.digest()
        if name not in self._kept:
            self._kept[name] = len(self._ranges)
            self._ranges.append((lo, hi))
        self._which[heads, batch_row] = self._kept[name]

    def build(self, rows: Sequence[Layout]) -> list[Pass]:
        """One pass, or two where a few rows see far more than the others."""
        lo, hi, head_class = self._tables(len(rows[0].query_position), len(rows))
        key_order = None if self._step == 1 else _stack(self.orders)
        if self._step > 1 and _scattered(lo, hi, rows[0], self._step):
            order = np.stack([query_rows(layout, self._step) for layout in rows])[:, None]
            order = _seeing(lo, hi, order)
            lo, hi = (_in_order(table, order) for table in (lo, hi))
            return [Pass(lo, hi, head_class, key_order, order, (self._step,))]
        wide = _wide(lo, hi) if self._step == 1 else np.array([], np.int64)
        if len(wide) == 0:
            return [Pass(lo, hi, head_class, key_order, None, (self._step,))]
        order = wide[None, None].astype(np.int32)
        apart = Pass(lo[:, :, wide], hi[:, :, wide], head_class, key_order, order, (self._step,))
        lo[:, :, wide], hi[:, :, wide] = 0, 0
        return [Pass(lo, hi, head_class, key_order, None, (self._step,)), apart]

    def _tables(self, n: int, batch: int) -> tuple[Rows, Rows, tuple[int, ...]]:
        """Ranges [batch, classes, n, m]; heads that agree in every batch row form a class."""
        each = [tuple(row) for row in self._which.tolist()]
        named = {row: c for c, row in enumerate(dict.fromkeys(each))}
        width = max((lo.shape[1] for lo, _ in self._ranges), default=1)
        lo = np.zeros((batch, len(named), n, width), np.int32)
        hi = np.zeros(lo.shape, np.int32)
        for row, c in named.items():
            for b, index in enumerate(row):
                if index >= 0:
                    own_lo, own_hi = self._ranges[index]
                    lo[b, c, :, : own_lo.shape[1]] = own_lo
                    hi[b, c, :, : own_hi.shape[1]] = own_hi
        self._ranges.clear()
        return lo, hi, tuple(named[row] for row in each)


def _stack(orders: Sequence[Rows | None]) -> Rows:
    """One order per batch row; short ones are filled up with row 0, which no range covers."""
    found = [np.zeros(1, np.int32) if order is None else order for order in orders]
    length = max(map(len, found))
    return np.stack([np.pad(order, (0, length - len(order))) for order in found])


def _scattered(lo: Rows, hi: Rows, layout: Layout, step: int) -> bool:
    """Whether queries in residue order touch fewer tiles than in their own; judged on some."""
    n, sample = lo.shape[2], max(2048, TILE * step)
    first = max(0, n // 2 - sample // 2)
    order = query_rows(layout, step)
    order = order[(order >= first) & (order < first + sample)]
    own = np.sort(order)
    for c in range(min(4, lo.shape[1])):
        now, then = (touched_tiles(lo[0, c, rows], hi[0, c, rows], TILE) for rows in (own, order))
        if now != then:
            return then < now
    return False


def _seeing(lo: Rows, hi: Rows, order: Rows) -> Rows:
    """The order without rows that see nothing, where that leaves out many of them.

    In a branch of LongNet each class of heads has its own few queries. Classes are filled up with
    -1 to the length of the longest.
    """
    batch, classes, n, _ = lo.shape
    sees = [[(lo[b, c] < hi[b, c]).any(axis=1) for c in range(classes)] for b in range(batch)]
    most = max(int(own.sum()) for row in sees for own in row)
    if most > _MOST_KEPT * n:
        return order
    found = np.full((batch, classes, max(1, most)), -1, np.int32)
    for b, row in enumerate(sees):
        for c, own in enumerate(row):
            left = order[b, 0][own[order[b, 0]]]
            found[b, c, : len(left)] = left
    return found


def _in_order(table: Rows, order: Rows) -> Rows:
    """Bounds [batch, classes, n, m] of the rows in an order, 0 where there is no row."""
    batch, classes, _, width = table.shape
    found = np.zeros((batch, classes, order.shape[2], width), np.int32)
    for b in range(batch):
        for c in range(classes):
            rows = order[b % len(order), c % order.shape[1]]
            found[b, c] = np.where((rows >= 0)[:, None], table[b, c, rows], 0)
    return found


def _wide(lo: Rows, hi: Rows) -> NDArray[np.int64]:
    """Scattered rows that see far more than their neighbours, such as global tokens.

    In a pass of their own they fill tiles; among others each drags a tile of rows along.
    """
    # Class by class: many heads and a million rows are a gigabyte at once.
    classes = lo.shape[1]
    total = sum((hi[:, c] - lo[:, c]).sum(axis=2, dtype=np.int64) for c in range(classes))
    keys = (np.asarray(total) / classes).max(axis=0)
    row = np.flatnonzero(keys > 4 * np.median(keys) + TILE)
    tiles = len(np.unique(row // TILE)) - -(-len(row) // TILE)
    saved = tiles * TILE * keys[row].mean() if tiles else 0
    return row if saved > JOIN * len(keys) else row[:0]
