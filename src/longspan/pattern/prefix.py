"""Keys at the start of the sequence that everybody sees.

    Sink     j < n and j <= i     the first n tokens, causally      O(N n)
    Prefix   j < n                the first n tokens, both ways     O(N n)

Papers: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) for attention sinks; prefix language
models (Raffel et al. 2020, arXiv 1910.10683), whose mask is ``Causal() | Prefix(n)``: the prefix
sees itself in both directions. ``Sink(n)`` equals ``Prefix(n) & Causal()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.pattern.algebra import At, Atom, Interval, Mask, Positions, keep_whole


@dataclass(frozen=True, repr=False)
class Sink(Atom):
    """The first ``size`` tokens, visible to every later query and to themselves causally."""

    size: int
    name: ClassVar[str] = "sink"

    def __post_init__(self) -> None:
        keep_whole(self, "Sink", "size", 1)

    @property
    def is_causal(self) -> bool:
        return True

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return (key < self.size) & (key <= query)

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        return [(np.zeros_like(query), np.minimum(query + 1, self.size))]


@dataclass(frozen=True, repr=False)
class Prefix(Atom):
    """The first ``size`` tokens, visible to every query, earlier ones too."""

    size: int
    name: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        keep_whole(self, "Prefix", "size", 1)

    @property
    def is_causal(self) -> bool:
        return False

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return (key < self.size) & (query == query)

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        return [(np.zeros_like(query), np.full_like(query, self.size))]
