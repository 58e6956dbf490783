"""Vertical-slash: a few key columns and a few diagonals.

    j <= i  and  ( j in columns   or   i - j in offsets )          O(N (columns + offsets))

Paper: MInference (Jiang et al. 2024, arXiv 2407.02490), which picks columns and offsets per head
from the attention of the last queries; here they are given. Exact by default. With ``block=64``
every offset is widened as MInference's kernel widens it: the 64 queries of a row block all see
the keys that any of them would see at that offset, cut at the diagonal. That is a superset of the
exact pattern whose tiles are full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import At, Atom, Mask, Positions, Progression, keep_whole, wholes
from longspan.pattern.lattice import EVERY
from longspan.pattern.listed import stretches


@dataclass(frozen=True, repr=False)
class VerticalSlash(Atom):
    """Columns and diagonals; causal.

    Args:
        columns: key positions that every later query sees; may be empty.
        offsets: distances i - j, 0 is the query itself; may be empty, but not both. Those beyond
            the sequence hold no pair.
        block: rows over which an offset is widened; 1 is exact (default).
    """

    columns: tuple[int, ...]
    offsets: tuple[int, ...]
    block: int = 1
    name: ClassVar[str] = "vertical_slash"

    def __post_init__(self) -> None:
        keep_whole(self, "VerticalSlash", "block", 1)
        for field in ("columns", "offsets"):
            value = getattr(self, field)
            numbers = wholes("VerticalSlash", field, value, 0, may_be_empty=True)
            object.__setattr__(self, field, numbers)
        if not self.columns and not self.offsets:
            raise PatternError("VerticalSlash: expected columns or offsets, got neither")

    @property
    def is_causal(self) -> bool:
        return True

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        met = np.isin(key, self.columns) & (query == query)
        # The rows of the query's block reach the same diagonal from first to last.
        first = query // self.block * self.block
        for offset in self.offsets:
            apart = key + offset - first
            met = met | ((apart >= 0) & (apart < self.block))
        return met & (key <= query)

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        past = query + 1
        forms = stretches(self.columns, np.zeros_like(query), past)
        if not self.offsets:
            return forms
        offset = np.array(self.offsets)
        gaps = np.flatnonzero(np.diff(offset) > self.block)
        near = offset[np.append(0, gaps + 1)]
        far = offset[np.append(gaps, len(offset) - 1)]
        first = query // self.block * self.block
        slashes = [
            (first - b, np.minimum(first - a + self.block, past))
            for a, b in zip(near, far, strict=True)
        ]
        return [(EVERY, slashes), *forms]
