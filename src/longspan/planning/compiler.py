"""From a pattern to passes: evaluate its closed form, and lay each piece out in its order.

Every distinct order of keys becomes one pass; heads of equal ranges share them. Where remainders
change from query to query (dilated neighbourhoods, LongNet) the queries of the pass are put in
residue order too, so that a tile of queries sees one stretch of keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import And, At, Atom, Or, Pattern, Positions, Sub
from longspan.pattern.vary import PerHead
from longspan.planning.layout import Layout
from longspan.planning.orders import Order, order_key, order_of, query_rows
from longspan.planning.passes import Pass, Rows
from longspan.planning.pieces import Piece, Pieces, difference, intersection, keep_self, union
from longspan.planning.ranges import Ranges
from longspan.planning.tiles import touched_tiles


def pieces_of(pattern: Pattern, query: Positions, at: At) -> Pieces:
    """Keys that a pattern allows each query, as disjoint pieces.

    Args:
        pattern: without ``PerLayer`` parts; of a mixture, the pairs that count at least once.
        query: positions [n], int64.
        at: head and sequence.
    """
    match pattern:
        case Atom():
            found: Pieces = ()
            for lattice, intervals in pattern.progressions(query, at):
                found = union(found, (Piece(lattice, Ranges.of(intervals, len(query))),))
            return found
        case PerHead():
            chosen, inner = pattern.pick(at)
            return pieces_of(chosen, query, inner)
        case Sub(left=left, right=right):
            return difference(pieces_of(left, query, at), pieces_of(right, query, at))
        case And(parts=parts):
            return reduce(intersection, (pieces_of(part, query, at) for part in parts))
        case Or(parts=parts):
            return reduce(union, (pieces_of(part, query, at) for part in parts))
    if pattern.branches() != (pattern,):
        return reduce(union, (pieces_of(part, query, at) for part in pattern.branches()))
    raise PatternError(f"cannot plan {pattern}: {type(pattern).__name__} has no closed form")


def passes_of(pattern: Pattern, rows: Sequence[Layout], heads: int) -> tuple[Pass, ...]:
    """Lay out a pattern for batch rows and heads.

    Args:
        pattern: of one layer, checked.
        rows: one layout, or one per batch row.
        heads: query heads.
    """
    every = [At(head=h, heads=heads) for h in range(heads)]
    # Heads whose class is equal share their ranges: 32 heads of a shifted pattern need two sets
    # of them.
    classes: dict[Hashable, list[int]] = {}
    for at in every:
        classes.setdefault(pattern.head_class(at), []).append(at.head)
    branches = pattern.branches()
    builders: dict[tuple[int, int], _Builder] = {}
    for b, layout in enumerate(rows):
        orders: dict[int, Order] = {}
        for members in classes.values():
            at = replace(every[members[0]], length=layout.query_lengths)
            sets = [pieces_of(branch, layout.query_position, at) for branch in branches]
            if pattern.is_causal:
                sets = keep_self(sets, layout.query_position)
            for index, pieces in enumerate(sets):
                found: dict[int, Ranges] = {}
                for piece in pieces:
                    key = order_key(piece)
                    if key not in orders:
                        orders[key] = order_of(layout, key)
                    places = orders[key].find(piece)
                    found[key] = found[key] | places if key in found else places
                for key, places in found.items():
                    builder = builders.setdefault((index, key), _Builder(len(rows), heads))
                    builder.put(b, members, places)
        for (_, key), builder in builders.items():
            if key in orders:
                builder.orders[b] = orders[key].rows
    if not builders:
        builders[0, 1] = _Builder(len(rows), heads)
    return tuple(builder.build(rows, key) for (_, key), builder in sorted(builders.items()))


class _Builder:
    """Collects the ranges of one pass; equal ones are kept once."""

    def __init__(self, batch: int, heads: int) -> None:
        self.orders: list[Rows | None] = [None] * batch
        self._kept: dict[bytes, int] = {}
        self._ranges: list[tuple[Rows, Rows]] = []
        self._which = np.full((heads, batch), -1)

    def put(self, batch_row: int, heads: Sequence[int], places: Ranges) -> None:
        lo, hi = places.lo.astype(np.int32), places.hi.astype(np.int32)
        name = hashlib.blake2b(lo.tobytes() + hi.tobytes(), digest_size=16).digest()
        if name not in self._kept:
            self._kept[name] = len(self._ranges)
            self._ranges.append((lo, hi))
        self._which[heads, batch_row] = self._kept[name]

    def build(self, rows: Sequence[Layout], step: int) -> Pass:
        """The pass; heads that agree in every batch row form a class."""
        n = len(rows[0].query_position)
        named = {
            tuple(row): c for c, row in enumerate(dict.fromkeys(map(tuple, self._which.tolist())))
        }
        width = max((lo.shape[1] for lo, _ in self._ranges), default=1)
        lo = np.zeros((len(rows), len(named), n, width), np.int32)
        hi = np.zeros_like(lo)
        for row, c in named.items():
            for b, index in enumerate(row):
                if index >= 0:
                    own_lo, own_hi = self._ranges[index]
                    lo[b, c, :, : own_lo.shape[1]] = own_lo
                    hi[b, c, :, : own_hi.shape[1]] = own_hi
        self._ranges.clear()
        head_class = tuple(named[tuple(row)] for row in self._which.tolist())
        key_order = None if step == 1 else _stack(self.orders)
        if step > 1 and _scattered(lo, hi, rows[0], step):
            order = np.stack([query_rows(layout, step) for layout in rows])
            lo, hi = (np.take_along_axis(t, order[:, None, :, None], axis=2) for t in (lo, hi))
            return Pass(lo, hi, head_class, key_order, order, step)
        return Pass(lo, hi, head_class, key_order, None, step)


def _stack(orders: Sequence[Rows | None]) -> Rows:
    """One order per batch row; short ones are filled up with row 0, which no range covers."""
    found = [np.zeros(1, np.int32) if order is None else order for order in orders]
    length = max(map(len, found))
    return np.stack([np.pad(order, (0, length - len(order))) for order in found])


def _scattered(lo: Rows, hi: Rows, layout: Layout, step: int) -> bool:
    """Whether queries in residue order touch fewer tiles than in their own; judged on some."""
    n, sample = lo.shape[2], max(2048, 64 * step)
    first = max(0, n // 2 - sample // 2)
    order = query_rows(layout, step)
    order = order[(order >= first) & (order < first + sample)]
    own = np.sort(order)
    for c in range(min(4, lo.shape[1])):
        now, then = (touched_tiles(lo[0, c, rows], hi[0, c, rows], 64) for rows in (own, order))
        if now != then:
            return then < now
    return False
