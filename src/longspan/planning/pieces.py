"""Sets of keys in several orders: pieces, and exact set operations on them.

A piece is a lattice of positions (all, one remainder, listed ones) cut by ranges per query. A set
of keys is a tuple of disjoint pieces; each distinct step of a lattice becomes one order of the
keys in memory. Union keeps the coarse piece whole and takes its keys out of the finer one, so
``Window | Strided`` is the window and the strided keys outside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longspan.pattern.algebra import Positions
from longspan.pattern.lattice import EVERY, Flags, Lattice, Listed, Residue, meet, same, without
from longspan.planning.ranges import Ranges

# Splitting into residue classes is preferred to listing single keys up to this many times as
# many ranges: classes lie side by side in memory, single keys cost a tile each.
_PREFER_CLASSES = 8


@dataclass(frozen=True, eq=False)
class Piece:
    """Keys ``{ j in ranges[i] : j in lattice }`` of each query i."""

    lattice: Lattice
    ranges: Ranges

    @property
    def rank(self) -> float:
        """Coarse lattices first; the finer piece gives up what two pieces share."""
        return np.inf if isinstance(self.lattice, Listed) else self.lattice.step

    def count(self) -> Positions:
        """Number of keys of each query [n], were every position a key."""
        return self.lattice.count(self.ranges.lo, self.ranges.hi).sum(axis=1)

    def any(self) -> bool:
        """Whether any query has a range."""
        return bool((self.ranges.lo[:, 0] < self.ranges.hi[:, 0]).any())


Pieces = tuple[Piece, ...]


def intersection(a: Pieces, b: Pieces) -> Pieces:
    """Keys in both sets."""
    return _tidy([part for p in a for q in b for part in _meet(p, q)])


def difference(a: Pieces, b: Pieces) -> Pieces:
    """Keys of ``a`` that are not in ``b``."""
    left = list(a)
    for q in b:
        left = [part for p in left for part in _without(p, q)]
    return _tidy(left)


def union(a: Pieces, b: Pieces) -> Pieces:
    """Keys in either set."""
    old, new = list(a), []
    for p in b:
        rest = [p]
        for q in tuple(old):
            if same(p.lattice, q.lattice):
                # Joined below; only parts of p that changed their lattice must not overlap it.
                rest = [
                    s for r in rest for s in ([r] if r.lattice is p.lattice else _without(r, q))
                ]
            elif q.rank <= p.rank:
                rest = [s for r in rest for s in _without(r, q)]
            else:
                at = old.index(q)
                old[at : at + 1] = _without(q, p)
        new += rest
    return _tidy(old + new)


def keep_self(sets: Sequence[Pieces], query: Positions) -> list[Pieces]:
    """Give each query that has no key in any of the sets its own position.

    It goes to the first set, with a lattice that needs no further order of the keys.
    """
    count = sum((p.count() for pieces in sets for p in pieces), np.zeros(len(query), np.int64))
    empty = count == 0
    if not empty.any():
        return list(sets)
    first = list(sets[0])
    at = next((t for t, p in enumerate(first) if isinstance(p.lattice, Residue)), None)
    if at is None:
        own = Listed.of(query[empty]) if first else EVERY
        first.append(Piece(own, Ranges.of([(query, query + 1)], len(query)).keep(empty)))
    else:
        lattice, ranges = first[at].lattice, first[at].ranges
        assert isinstance(lattice, Residue)
        own = Residue.of(lattice.step, np.where(empty, query, lattice.residue))
        first[at] = Piece(own, ranges.keep(~empty).fill_empty(query, empty))
    return [tuple(first), *sets[1:]]


def single_keys(piece: Piece) -> Ranges:
    """The keys of a piece one by one, as ranges of positions: O(pairs) memory."""
    lattice, lo, hi = piece.lattice, piece.ranges.lo, piece.ranges.hi
    if isinstance(lattice, Residue) and lattice.step == 1:
        return piece.ranges
    count = lattice.count(lo, hi)
    row = np.repeat(np.arange(len(lo)), count.sum(axis=1))
    interval = np.repeat(np.arange(count.size), count.ravel())
    turn = np.arange(len(interval)) - np.repeat(np.cumsum(count) - count.ravel(), count.ravel())
    start = lo.ravel()[interval]
    if isinstance(lattice, Listed):
        key = lattice.positions[np.searchsorted(lattice.positions, start) + turn]
    else:
        own = lattice.residue if np.ndim(lattice.residue) == 0 else lattice.residue[row]
        key = start + (own - start) % lattice.step + turn * lattice.step
    place = np.arange(len(row)) - np.searchsorted(row, row)
    width = max(1, int(count.sum(axis=1).max(initial=0)))
    key_lo = np.zeros((len(lo), width), np.int64)
    key_hi = np.zeros_like(key_lo)
    key_lo[row, place], key_hi[row, place] = key, key + 1
    return Ranges(key_lo, key_hi)


def classes_of(piece: Piece, step: int) -> Pieces | None:
    """The same keys by remainders of a multiple of the piece's own step; None if it is none."""
    lattice = piece.lattice
    if isinstance(lattice, Listed) or step % lattice.step:
        return None
    classes = range(0, step, lattice.step)
    return tuple(Piece(Residue.of(step, lattice.residue + k), piece.ranges) for k in classes)


def _meet(p: Piece, q: Piece) -> list[Piece]:
    ranges = p.ranges & q.ranges
    return [Piece(both, _only(ranges, rows)) for both, rows in meet(p.lattice, q.lattice)]


def _without(p: Piece, q: Piece) -> list[Piece]:
    shared = [part for part in _meet(p, q) if part.any()]
    if not shared:
        return [p]
    if same(p.lattice, q.lattice) or same(q.lattice, EVERY):
        return [Piece(p.lattice, p.ranges - q.ranges)]
    # Where the two meet, what they share is cut out of p: whole ranges where q holds all of p's
    # lattice, else p falls into further classes there, or loses key by key.
    others = without(p.lattice, q.lattice)
    alone = max(int(part.count().max()) for part in shared)
    if others is None or len(others) > _PREFER_CLASSES * alone:
        left = p.ranges
        for part in shared:
            left = left - single_keys(part)
        return [Piece(p.lattice, left)]
    both = p.ranges & q.ranges
    left = p.ranges
    if isinstance(p.lattice, Listed):
        return [
            Piece(p.lattice, left - both),
            *(Piece(o, _only(both, rows)) for o, rows in others),
        ]
    for _, rows in meet(p.lattice, q.lattice):
        left = left - _only(both, rows)
    return [Piece(p.lattice, left), *(Piece(o, _only(both, rows)) for o, rows in others)]


def _only(ranges: Ranges, rows: Flags | None) -> Ranges:
    return ranges if rows is None else ranges.keep(rows)


def _tidy(pieces: list[Piece]) -> Pieces:
    """Join pieces of one lattice and drop empty ones."""
    found: list[Piece] = []
    for piece in pieces:
        if not piece.any():
            continue
        for at, other in enumerate(found):
            if same(piece.lattice, other.lattice):
                found[at] = Piece(other.lattice, other.ranges | piece.ranges)
                break
        else:
            found.append(piece)
    return tuple(sorted(found, key=lambda piece: piece.rank))
