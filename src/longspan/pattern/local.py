"""Dense and local patterns: everything, everything before, and a sliding window.

    Dense    all pairs                                   O(N^2)
    Causal   j <= i                                      O(N^2)
    Window   causal: 0 <= i - j < w                      O(N w)
             two-sided: |i - j| <= w // 2                O(N w)

Paper: Longformer (Beltagy et al. 2020, arXiv 2004.05150) for the window. A causal window counts
the query itself (``Window(1)`` sees only itself), as Hugging Face's ``sliding_window`` does. A
two-sided window holds ``w`` keys in all for odd ``w``; for even ``w`` it is the
``attention_window`` of Longformer, ``w / 2`` keys on each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.pattern.algebra import END, At, Atom, Interval, Mask, Positions, flag, keep_whole


@dataclass(frozen=True, repr=False)
class Dense(Atom):
    """Every query sees every key of its segment."""

    name: ClassVar[str] = "dense"

    @property
    def is_causal(self) -> bool:
        return False

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return (query == query) & (key == key)

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        return [(np.zeros_like(query), np.full_like(query, END))]


@dataclass(frozen=True, repr=False)
class Nothing(Atom):
    """No pair at all."""

    name: ClassVar[str] = "nothing"

    @property
    def is_causal(self) -> bool:
        return True

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return (query != query) | (key != key)

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        return []


@dataclass(frozen=True, repr=False)
class Causal(Atom):
    """Every query sees itself and all keys before it."""

    name: ClassVar[str] = "causal"

    @property
    def is_causal(self) -> bool:
        return True

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return key <= query

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        return [(np.zeros_like(query), query + 1)]


@dataclass(frozen=True, repr=False)
class Window(Atom):
    """Sliding window.

    Args:
        size: number of keys, the query itself included; see the module text for the two-sided
            form.
        causal: look back only (default), or to both sides.
    """

    size: int
    causal: bool = True
    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        keep_whole(self, "Window", "size", 1)
        flag("Window", "causal", self.causal)

    @property
    def is_causal(self) -> bool:
        return self.causal

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        if self.causal:
            return (key <= query) & (query - key < self.size)
        return np.abs(query - key) <= self.size // 2

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        if self.causal:
            return [(query - self.size + 1, query + 1)]
        return [(query - self.size // 2, query + self.size // 2 + 1)]
