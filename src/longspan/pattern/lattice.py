"""Which positions a part of a pattern steps on: all, those of one remainder, or listed ones.

    Residue(r, c)   j = c (mod r), with one c for all queries or one per query; r = 1 is everything
    Listed(p)       j in p

A closed form is a lattice cut by intervals of positions. Lattices meet and differ exactly: two
residue classes meet in one class (the Chinese remainder theorem) or not at all, and one without
another is a handful of classes. That keeps the algebra of patterns closed although their keys lie
in different orders in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
Flags = NDArray[np.bool_]

# One past the last position there can be: positions and rows are int32 in every plan.
END = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Residue:
    """Positions of one remainder.

    Attributes:
        step: the modulus r, at least 1.
        residue: c, 0 <= c < r; a number, or one per query [n].
    """

    step: int
    residue: Any = 0

    @staticmethod
    def of(step: int, residue: Any) -> Residue:
        """Reduce the residue, and make it a plain number where all queries agree."""
        reduced = np.asarray(residue, np.int64) % step
        if step > END:
            # At most one position is left; classes past the end are one empty class.
            step, reduced = END + 1, np.minimum(reduced, END)
        if reduced.ndim == 0 or (reduced == reduced[0]).all():
            return Residue(step, int(reduced.flat[0]))
        return Residue(step, reduced)

    def count(self, lo: Positions, hi: Positions) -> Positions:
        """How many positions of the lattice lie in each interval [n, m]; none if hi <= lo."""
        c = self.residue if np.ndim(self.residue) == 0 else self.residue[:, None]
        return np.maximum(0, (c - lo) // self.step - (c - hi) // self.step)


@dataclass(frozen=True, eq=False)
class Listed:
    """Positions of a list.

    Attributes:
        positions: int64 [p], rising, without repetition.
    """

    positions: Positions

    def count(self, lo: Positions, hi: Positions) -> Positions:
        """How many positions of the list lie in each interval [n, m]; none if hi <= lo."""
        first = np.searchsorted(self.positions, lo)
        return np.maximum(0, np.searchsorted(self.positions, hi) - first)

    @staticmethod
    def of(positions: Sequence[int] | Positions) -> Listed:
        """From numbers in any order."""
        return Listed(np.unique(np.asarray(positions, np.int64)))


Lattice = Residue | Listed
EVERY = Residue(1)
# Alternatives for different queries: a lattice and the queries it holds for (None: all).
Cases = list[tuple[Lattice, Flags | None]]


def same(a: Lattice, b: Lattice) -> bool:
    """Whether two lattices are equal for every query."""
    if isinstance(a, Listed) or isinstance(b, Listed):
        return (
            isinstance(a, Listed)
            and isinstance(b, Listed)
            and np.array_equal(a.positions, b.positions)
        )
    return a.step == b.step and bool(np.all(a.residue == b.residue))


def meet(a: Lattice, b: Lattice) -> Cases:
    """Positions in both; empty if there are none for any query."""
    if isinstance(a, Listed) and isinstance(b, Listed):
        return _listed(np.intersect1d(a.positions, b.positions))
    if isinstance(a, Listed):
        return _filter(a, b, keep=True) if isinstance(b, Residue) else []
    if isinstance(b, Listed):
        return meet(b, a)
    if a.step == 1 or b.step == 1:
        return [(b if a.step == 1 else a, None)]
    common = math.gcd(a.step, b.step)
    period = b.step // common
    apart = b.residue - a.residue
    turns = apart // common * pow(a.step // common, -1, period) % period
    return _for(Residue.of(a.step * period, a.residue + a.step * turns), apart % common == 0)


def without(a: Lattice, b: Lattice) -> Cases | None:
    """Positions of ``a`` that are not in ``b``, for queries for which the two meet.

    Returns:
        Disjoint cases; None if the difference is no union of lattices (all but some listed ones).
    """
    if isinstance(b, Listed):
        return _listed(np.setdiff1d(a.positions, b.positions)) if isinstance(a, Listed) else None
    if isinstance(a, Listed):
        return _filter(a, b, keep=False)
    found: Cases = []
    for both, rows in meet(a, b):
        assert isinstance(both, Residue)
        others = range(1, both.step // a.step)
        found += [(Residue.of(both.step, both.residue + k * a.step), rows) for k in others]
    return found


def _for(lattice: Lattice, rows: Any) -> Cases:
    if np.all(rows):
        return [(lattice, None)]
    return [(lattice, np.asarray(rows))] if np.any(rows) else []


def _listed(positions: Positions) -> Cases:
    return [(Listed(positions), None)] if len(positions) else []


def _filter(a: Listed, b: Residue, keep: bool) -> Cases:
    """Listed positions that are in a residue class, or those that are not."""
    remainder = a.positions % b.step
    if np.ndim(b.residue) == 0:
        return _listed(a.positions[(remainder == b.residue) == keep])
    cases: Cases = []
    for c in np.unique(b.residue):
        for lattice, _ in _listed(a.positions[(remainder == c) == keep]):
            cases += _for(lattice, b.residue == c)
    return cases
