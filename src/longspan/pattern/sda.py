"""SDA, Shifted Dilated Attention: dilated keys whose offset differs from head to head.

    SDA                (j mod S) mod r = h mod r, j in the query's segment of S tokens   O(N S / r)
    SDA.neighborhood   j = i - (h mod r) - r t, 0 <= t < k                               O(N k)

Paper: SDA of "SCCA: Shifted Cross Chunk Attention" (Guo 2023, arXiv 2312.07305) joins LongNet's
dilated attention with DiNAT's dilated neighbourhoods. Its equations could not be read; these are
the two readings. In the first all queries of a segment share keys (LongNet thins out queries as
well), and r heads together see the whole segment. In the second r heads together see a window of
r k tokens. Rows that a head leaves without keys keep themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import (
    At,
    Atom,
    Mask,
    Pattern,
    Positions,
    Progression,
    flag,
    keep_whole,
    whole,
)
from longspan.pattern.lattice import Residue
from longspan.pattern.scca import SCCA
from longspan.pattern.vary import PerHead, PerLayer


@dataclass(frozen=True, repr=False)
class SDANeighborhood(Atom):
    """Dilated neighbourhood, shifted by one token from head to head; causal.

    Args:
        size: keys k of a query.
        step: distance r of neighbouring keys.
    """

    size: int
    step: int
    name: ClassVar[str] = "sda.neighborhood"

    def __post_init__(self) -> None:
        keep_whole(self, "SDA.neighborhood", "size", 1)
        keep_whole(self, "SDA.neighborhood", "step", 1)

    @property
    def is_causal(self) -> bool:
        return True

    def head_class(self, at: At) -> Hashable:
        return at.head % self.step

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        turns, rest = np.divmod(query - key - at.head % self.step, self.step)
        return (rest == 0) & (turns >= 0) & (turns < self.size)

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        last = query - at.head % self.step
        first = last - self.step * (self.size - 1)
        return [(Residue.of(self.step, last), [(first, last + 1)])]


@dataclass(frozen=True, repr=False)
class SDA(Atom):
    """Every ``step``-th key of the query's segment, from the head's own offset.

    Args:
        segment: tokens S in a segment; the last one may be shorter.
        step: distance r of neighbouring keys, at most ``segment``.
        causal: keys up to the query only (default).
    """

    segment: int
    step: int
    causal: bool = True
    name: ClassVar[str] = "sda"
    neighborhood: ClassVar[type[SDANeighborhood]] = SDANeighborhood

    def __post_init__(self) -> None:
        keep_whole(self, "SDA", "segment", 1)
        flag("SDA", "causal", self.causal)
        if keep_whole(self, "SDA", "step", 1) > self.segment:
            raise PatternError(
                f"SDA: step must not exceed segment, got step {self.step} with segment "
                f"{self.segment}"
            )

    @property
    def is_causal(self) -> bool:
        return self.causal

    def head_class(self, at: At) -> Hashable:
        return at.head % self.step

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        same = query // self.segment == key // self.segment
        met = same & ((key % self.segment) % self.step == at.head % self.step)
        return met & (key <= query) if self.causal else met

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        start = query // self.segment * self.segment
        lattice = Residue.of(self.step, start + at.head % self.step)
        return [(lattice, [(start, query + 1 if self.causal else start + self.segment)])]


def longmixed(
    chunk: int, step: int, *, segment: int | None = None, scca: str = "flow", by: str = "heads"
) -> Pattern:
    """LongMixed: SCCA on the first half of the heads, SDA on the second, or by turns of layers.

    Args:
        chunk: tokens in a chunk of SCCA.
        step: distance of neighbouring keys in SDA.
        segment: tokens in a segment of SDA; default ``chunk * step``, as many keys as SCCA.
        scca: ``"flow"`` or ``"fixed"``.
        by: ``"heads"`` or ``"layers"``.

    Raises:
        PatternError: for any other word.
    """
    if scca not in ("flow", "fixed") or by not in ("heads", "layers"):
        raise PatternError(
            'longmixed: scca must be "flow" or "fixed" and by "heads" or "layers", got '
            f"{scca!r} and {by!r}"
        )
    chunk, step = whole("longmixed", "chunk", chunk, 1), whole("longmixed", "step", step, 1)
    crossed = SCCA.flow(chunk) if scca == "flow" else SCCA.fixed(chunk)
    dilated = SDA(chunk * step if segment is None else segment, step)
    return PerHead(crossed, dilated) if by == "heads" else PerLayer(crossed, dilated)
