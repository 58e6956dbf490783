"""SSA, Shifted Sparse Attention: a local window, a few anchors, and a stride shifted per head.

    j <= i  and  ( i - j < w   or   j in anchors   or   j = h (mod r) )       O(N (w + N / r))

Head h (counted from 0) takes remainder h mod r, so with r heads or more every past token is seen
by some head. Each pair counts once. The same as ``Window(w) | Sink(1) | Strided(r)`` with the
default anchors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.pattern.algebra import At, Atom, Mask, Positions, Progression, keep_whole, wholes
from longspan.pattern.lattice import EVERY, Residue
from longspan.pattern.listed import stretches


@dataclass(frozen=True, repr=False)
class SSA(Atom):
    """Window, anchors and per-head stride; causal.

    Args:
        size: keys w of the local window, the query included.
        step: distance r of the strided keys.
        anchors: positions that every later token sees; default the first token.
    """

    size: int
    step: int
    anchors: tuple[int, ...] = (0,)
    name: ClassVar[str] = "ssa"

    def __post_init__(self) -> None:
        keep_whole(self, "SSA", "size", 1)
        keep_whole(self, "SSA", "step", 1)
        object.__setattr__(self, "anchors", wholes("SSA", "anchors", self.anchors, 0))

    @property
    def is_causal(self) -> bool:
        return True

    def head_class(self, at: At) -> Hashable:
        return at.head % self.step

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        near = query - key < self.size
        strided = key % self.step == at.head % self.step
        return (key <= query) & (near | strided | np.isin(key, self.anchors))

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        past = query + 1
        return [
            (EVERY, [(query - self.size + 1, past)]),
            *stretches(self.anchors, np.zeros_like(query), past),
            (Residue.of(self.step, at.head), [(0, past)]),
        ]
