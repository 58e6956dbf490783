"""Neighbourhood attention in one dimension (NA, DiNA), with windows clamped at the edges.

    group t = i mod d of L_t tokens, place q = i // d in it, leader l of q (q itself for stride 1)
    two-sided   k tokens of the group from clamp(l - k // 2, 0, L_t - k)            O(N k)
    causal      places max(l - k + 1, 0) to q                                       O(N k)

Papers: NAT (Hassani et al. 2022, arXiv 2204.07143), DiNAT (2022, arXiv 2209.15001), generalised
neighbourhood attention (2025, arXiv 2504.16922) for the stride; the definition is NATTEN's. At the
edges the window stops moving, so that every query sees exactly k keys and the relation is not
symmetric there: this is no band of the matrix. ``stride == k`` is blocked attention.

How ours differs: a group shorter than k is seen whole (NATTEN refuses), and a causal stride never
looks at the length, so that growing sequences keep their pattern: where the last block of
``stride`` queries is cut off, NATTEN starts its window earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import At, Atom, Mask, Positions, Progression, flag, keep_whole
from longspan.pattern.lattice import Residue


@dataclass(frozen=True, repr=False)
class Neighborhood(Atom):
    """The ``size`` nearest tokens of the query's dilation group.

    Args:
        size: keys k of a query, at least 2.
        dilation: distance d of neighbours.
        stride: queries that share one window, at most ``size``.
        causal: look back only; two-sided by default.
    """

    size: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False
    name: ClassVar[str] = "neighborhood"

    def __post_init__(self) -> None:
        keep_whole(self, "Neighborhood", "size", 2)
        keep_whole(self, "Neighborhood", "dilation", 1)
        flag("Neighborhood", "causal", self.causal)
        if keep_whole(self, "Neighborhood", "stride", 1) > self.size:
            raise PatternError(
                f"Neighborhood: stride must not exceed size, got stride {self.stride} with size "
                f"{self.size}"
            )

    @property
    def is_causal(self) -> bool:
        return self.causal

    @property
    def needs_length(self) -> bool:
        return not self.causal

    def _places(self, query: Positions, at: At) -> tuple[Any, Any]:
        """First place of the group that each query sees, and one past the last."""
        place = query // self.dilation
        block = place // self.stride * self.stride
        if self.causal:
            return np.maximum(block + self.stride - self.size, 0), place + 1
        whole_turns, rest = np.divmod(at.length, self.dilation)
        group = whole_turns + (query % self.dilation < rest)
        leader = np.minimum(block + self.stride // 2, group - 1)
        first = np.clip(leader - self.size // 2, 0, np.maximum(0, group - self.size))
        return first, np.minimum(first + self.size, group)

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        first, stop = self._places(query, at)
        place = key // self.dilation
        same = query % self.dilation == key % self.dilation
        return same & (first <= place) & (place < stop)

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        first, stop = self._places(query, at)
        group = query % self.dilation
        lo, hi = group + self.dilation * first, group + self.dilation * (stop - 1) + 1
        return [(Residue.of(self.dilation, group), [(lo, np.where(first < stop, hi, lo))])]
