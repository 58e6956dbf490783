"""A plan: how a pattern lies in memory, as a few passes over ranges of keys.

``plan(pattern, n=...)`` evaluates the closed form of the pattern for every query position, once
for each class of heads that differ, and turns positions into rows. O(n m) time and memory for m
ranges per query; nothing of size n x n.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longspan.errors import PatternError, PlanError
from longspan.pattern.algebra import END, Pattern, whole
from longspan.pattern.text import parse
from longspan.planning.choose import choose
from longspan.planning.compiler import passes_of
from longspan.planning.layout import Layout, layouts
from longspan.planning.passes import Pass
from longspan.planning.trim import trimmed

# Queries up to which the choice of an order is kept while keys become more.
_FEW = 8


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pattern costs and where its keys lie, for given lengths and heads; reusable.

    Attributes:
        pattern: the pattern of the planned layer.
        n: query rows.
        keys: key rows.
        heads: query heads.
        batch: batch rows that differ; 1 if all are alike.
        passes: kernel runs, joined by log-sum-exp; over disjoint keys, but for mixtures, whose
            branches may share keys.
    """

    pattern: Pattern
    n: int
    keys: int
    heads: int
    batch: int
    passes: tuple[Pass, ...]

    @property
    def pairs(self) -> int:
        """Query-key pairs per batch row, summed over heads; what counts twice is two pairs."""
        return sum(part.pairs for part in self.passes)

    @property
    def density(self) -> float:
        """Share of all ``n x keys`` pairs that are computed; dense causal: about 1/2."""
        return self.pairs / (self.heads * self.n * self.keys)

    @property
    def nbytes(self) -> int:
        """Memory of the plan itself, in bytes."""
        return sum(part.nbytes for part in self.passes)

    def flops(self, head_dim: int = 128, backward: bool = False) -> int:
        """Floating-point operations per batch row: 4 D per pair forward, 14 D with backward."""
        return (14 if backward else 4) * head_dim * self.pairs

    def bytes(self, head_dim: int = 128, kv_heads: int | None = None, itemsize: int = 2) -> int:
        """Least memory traffic of a forward pass per batch row: q, k, v and out, once each."""
        kv = self.heads if kv_heads is None else kv_heads
        return (2 * self.heads * self.n + 2 * kv * self.keys) * head_dim * itemsize

    def tiles(self, block: int = 128) -> int:
        """Tiles of ``block x block`` that the passes touch, per batch row, summed over heads."""
        return sum(part.tiles(block) for part in self.passes)

    def counts(self) -> NDArray[np.int64]:
        """How often each pair counts [batch, heads, n, keys]; dense, for tests."""
        found = np.zeros((self.batch, self.heads, self.n, self.keys), np.int64)
        for part in self.passes:
            found += part.counts(self.n, self.keys)
        return found

    def mask(self) -> NDArray[np.bool_]:
        """Which pairs are computed [batch, heads, n, keys]; dense, for tests."""
        return self.counts() > 0

    def __str__(self) -> str:
        from longspan.planning.explain import explain_plan

        return explain_plan(self)


def plan(
    pattern: Pattern | str,
    n: int,
    heads: int = 1,
    *,
    keys: int | None = None,
    layer: int = 0,
    positions: ArrayLike | None = None,
    segments: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    key_segments: ArrayLike | None = None,
    orders: str | int = "auto",
) -> Plan:
    """Lay a pattern out for given lengths and heads.

    Args:
        pattern: where each query may look, or its text form.
        n: query rows.
        heads: query heads.
        keys: key rows; default ``n``. With fewer queries than keys, queries are the last rows.
        layer: which layer, for patterns that differ between layers.
        positions: query positions inside their segment, [n] or [batch, n].
        segments: query segments, same shape; negative is padding.
        key_positions: key positions, [keys] or [batch, keys].
        key_segments: key segments, same shape.
        orders: ``"auto"`` lets the cost model choose; ``"apart"`` gives each order of the keys a
            pass; ``"joined"`` lets orders lie side by side in one pass where the queries stay in
            place; a number r puts all keys in one pass by their remainder mod r, 1 in their own
            order (which takes a range for each strided key, and a pass for each time that a
            mixture counts a key).

    Returns:
        The plan. A causal pattern that leaves a query without keys keeps the query's own position.

    Raises:
        PatternError: if the pattern does not fit the number of heads, or its text is wrong.
        PlanError: if lengths, positions or segments do not fit each other.
    """
    if isinstance(pattern, str):
        pattern = parse(pattern)
    if not isinstance(pattern, Pattern):
        raise PatternError(
            f"expected a pattern or its text form, got {pattern!r} ({type(pattern).__name__})"
        )
    keys = n if keys is None else keys
    for name, value in (("n", n), ("heads", heads), ("keys", keys)):
        own = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not own or not 1 <= value < END:
            raise PlanError(f"{name} must be a whole number from 1 to {END - 1}, got {value!r}")
    n, heads, keys = int(n), int(heads), int(keys)
    own = pattern.at_layer(whole("attention", "layer", layer, 0))
    own.require(heads)
    rows = layouts(n, keys, positions, segments, key_positions, key_segments)
    words = ("auto", "apart", "joined")
    if orders not in words and not (isinstance(orders, int) and orders >= 1):
        raise PlanError(f"orders must be one of {words} or a number from 1, got {orders!r}")
    if orders == "auto" and rows[0].counted and n <= _FEW:
        together = _choice_for_few(own, n, _rounded(keys), heads)
    elif orders == "auto":
        together = choose(own, rows[0], heads)
    else:
        together = orders if isinstance(orders, int) else None
    passes = passes_of(own, rows, heads, together, join=orders not in ("apart", 1))
    return Plan(own, n, keys, heads, len(rows), tuple(map(trimmed, passes)))


@lru_cache(maxsize=256)
def _choice_for_few(pattern: Pattern, n: int, keys: int, heads: int) -> int | None:
    """What the cost model chooses for the last few of many rows.

    Each token is a row more: asked about all of them, it would take longer than the plan.
    """
    return choose(pattern, Layout.of_last(n, keys), heads)


def _rounded(keys: int) -> int:
    """Up to the next of eight sizes between powers of two."""
    step = 1 << max(0, keys.bit_length() - 4)
    return min(-(-keys // step) * step, END - 1)
