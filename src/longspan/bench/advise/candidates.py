"""Candidates: families of patterns whose parameters follow from a number of keys per query.

Each family is written so that its mean number of keys per query and head comes close to the
number asked for; the plan then counts, and what is too large is made smaller until it fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longspan.analysis.reach import period
from longspan.errors import LongspanError
from longspan.pattern import Pattern, parse
from longspan.planning import plan


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What parameters follow from.

    Attributes:
        keys: mean keys per query and head.
        n: tokens.
        heads: query heads.
        causal: False for both directions.
    """

    keys: float
    n: int
    heads: int
    causal: bool

    @property
    def legal(self) -> float:
        """Mean keys per query of dense attention."""
        return (self.n + 1) / 2 if self.causal else self.n

    @property
    def border(self) -> int:
        """Tokens of a chunk whose mean row has ``keys`` keys."""
        return even((2 if self.causal else 1) * self.keys)

    @property
    def step(self) -> int:
        """Gap of keys over the whole past, or sequence, that leaves ``keys`` keys."""
        return max(1, math.ceil(self.legal / self.keys))

    @property
    def gap(self) -> int:
        """The same, but no more than there are heads to fill it."""
        return min(self.step, self.heads)

    @property
    def tail(self) -> str:
        """The argument of two-sided patterns."""
        return "" if self.causal else ", causal=false"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of candidate.

    Attributes:
        name: short.
        make: the text of a pattern, or None where the sizes leave none.
        good_for: what its shape suits, in a sentence.
        ways: directions that it has: causal is True.
    """

    name: str
    make: Callable[[Sizes], str | None]
    good_for: str
    ways: tuple[bool, ...] = (True, False)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A pattern to be measured.

    Attributes:
        family: name of its family; ``given`` for one that was given.
        text: as it is written; a preset by its name.
        pattern: what that reads as.
        good_for: what its shape suits; empty for one that was given.
        keys: mean keys per query, head and layer.
    """

    family: str
    text: str
    pattern: Pattern
    good_for: str
    keys: float


def even(size: float) -> int:
    """A round, even size of at most ``size``, or 2: whole tiles of the kernels where possible."""
    for least, unit in ((512, 128), (256, 64), (64, 16)):
        if size >= least:
            return int(size) // unit * unit
    return max(2, int(size) // 2 * 2)


def layers_of(pattern: Pattern) -> list[Pattern]:
    """The patterns of one period of layers."""
    return [pattern.at_layer(layer) for layer in range(period(pattern))]


def mean_keys(pattern: Pattern, n: int, heads: int) -> float:
    """Pairs per query and head, mean over layers; what counts twice is two pairs."""
    pairs = [plan(one, n, heads).pairs for one in layers_of(pattern)]
    return float(np.mean(pairs)) / (heads * n)


def given(text: str, n: int, heads: int) -> Candidate:
    """A pattern that was given, as it is."""
    pattern = parse(text)
    keys = mean_keys(pattern, n, heads)
    return Candidate(family="given", text=text, pattern=pattern, good_for="", keys=keys)


def fitted(family: Family, sizes: Sizes) -> Candidate | str:
    """The candidate of a family that fits; or why there is none."""
    asked, found = sizes.keys, 0.0
    for _ in range(8):
        text = family.make(Sizes(**{**vars(sizes), "keys": asked})) if asked >= 1 else None
        if text is None:
            break
        try:
            pattern = parse(text)
            found = mean_keys(pattern, sizes.n, sizes.heads)
        except LongspanError as error:
            return str(error).split("\n", 1)[0]
        if found <= sizes.keys:
            return Candidate(
                family=family.name,
                text=text,
                pattern=pattern,
                good_for=family.good_for,
                keys=found,
            )
        asked *= 0.95 * sizes.keys / found
    least = f"; its smallest form has {found:,.0f}" if found else ""
    return f"no form of it has at most {sizes.keys:,.0f} keys per query{least}"
