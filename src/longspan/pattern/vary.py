"""Patterns that vary over heads or layers.

    PerHead(p0, p1, ...)    the heads are cut in as many equal runs as there are patterns, in order
    PerLayer(p0, p1, ...)   layer l uses pattern l mod their number

Swin in one dimension, for example, is ``PerLayer(Chunk(w, causal=False), Chunk(w, offset=w // 2,
causal=False))``.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from longspan.errors import PatternError
from longspan.pattern.algebra import At, Mask, Pattern, Positions, whole
from longspan.pattern.local import Nothing


@dataclass(frozen=True, repr=False, init=False)
class _Choice(Pattern):
    choices: tuple[Pattern, ...]
    name: ClassVar[str]

    def __init__(self, *choices: Pattern) -> None:
        for choice in choices:
            if not isinstance(choice, Pattern):
                raise PatternError(f"{type(self).__name__}: expected patterns, got {choice!r}")
        if not choices:
            raise PatternError(f"{type(self).__name__}: expected at least one pattern, got none")
        object.__setattr__(self, "choices", tuple(choices))

    @property
    def is_causal(self) -> bool:
        return all(choice.is_causal for choice in self.choices)

    @property
    def needs_length(self) -> bool:
        return any(choice.needs_length for choice in self.choices)

    def check(self, heads: int) -> None:
        for choice in self.choices:
            choice.check(heads)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.choices))})"

    __repr__ = __str__


@dataclass(frozen=True, repr=False, init=False)
class PerHead(_Choice):
    """One pattern for each run of heads; inside a run, a pattern counts heads from 0."""

    name: ClassVar[str] = "heads"

    def check(self, heads: int) -> None:
        count = len(self.choices)
        if heads % count:
            raise PatternError(
                f"{self}: {count} patterns cannot be spread evenly over {heads} query heads; "
                f"give a number of patterns that divides {heads}"
            )
        for choice in self.choices:
            choice.check(heads // count)

    def pick(self, at: At) -> tuple[Pattern, At]:
        """The pattern of a head, and the head's place inside its run."""
        run = at.heads // len(self.choices)
        choice, head = divmod(at.head, run)
        return self.choices[choice], At(head=head, heads=run, length=at.length)

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        pattern, inner = self.pick(at)
        return pattern.allows(query, key, inner)

    def head_class(self, at: At) -> Hashable:
        pattern, inner = self.pick(at)
        return pattern, pattern.head_class(inner)

    def counts(self, query: Positions, key: Positions, at: At) -> NDArray[np.int64]:
        pattern, inner = self.pick(at)
        return pattern.counts(query, key, inner)

    def branches(self) -> tuple[Pattern, ...]:
        each = [choice.branches() for choice in self.choices]
        if max(map(len, each)) == 1:
            return (self,)
        return tuple(PerHead(*row) for row in zip_longest(*each, fillvalue=Nothing()))

    def at_layer(self, layer: int) -> Pattern:
        return PerHead(*(choice.at_layer(layer) for choice in self.choices))


@dataclass(frozen=True, repr=False, init=False)
class PerLayer(_Choice):
    """One pattern for each layer, over and over."""

    name: ClassVar[str] = "layers"

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        raise PatternError(f"{self} differs between layers; ask at_layer(l) for one of them first")

    def at_layer(self, layer: int) -> Pattern:
        number = whole(self.name, "layer", layer, 0)
        return self.choices[number % len(self.choices)].at_layer(number)
