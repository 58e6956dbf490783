"""Packed documents: queries and keys of the same document.

    Document(n1, n2, ...)   documents of these lengths side by side, one more after the last
    Document()              the whole segment                       both O(sum of n^2)

Documents that are packed differently in every batch are not part of a pattern: they are
``segments=`` of a call, which isolate rows whatever the pattern, and inside which positions start
again from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.pattern.algebra import END, At, Atom, Interval, Mask, Positions, one_by_one, whole


@dataclass(frozen=True, repr=False, init=False)
class Document(Atom):
    """Pairs of the same document, in both directions; ``Document(...) & Causal()`` looks back
    only.

    Args:
        lengths: tokens of each document; what follows the last one is one more document.
    """

    lengths: tuple[int, ...]
    name: ClassVar[str] = "document"

    def __init__(self, *lengths: int) -> None:
        given = one_by_one("Document", "lengths", lengths)
        object.__setattr__(
            self, "lengths", tuple(whole("Document", "length", n, 1) for n in given)
        )

    @property
    def is_causal(self) -> bool:
        return False

    def _borders(self) -> Positions:
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64), [END]]).astype(
            np.int64
        )

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        starts = self._borders()[1:-1]
        return np.digitize(query, starts) == np.digitize(key, starts)

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        borders = self._borders()
        document = np.searchsorted(borders, query, side="right") - 1
        return [(borders[document], borders[document + 1])]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.lengths))})"

    __repr__ = __str__
