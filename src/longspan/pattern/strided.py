"""Keys at a distance from each other: every r-th token, from a fixed place or from the query.

    Strided     j <= i, j = h (mod r) in head h                     O(N^2 / r)
    Diagonals   j <= i, j = i (mod r)                               O(N^2 / r)
    Dilated     causal: j = i - r t, 0 <= t < w                     O(N w)
                two-sided: j = i + r t, |t| <= w // 2               O(N w)

Papers: Strided is the per-head pattern of Shifted Sparse Attention; with r heads or more every
past token is seen by some head. Diagonals is the strided part of the Sparse Transformer (Child et
al. 2019, arXiv 1904.10509). Dilated is Longformer's dilated window (Beltagy et al. 2020, arXiv
2004.05150), where dilation may differ between heads.

Keys of one remainder lie side by side once they are put in residue order; queries too where the
remainder is the query's own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import (
    END,
    At,
    Atom,
    Mask,
    Positions,
    Progression,
    flag,
    keep_whole,
    whole,
)
from longspan.pattern.lattice import Residue


@dataclass(frozen=True, repr=False)
class Strided(Atom):
    """Every ``step``-th token, from the head's own offset.

    Args:
        step: distance r of neighbouring keys.
        per_head: head h takes remainder h mod r (default), or all heads take remainder 0.
        causal: keys up to the query only (default).
    """

    step: int
    per_head: bool = True
    causal: bool = True
    name: ClassVar[str] = "strided"

    def __post_init__(self) -> None:
        keep_whole(self, "Strided", "step", 1)
        flag("Strided", "per_head", self.per_head)
        flag("Strided", "causal", self.causal)

    @property
    def is_causal(self) -> bool:
        return self.causal

    def head_class(self, at: At) -> Hashable:
        return at.head % self.step if self.per_head else 0

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        offset = at.head if self.per_head else 0
        met = (key - offset) % self.step == 0
        return met & (key <= query) if self.causal else met & (query == query)

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        lattice = Residue.of(self.step, at.head if self.per_head else 0)
        return [(lattice, [(0, query + 1 if self.causal else END)])]


@dataclass(frozen=True, repr=False)
class Diagonals(Atom):
    """Every ``step``-th token, counted from the query itself.

    Args:
        step: distance r of neighbouring keys.
        causal: keys up to the query only (default).
    """

    step: int
    causal: bool = True
    name: ClassVar[str] = "diagonals"

    def __post_init__(self) -> None:
        keep_whole(self, "Diagonals", "step", 1)
        flag("Diagonals", "causal", self.causal)

    @property
    def is_causal(self) -> bool:
        return self.causal

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        met = (query - key) % self.step == 0
        return met & (key <= query) if self.causal else met

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        lattice = Residue.of(self.step, query)
        return [(lattice, [(0, query + 1 if self.causal else END)])]


@dataclass(frozen=True, repr=False)
class Dilated(Atom):
    """Sliding window with gaps.

    Args:
        size: number of keys w, the query itself included; two-sided: w // 2 on each side, as in
            ``Window``.
        step: distance r of neighbouring keys; or a list of them, one for each equal run of heads.
        causal: look back only (default), or to both sides.
    """

    size: int
    step: int | tuple[int, ...]
    causal: bool = True
    name: ClassVar[str] = "dilated"

    def __post_init__(self) -> None:
        keep_whole(self, "Dilated", "size", 1)
        flag("Dilated", "causal", self.causal)
        if isinstance(self.step, list | tuple):
            steps = tuple(whole("Dilated", "step", step, 1) for step in self.step)
            if not steps:
                raise PatternError("Dilated: step must hold at least one number, got none")
            object.__setattr__(self, "step", steps)
        else:
            keep_whole(self, "Dilated", "step", 1)

    @property
    def is_causal(self) -> bool:
        return self.causal

    def check(self, heads: int) -> None:
        if isinstance(self.step, tuple) and heads % len(self.step):
            raise PatternError(
                f"{self}: {len(self.step)} steps cannot be spread evenly over {heads} query "
                f"heads; give a number of steps that divides {heads}"
            )

    def head_class(self, at: At) -> Hashable:
        return self._step(at)

    def _step(self, at: At) -> int:
        if isinstance(self.step, tuple):
            return self.step[at.head * len(self.step) // at.heads]
        return self.step

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        turns, rest = np.divmod(query - key, self._step(at))
        if self.causal:
            return (rest == 0) & (turns >= 0) & (turns < self.size)
        return (rest == 0) & (np.abs(turns) <= self.size // 2)

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        step = self._step(at)
        back, ahead = (self.size - 1, 0) if self.causal else (self.size // 2, self.size // 2)
        return [(Residue.of(step, query), [(query - step * back, query + step * ahead + 1)])]
