"""Patterns made of square blocks of tokens.

    Blocks       block b in map[a]                            an explicit, compact map    O(pairs)
    BandBlocks   a - back <= b <= a + ahead                   neighbouring blocks         O(N size)
    EdgeBlocks   a or b among the first or the last blocks    global blocks               O(N size)

with a = i // size the block of the query and b = j // size that of the key.

Papers: Sparse Transformer (Child et al. 2019, arXiv 1904.10509) for block maps; BigBird (Zaheer et
al. 2020, arXiv 2007.14062) for bands and global blocks. The map is a list of key blocks for each
query block, never a matrix; different heads take ``PerHead`` of several maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import (
    END,
    At,
    Atom,
    Interval,
    Mask,
    Positions,
    flag,
    keep_whole,
    wholes,
)


@dataclass(frozen=True, repr=False)
class Blocks(Atom):
    """Explicit block map.

    Args:
        map: for each query block, the key blocks that it sees, each once; an empty list sees
            nothing, and so do query blocks past the end of the map.
        size: tokens in a block.
        causal: also cut at the diagonal; off by default.
    """

    map: tuple[tuple[int, ...], ...]
    size: int
    causal: bool = False
    name: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        keep_whole(self, "Blocks", "size", 1)
        flag("Blocks", "causal", self.causal)
        if isinstance(self.map, str) or not isinstance(self.map, Sequence) or not self.map:
            raise PatternError(
                "Blocks: map must hold a list of key blocks for each query block, such as "
                f"[[0], [0, 1]]; got {self.map!r} (a matrix: Blocks.of(matrix, size))"
            )
        rows = tuple(wholes("Blocks", "map", row, 0, may_be_empty=True) for row in self.map)
        for own, row in zip(self.map, rows, strict=True):
            if len(own) != len(row):
                # Rows of zeros and ones would pass for lists of the blocks 0 and 1.
                raise PatternError(
                    f"Blocks: map names a key block twice in {own!r}; a matrix of zeros and ones "
                    "goes to Blocks.of(matrix, size)"
                )
        object.__setattr__(self, "map", rows)

    @classmethod
    def of(cls, matrix: Any, size: int, causal: bool = False) -> Blocks:
        """From a matrix [query blocks, key blocks], true or 1 where a block is computed.

        Raises:
            PatternError: if it is no matrix, or holds anything but true and false, or 1 and 0.
        """
        try:
            table = np.asarray(matrix)
        # What a tensor with a gradient, or on another device, says.
        except (ValueError, RuntimeError, TypeError) as error:
            raise PatternError(f"Blocks.of: expected a matrix; {error}") from None
        if table.ndim != 2:
            raise PatternError(f"Blocks.of: expected a matrix, got shape {list(table.shape)}")
        # A bias of 0 and -inf would be read the wrong way round, NaN and words as true.
        if table.dtype != bool and not np.isin(table, (0, 1)).all():
            raise PatternError(
                "Blocks.of: expected true and false, or 1 and 0; got a matrix of "
                f"{table.dtype} that holds {table[~np.isin(table, (0, 1))][0]}"
            )
        return cls(tuple(tuple(np.flatnonzero(row).tolist()) for row in table), size, causal)

    @property
    def is_causal(self) -> bool:
        return self.causal

    @cached_property
    def _runs(self) -> tuple[Positions, Positions]:
        """Stretches of neighbouring blocks [query blocks + 1, m]; the last row is empty."""
        rows = []
        for row in self.map:
            first = [b for b in row if b - 1 not in row]
            last = [b + 1 for b in row if b + 1 not in row]
            rows.append((first, last))
        width = max(1, *(len(first) for first, _ in rows))
        table = np.zeros((2, len(rows) + 1, width), np.int64)
        for a, pair in enumerate(rows):
            table[:, a, : len(pair[0])] = pair
        return table[0], table[1]

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        count = 1 + max((b for row in self.map for b in row), default=0)
        matrix = np.zeros((len(self.map) + 1, count + 1), bool)
        for a, row in enumerate(self.map):
            matrix[a, list(row)] = True
        met = matrix[
            np.minimum(query // self.size, len(self.map)), np.minimum(key // self.size, count)
        ]
        return met & (key <= query) if self.causal else met

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        first, last = self._runs
        own = np.minimum(query // self.size, len(self.map))
        lo, hi = first[own] * self.size, last[own] * self.size
        if self.causal:
            hi = np.minimum(hi, query[:, None] + 1)
        return [(lo[:, t], hi[:, t]) for t in range(first.shape[1])]


@dataclass(frozen=True, repr=False)
class BandBlocks(Atom):
    """The query's own block and its neighbours, whole.

    Args:
        size: tokens in a block.
        back: blocks before the query's own.
        ahead: blocks after it.
    """

    size: int
    back: int = 1
    ahead: int = 1
    name: ClassVar[str] = "band_blocks"

    def __post_init__(self) -> None:
        keep_whole(self, "BandBlocks", "size", 1)
        keep_whole(self, "BandBlocks", "back", 0)
        keep_whole(self, "BandBlocks", "ahead", 0)

    @property
    def is_causal(self) -> bool:
        return False

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        apart = key // self.size - query // self.size
        return (-self.back <= apart) & (apart <= self.ahead)

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        own = query // self.size
        return [((own - self.back) * self.size, (own + self.ahead + 1) * self.size)]


@dataclass(frozen=True, repr=False)
class EdgeBlocks(Atom):
    """The first and the last blocks of the sequence see all tokens, and all tokens see them.

    Args:
        size: tokens in a block.
        first: global blocks at the start.
        last: global blocks at the end; they move with the length of the sequence.
    """

    size: int
    first: int = 1
    last: int = 1
    name: ClassVar[str] = "edge_blocks"

    def __post_init__(self) -> None:
        keep_whole(self, "EdgeBlocks", "size", 1)
        keep_whole(self, "EdgeBlocks", "first", 0)
        keep_whole(self, "EdgeBlocks", "last", 0)

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def needs_length(self) -> bool:
        return self.last > 0

    def _edges(self, at: At) -> tuple[int, Any]:
        """Tokens before the first are global, and so are those from the second on."""
        blocks = -(-np.asarray(at.length) // self.size)
        return self.first * self.size, np.maximum(0, blocks - self.last) * self.size

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        start, stop = self._edges(at)
        return (query < start) | (query >= stop) | (key < start) | (key >= stop)

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        start, stop = self._edges(at)
        rows = np.where((query < start) | (query >= stop), END, 0)
        return [(0, rows), (0, start), (stop, END)]
