"""Chunks, and LongLoRA's shifted chunks (S2-Attn).

    Chunk          (i - o) // g == (j - o) // g                                        O(N g)
    ShiftedChunk   the same with o = 0 in the first half of the heads, g / 2 in the others

Papers: LongLoRA (Chen et al. 2023, arXiv 2309.12307, S2-Attn); Swin Transformer (Liu et al. 2021,
arXiv 2103.14030), whose 1-D form shifts whole layers: ``PerLayer(Chunk(g, causal=False), Chunk(g,
offset=g // 2, causal=False))``.

How ours differs: the first and the last half chunk of a shifted head stand alone, as in LongLoRA's
flash path. Its other path rolls the sequence, so that the first tokens see the last ones: (g/2)^2
future pairs in every shifted head. With an odd number of heads the larger half is unshifted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import At, Atom, Interval, Mask, Positions, flag, keep_whole


@dataclass(frozen=True, repr=False)
class Chunk(Atom):
    """Queries and keys of the same chunk.

    Args:
        size: tokens in a chunk; the last one may be shorter.
        offset: position of the first chunk border after 0; 0 <= offset < size.
        causal: keys up to the query only (default).
    """

    size: int
    offset: int = 0
    causal: bool = True
    name: ClassVar[str] = "chunk"

    def __post_init__(self) -> None:
        keep_whole(self, "Chunk", "size", 1)
        flag("Chunk", "causal", self.causal)
        if keep_whole(self, "Chunk", "offset", 0) >= self.size:
            raise PatternError(
                f"Chunk: offset must be below size, got offset {self.offset} with size {self.size}"
            )

    @property
    def is_causal(self) -> bool:
        return self.causal

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        same = (query - self.offset) // self.size == (key - self.offset) // self.size
        return same & (key <= query) if self.causal else same

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        start = (query - self.offset) // self.size * self.size + self.offset
        return [(start, query + 1 if self.causal else start + self.size)]


@dataclass(frozen=True, repr=False)
class ShiftedChunk(Atom):
    """Chunks whose borders are moved by half a chunk in the second half of the heads (S2-Attn).

    Args:
        size: tokens in a chunk, even.
        causal: keys up to the query only (default).
    """

    size: int
    causal: bool = True
    name: ClassVar[str] = "shifted_chunk"

    def __post_init__(self) -> None:
        flag("ShiftedChunk", "causal", self.causal)
        if keep_whole(self, "ShiftedChunk", "size", 2) % 2:
            raise PatternError(
                f"ShiftedChunk: size must be even (half of it is the shift), got {self.size}"
            )

    @property
    def is_causal(self) -> bool:
        return self.causal

    def _chunk(self, at: At) -> Chunk:
        shifted = at.head >= at.heads - at.heads // 2
        return Chunk(self.size, offset=self.size // 2 if shifted else 0, causal=self.causal)

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        half = np.where(at.head >= at.heads - at.heads // 2, self.size // 2, 0)
        same = np.floor_divide(query - half, self.size) == np.floor_divide(key - half, self.size)
        return same & (key <= query) if self.causal else same

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        return self._chunk(at).intervals(query, at)

    def head_class(self, at: At) -> Hashable:
        return self._chunk(at).offset
