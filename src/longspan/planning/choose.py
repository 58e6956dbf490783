"""Cost model: one pass over all keys in one order, or one pass for each order.

A pass costs its tiles, what masking them takes, and moving rows. In their own order strided keys
touch a tile each, but a few of them near a window touch only tiles that the window touches anyway;
then one masked pass saves the second pass and the joining. Costs are in pairs of a full tile of
the CPU kernel, judged on some rows and heads; ``benchmarks/cost_model.py`` holds them against
measured times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from longspan.pattern.algebra import At, Pattern
from longspan.planning.builder import JOIN, TILE
from longspan.planning.compiler import passes_of, sets_of
from longspan.planning.layout import Layout
from longspan.planning.orders import order_key
from longspan.planning.passes import Pass

# Most ranges per query that one masked pass may have; masks are built range by range.
_MOST_RANGES = 32
_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs in pairs of a full tile.

    Attributes:
        mask: of each further range, per pair of a touched tile.
        move: of gathering a row, or putting it back.
        join: of joining the results of a further order of keys, per row.
    """

    mask: float = 0.01
    move: float = 16.0
    join: float = JOIN


def choose(pattern: Pattern, layout: Layout, heads: int, costs: Costs | None = None) -> int | None:
    """The order that takes all keys, or None for one pass in each order.

    Args:
        pattern: of one layer, checked.
        layout: of the first batch row.
        heads: query heads.
        costs: other costs than the measured ones.
    """
    some = _some_rows(layout, 64)
    seen = _orders(pattern, some, heads)
    # A sum of branches has passes of its own for each of them.
    if seen <= {1} or len(pattern.branches()) > 1:
        return None
    largest = max(seen)
    options: list[int | None] = [None]
    # A piece of a smaller step becomes a range for each of its remainders.
    classes = largest // max(1, min(seen))
    if len(seen) > 1 and classes <= _MOST_RANGES and all(k and largest % k == 0 for k in seen):
        options.append(largest)
    if _most_keys(pattern, layout, heads) <= _MOST_RANGES:
        options.append(1)
    if len(options) == 1:
        return None
    rows = _some_rows(layout, max(_ROWS, TILE * largest))
    priced = [
        (_price(passes_of(pattern, [rows], heads, option), layout, rows, costs or Costs()), at)
        for at, option in enumerate(options)
    ]
    return options[min(priced)[1]]


def _some_rows(layout: Layout, count: int) -> Layout:
    """A stretch of query rows from the middle."""
    n = len(layout.query_position)
    first = max(0, (n - count) // 2)
    taken = slice(first, first + count)
    return replace(
        layout,
        query_position=layout.query_position[taken],
        query_segment=layout.query_segment[taken],
    )


def _orders(pattern: Pattern, rows: Layout, heads: int) -> set[int]:
    at = At(head=heads - 1, heads=heads, length=rows.query_lengths)
    sets = sets_of(pattern, rows.query_position, at)
    return {order_key(piece) for pieces in sets for piece in pieces}


def _most_keys(pattern: Pattern, layout: Layout, heads: int) -> int:
    """Most keys of a query outside pieces that are ranges anyway; judged on few rows."""
    n = len(layout.query_position)
    few = np.unique(np.linspace(0, n - 1, 16).astype(np.int64))
    query = layout.query_position[few]
    at = At(head=heads - 1, heads=heads, length=layout.query_lengths[few])
    end = int(layout.key_position.max()) + 1
    total = np.zeros(len(few), np.int64)
    for pieces in sets_of(pattern, query, at):
        for piece in pieces:
            if order_key(piece) != 1:
                stop = np.minimum(piece.ranges.hi, end)
                total += piece.lattice.count(piece.ranges.lo, stop).sum(axis=1)
    return int(total.max())


def _price(passes: tuple[Pass, ...], layout: Layout, rows: Layout, costs: Costs) -> float:
    """Cost of all heads, for all rows."""
    n = len(layout.query_position)
    scale = n / len(rows.query_position)
    parts = sum(len(one.steps) for one in passes)
    total = costs.join * n * (parts - 1) * len(passes[0].head_class)
    for one in passes:
        width = one.lo.shape[3]
        total += one.tiles(TILE) * TILE * TILE * (1 + costs.mask * (width - 1)) * scale
        places = 0 if one.key_order is None else one.key_order.shape[1]
        moved = 2 * places + 2 * (0 if one.query_order is None else one.query_order.shape[2])
        total += costs.move * moved * len(one.heads)
    return total
