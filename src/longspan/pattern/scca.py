"""SCCA, Shifted Cross Chunk Attention: queries stay, keys and values come from a shifted chunk.

    fixed   second half of the heads: c g - s <= j < (c + 1) g - s with c = i // g, the query's
            chunk; first half of the heads: the same with s = 0                        O(N g)
    flow    head h: the keys of chunk a - (h mod (a + 1)) with a = i // g; with as many heads as
            chunks one layer sees the whole past                                       O(N g)

and j <= i in both.

Paper: SCCA (Guo 2023, arXiv 2312.07305). Its equations could not be read; shifts are parameters.
How ours differs: keys are chosen by true position, so nothing leaks and no legal key is lost. In
``flow`` the shift wraps inside the query's own past (``wrap="past"``): no head is wasted on early
chunks, and the mask of n tokens is the corner of the mask of n + 1. ``wrap="none"`` is the literal
shift by h chunks; empty rows keep themselves. Not causal, ``flow`` is a ring over all chunks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import At, Atom, Interval, Mask, Positions, flag, keep_whole


@dataclass(frozen=True, repr=False)
class SCCAFixed(Atom):
    """Half of the heads attend within their chunk, half to a window of the same width shifted to
    the past.

    Args:
        chunk: tokens in a chunk.
        shift: displacement of keys and values in the second half of the heads, in tokens; default
            half a chunk.
        causal: keys up to the query only (default).
    """

    chunk: int
    shift: int | None = None
    causal: bool = True
    name: ClassVar[str] = "scca.fixed"

    def __post_init__(self) -> None:
        keep_whole(self, "SCCA.fixed", "chunk", 1)
        flag("SCCA.fixed", "causal", self.causal)
        if self.shift is not None:
            keep_whole(self, "SCCA.fixed", "shift", 0)

    @property
    def is_causal(self) -> bool:
        return self.causal

    def _shift(self, at: At) -> int:
        if at.head < at.heads - at.heads // 2:
            return 0
        return self.chunk // 2 if self.shift is None else self.shift

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        slot = key + self._shift(at)
        same = slot // self.chunk == query // self.chunk
        return same & (key <= query) if self.causal else same

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        start = query // self.chunk * self.chunk - self._shift(at)
        stop = start + self.chunk
        return [(start, np.minimum(stop, query + 1) if self.causal else stop)]

    def head_class(self, at: At) -> Hashable:
        return self._shift(at)


@dataclass(frozen=True, repr=False)
class SCCAFlow(Atom):
    """Head h attends to the chunk that lies h chunks back.

    Args:
        chunk: tokens in a chunk.
        wrap: ``"past"`` wraps the shift inside the query's own past (default), ``"none"`` does not
            wrap.
        causal: False makes a ring over all chunks.
    """

    chunk: int
    wrap: str = "past"
    causal: bool = True
    name: ClassVar[str] = "scca.flow"

    def __post_init__(self) -> None:
        keep_whole(self, "SCCA.flow", "chunk", 1)
        flag("SCCA.flow", "causal", self.causal)
        if self.wrap not in ("past", "none"):
            raise PatternError(f'SCCA.flow: wrap must be "past" or "none", got {self.wrap!r}')
        if not self.causal and self.wrap != "past":
            raise PatternError(
                "SCCA.flow: without causal the chunks form a ring, so wrap has no meaning"
            )

    @property
    def is_causal(self) -> bool:
        return self.causal

    @property
    def needs_length(self) -> bool:
        return not self.causal

    def _source(self, query: Positions, at: At) -> Positions:
        """Chunk that each query reads; negative where there is none."""
        own = query // self.chunk
        if not self.causal:
            return (own - at.head) % np.maximum(1, -(-at.length // self.chunk))
        return own - at.head % (own + 1) if self.wrap == "past" else own - at.head

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        same = key // self.chunk == self._source(query, at)
        return same & (key <= query) if self.causal else same

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        start = self._source(query, at) * self.chunk
        stop = start + self.chunk
        return [(start, np.minimum(stop, query + 1) if self.causal else stop)]

    def head_class(self, at: At) -> Hashable:
        return at.head


class SCCA:
    """The two patterns of SCCA: ``SCCA.fixed(chunk, shift=...)`` and ``SCCA.flow(chunk)``."""

    fixed = SCCAFixed
    flow = SCCAFlow
