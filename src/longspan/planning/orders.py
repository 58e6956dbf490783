"""Orders of the key rows in which a lattice of positions lies side by side.

    own order       rows as they are            all positions
    residue order   by (remainder, position)    positions of one remainder
    listed          listed positions only       one section for each list

Rows are ordered inside their segment and by position, so padding, packed documents, caches with
holes and decoding need nothing of their own. ``find`` turns the positions of a piece into ranges
of rows of the order. O(M log M) time for M key rows, O(M) where position j stands in row j.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from longspan.pattern.algebra import END, Positions
from longspan.pattern.lattice import Listed, Residue
from longspan.planning.layout import Layout
from longspan.planning.pieces import Piece
from longspan.planning.ranges import Ranges, normal

# Keys of the orders: the step of a lattice, or this for listed positions.
LISTED = 0


def order_key(piece: Piece) -> int:
    """Which order a piece lies in: the step of its lattice, or ``LISTED``."""
    return LISTED if isinstance(piece.lattice, Listed) else piece.lattice.step


class Order(Protocol):
    """Key rows in some order."""

    @property
    def rows(self) -> NDArray[np.int32] | None:
        """Key row that stands at each place; None for the rows as they are."""
        ...

    def find(self, piece: Piece) -> Ranges:
        """Places of the keys of a piece, as ranges [n, m]."""
        ...


def order_of(layout: Layout, key: int) -> Order:
    """The order for a key that ``order_key`` gave."""
    if key == LISTED:
        return _Listed(layout)
    if key == 1:
        return _Own(layout)
    return _PlainResidue(layout, key) if layout.plain else _Residue(layout, key)


def query_rows(layout: Layout, step: int) -> NDArray[np.int32]:
    """Query rows by segment, remainder and position."""
    position = layout.query_position
    order = np.lexsort((position, position % step, layout.query_segment))
    return order.astype(np.int32)


class _Own:
    rows = None

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def find(self, piece: Piece) -> Ranges:
        return self._layout.rows_of(piece.ranges)


class _PlainResidue:
    """Row j holds position j: places follow from arithmetic."""

    def __init__(self, layout: Layout, step: int) -> None:
        self._count, self._step = len(layout.key_position), step
        turns = -(-self._count // step)
        table = np.arange(turns)[None, :] * step + np.arange(min(step, self._count))[:, None]
        self.rows = table[table < self._count].astype(np.int32)

    def find(self, piece: Piece) -> Ranges:
        c = _residue(piece)
        full, extra = divmod(self._count, self._step)
        first = c * full + np.minimum(c, extra)
        members = full + (c < extra)
        lo, hi = (
            first + np.clip(-((c - edge) // self._step), 0, members)
            for edge in (piece.ranges.lo, piece.ranges.hi)
        )
        return normal(lo, hi)


class _Residue:
    def __init__(self, layout: Layout, step: int) -> None:
        rows, number, self._own = layout.numbers
        self._step = step
        position = layout.key_position[rows]
        self._groups, group = np.unique(number * step + position % step, return_inverse=True)
        code = group * (END + 1) + position
        order = np.argsort(code)
        self._code = code[order]
        # A call needs at least one key row, even if all are padding.
        self.rows = (rows[order] if len(rows) else np.zeros(1)).astype(np.int32)

    def find(self, piece: Piece) -> Ranges:
        if len(self._groups) == 0:
            return Ranges.of([], piece.ranges.rows)
        wanted = self._own[:, None] * self._step + _residue(piece)
        group = np.minimum(np.searchsorted(self._groups, wanted), len(self._groups) - 1)
        absent = (self._own[:, None] < 0) | (self._groups[group] != wanted)
        lo = np.searchsorted(self._code, group * (END + 1) + piece.ranges.lo)
        hi = np.searchsorted(self._code, group * (END + 1) + piece.ranges.hi)
        return normal(lo, np.where(absent, lo, hi))


class _Listed:
    """Grows by a section for each new list; lists of different heads lie one after another."""

    def __init__(self, layout: Layout) -> None:
        self._rows, number, self._own = layout.numbers
        self._position = layout.key_position[self._rows]
        self._code = number * (END + 1) + self._position
        self._sections: dict[bytes, tuple[int, Positions]] = {}
        self._taken: list[Positions] = []
        self._size = 0

    @property
    def rows(self) -> NDArray[np.int32]:
        return np.concatenate(self._taken or [np.zeros(1)]).astype(np.int32)

    def find(self, piece: Piece) -> Ranges:
        assert isinstance(piece.lattice, Listed)
        listed = piece.lattice.positions
        name = listed.tobytes()
        if name not in self._sections:
            inside = np.isin(self._position, listed)
            self._sections[name] = (self._size, self._code[inside])
            if inside.any():
                self._taken.append(self._rows[inside])
                self._size += int(inside.sum())
        first, code = self._sections[name]
        base = self._own[:, None] * (END + 1)
        lo = first + np.searchsorted(code, base + piece.ranges.lo)
        hi = first + np.searchsorted(code, base + piece.ranges.hi)
        return normal(lo, np.where(self._own[:, None] < 0, lo, hi))


def _residue(piece: Piece) -> Positions:
    """Remainder of each query [n, 1] or of all [1, 1]."""
    assert isinstance(piece.lattice, Residue)
    return np.asarray(piece.lattice.residue, np.int64).reshape(-1, 1)
