"""Global tokens: listed positions that see every token, and that every token sees.

    Global   i in G or j in G, and j <= i if causal            O(N |G|)

Papers: Longformer (Beltagy et al. 2020, arXiv 2004.05150), ETC (Ainslie et al. 2020, arXiv
2004.08483). ``Sink`` and ``Prefix`` are the one-way forms for the first tokens. Longformer gives
global tokens projections of their own; that is a layer, not a pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.pattern.algebra import (
    END,
    At,
    Atom,
    Mask,
    Positions,
    Progression,
    flag,
    one_by_one,
    wholes,
)
from longspan.pattern.lattice import EVERY
from longspan.pattern.listed import stretches


@dataclass(frozen=True, repr=False, init=False)
class Global(Atom):
    """Listed tokens see all and are seen by all.

    Args:
        positions: positions of the global tokens; those past the end of a sequence are ignored.
        causal: no token sees a later one; off by default.
    """

    positions: tuple[int, ...]
    causal: bool = False
    name: ClassVar[str] = "global"

    def __init__(self, *positions: int, causal: bool = False) -> None:
        given = one_by_one("Global", "positions", positions)
        object.__setattr__(self, "positions", wholes("Global", "positions", given, 0))
        object.__setattr__(self, "causal", flag("Global", "causal", causal))

    @property
    def is_causal(self) -> bool:
        return self.causal

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        met = np.isin(query, self.positions) | np.isin(key, self.positions)
        return met & (key <= query) if self.causal else met

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        stop = query + 1 if self.causal else np.full_like(query, END)
        zero = np.zeros_like(query)
        rows = np.where(np.isin(query, self.positions), stop, 0)
        return [(EVERY, [(zero, rows)]), *stretches(self.positions, zero, stop)]

    def __str__(self) -> str:
        words = [*map(str, self.positions), *(["causal=true"] if self.causal else [])]
        return f"{self.name}({', '.join(words)})"

    __repr__ = __str__
