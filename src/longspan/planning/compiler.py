"""From a pattern to passes: evaluate its closed form, and lay each piece out in its order.

Every distinct order of keys becomes one pass, unless the cost model finds one pass for all of them
cheaper; heads of equal ranges share them. Where remainders change from query to query (dilated
neighbourhoods, LongNet) the queries of the pass are put in residue order too, so that a tile of
queries sees one stretch of keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import reduce

from longspan.errors import PatternError
from longspan.pattern.algebra import And, At, Atom, Or, Pattern, Positions, Sub
from longspan.pattern.lattice import EVERY
from longspan.pattern.vary import PerHead
from longspan.planning.builder import PassBuilder
from longspan.planning.join import joined
from longspan.planning.layout import Layout
from longspan.planning.orders import Order, order_key, order_of
from longspan.planning.passes import Pass
from longspan.planning.pieces import (
    Piece,
    Pieces,
    classes_of,
    difference,
    intersection,
    keep_self,
    single_keys,
    union,
)
from longspan.planning.ranges import Ranges, joint


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


def passes_of(
    pattern: Pattern,
    rows: Sequence[Layout],
    heads: int,
    together: int | None = None,
    *,
    join: bool = True,
) -> tuple[Pass, ...]:
    """Lay out a pattern for batch rows and heads.

    Args:
        pattern: of one layer, checked.
        rows: one layout, or one per batch row.
        heads: query heads.
        together: put all keys into this one order (1: their own) rather than each into its own.
        join: let orders that can share a pass lie side by side in it.
    """
    every = [At(head=h, heads=heads) for h in range(heads)]
    # Heads whose class is equal share their ranges: 32 heads of a shifted pattern need two sets
    # of them.
    classes: dict[Hashable, list[int]] = {}
    for at in every:
        classes.setdefault(pattern.head_class(at), []).append(at.head)
    builders: dict[tuple[int, int], PassBuilder] = {}
    for b, layout in enumerate(rows):
        orders: dict[int, Order] = {}
        end = int(layout.key_position.max()) + 1
        for members in classes.values():
            at = replace(every[members[0]], length=layout.query_lengths)
            for index, pieces in enumerate(sets_of(pattern, layout.query_position, at)):
                found: dict[int, list[Ranges]] = {}
                for piece in gathered(pieces, together, end):
                    key = order_key(piece)
                    if key not in orders:
                        orders[key] = order_of(layout, key)
                    found.setdefault(key, []).append(orders[key].find(piece))
                for key, every_place in found.items():
                    name = (index, key)
                    if name not in builders:
                        builders[name] = PassBuilder(len(rows), heads, key)
                    builders[name].put(b, members, joint(every_place))
        for (_, key), builder in builders.items():
            if key in orders:
                builder.orders[b] = orders[key].rows
    if not builders:
        builders[0, 1] = PassBuilder(len(rows), heads, 1)
    passes = [one for _, builder in sorted(builders.items()) for one in builder.build(rows)]
    if not join:
        return tuple(passes)
    return joined(passes, len(rows[0].query_position), len(rows[0].key_position))


def sets_of(pattern: Pattern, query: Positions, at: At) -> list[Pieces]:
    """Keys of each branch of a whole pattern; causal queries without any keep themselves."""
    sets = [pieces_of(branch, query, at) for branch in pattern.branches()]
    return keep_self(sets, query) if pattern.is_causal else sets


def gathered(pieces: Pieces, together: int | None, end: int) -> Pieces:
    """The same keys before ``end`` in one order: all by single keys (1), or by remainders."""
    if together is None:
        return pieces
    if together == 1:
        n = pieces[0].ranges.rows if pieces else 0
        known = Ranges.of([(0, end)], n)
        alone = [single_keys(Piece(p.lattice, p.ranges & known)) for p in pieces]
        return (Piece(EVERY, joint(alone)),) if alone else ()
    found: list[Piece] = []
    for piece in pieces:
        found.extend(classes_of(piece, together) or (piece,))
    return tuple(found)
