"""A plan: how a pattern lies in memory, as key ranges per query row.

``plan(pattern, n=...)`` evaluates the closed form of the pattern for every query position, once
for each class of heads that differ, and turns positions into rows. O(n m) time and memory for m
ranges per query; nothing of size n x n.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longspan.errors import PatternError, PlanError
from longspan.pattern.algebra import And, At, Atom, Or, Pattern, Positions, Sub
from longspan.pattern.vary import PerHead
from longspan.planning.layout import Layout, layouts
from longspan.planning.ranges import Ranges
from longspan.planning.tiles import touched_tiles


def position_ranges(pattern: Pattern, query: Positions, at: At) -> Ranges:
    """Keys that a pattern allows each query, as ranges of positions.

    Args:
        pattern: without ``PerLayer`` parts.
        query: positions [n], int64.
        at: head and sequence.
    """
    match pattern:
        case Atom():
            return Ranges.of(pattern.intervals(query, at), len(query))
        case PerHead():
            chosen, inner = pattern.pick(at)
            return position_ranges(chosen, query, inner)
        case Sub(left=left, right=right):
            return position_ranges(left, query, at) - position_ranges(right, query, at)
        case And(parts=parts):
            found = [position_ranges(part, query, at) for part in parts]
            result = found[0]
            for other in found[1:]:
                result = result & other
            return result
        case Or(parts=parts):
            found = [position_ranges(part, query, at) for part in parts]
            result = found[0]
            for other in found[1:]:
                result = result | other
            return result
    raise PatternError(f"cannot plan {pattern}: {type(pattern).__name__} has no closed form")


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of a kernel: key ranges for every query row.

    Attributes:
        lo: int32 [batch or 1, classes, n, m], first key row of each range.
        hi: int32, same shape, one past the last; unused ranges are empty and come last.
        head_class: the class of each query head.
    """

    lo: NDArray[np.int32]
    hi: NDArray[np.int32]
    head_class: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Memory of the ranges, in bytes."""
        return self.lo.nbytes + self.hi.nbytes

    @cached_property
    def _class_sizes(self) -> NDArray[np.int64]:
        return np.bincount(self.head_class, minlength=self.lo.shape[1])

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs per batch row, summed over heads; the mean over batch rows."""
        per_class = (self.hi - self.lo).sum(axis=(2, 3), dtype=np.int64)
        return int((per_class * self._class_sizes).sum() // len(self.lo))

    def tiles(self, block: int = 128) -> int:
        """Tiles of ``block x block`` that hold a pair, per batch row, summed over heads."""
        counts = [
            [touched_tiles(self.lo[b, c], self.hi[b, c], block) for c in range(self.lo.shape[1])]
            for b in range(len(self.lo))
        ]
        return int((np.array(counts) * self._class_sizes).sum() // len(self.lo))


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pattern costs and where its keys lie, for given lengths and heads; reusable.

    Attributes:
        pattern: the pattern of the planned layer.
        n: query rows.
        keys: key rows.
        heads: query heads.
        batch: batch rows that differ; 1 if all are alike.
        passes: kernel runs; over disjoint keys, joined by log-sum-exp.
    """

    pattern: Pattern
    n: int
    keys: int
    heads: int
    batch: int
    passes: tuple[Pass, ...]

    @property
    def pairs(self) -> int:
        """Query-key pairs per batch row, summed over heads."""
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

    def mask(self) -> NDArray[np.bool_]:
        """Dense mask [batch, heads, n, keys], for tests: what the ranges mean."""
        key = np.arange(self.keys)
        dense = np.zeros((self.batch, self.heads, self.n, self.keys), bool)
        for part in self.passes:
            inside = np.asarray((part.lo[..., None] <= key) & (key < part.hi[..., None]))
            dense |= np.any(inside, axis=3)[:, list(part.head_class)]
        return dense

    def __str__(self) -> str:
        from longspan.planning.explain import explain_plan

        return explain_plan(self)


def plan(
    pattern: Pattern,
    n: int,
    heads: int = 1,
    *,
    keys: int | None = None,
    layer: int = 0,
    positions: ArrayLike | None = None,
    segments: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    key_segments: ArrayLike | None = None,
) -> Plan:
    """Lay a pattern out for given lengths and heads.

    Args:
        pattern: where each query may look.
        n: query rows.
        heads: query heads.
        keys: key rows; default ``n``. With fewer queries than keys, queries are the last rows.
        layer: which layer, for patterns that differ between layers.
        positions: query positions inside their segment, [n] or [batch, n].
        segments: query segments, same shape; negative is padding.
        key_positions: key positions, [keys] or [batch, keys].
        key_segments: key segments, same shape.

    Returns:
        The plan. A causal pattern that leaves a query without keys keeps the query's own position.

    Raises:
        PatternError: if the pattern does not fit the number of heads.
        PlanError: if lengths, positions or segments do not fit each other.
    """
    if not isinstance(pattern, Pattern):
        raise PatternError(
            f"expected a pattern, got {pattern!r} ({type(pattern).__name__}); "
            'text becomes a pattern with longspan.parse("window(1024)")'
        )
    for name, value in (("n", n), ("heads", heads), ("keys", keys)):
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise PlanError(f"{name} must be a whole number of at least 1, got {value!r}")
    keys = n if keys is None else keys
    own = pattern.at_layer(layer)
    own.check(heads)
    rows = layouts(n, keys, positions, segments, key_positions, key_segments)
    # Heads whose class is equal share their ranges: 32 heads of a shifted pattern need two rows of
    # them.
    heads_at = [At(head=h, heads=heads) for h in range(heads)]
    keys_of_heads: list[Hashable] = [own.head_class(at) for at in heads_at]
    classes = {key: c for c, key in enumerate(dict.fromkeys(keys_of_heads))}
    found = [
        [_rows(own, layout, heads_at[keys_of_heads.index(key)]) for key in classes]
        for layout in rows
    ]
    width = max(lo.shape[1] for per_class in found for lo, _ in per_class)
    lo = np.zeros((len(rows), len(classes), n, width), np.int32)
    hi = np.zeros_like(lo)
    for b, per_class in enumerate(found):
        for c, (class_lo, class_hi) in enumerate(per_class):
            lo[b, c, :, : class_lo.shape[1]] = class_lo
            hi[b, c, :, : class_hi.shape[1]] = class_hi
    part = Pass(lo, hi, tuple(classes[key] for key in keys_of_heads))
    return Plan(own, n, keys, heads, len(rows), (part,))


def _rows(pattern: Pattern, layout: Layout, at: At) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Key rows of each query row of one batch row and one class of heads."""
    at = At(head=at.head, heads=at.heads, length=layout.query_lengths)
    found = position_ranges(pattern, layout.query_position, at)
    if pattern.is_causal:
        found = found.fill_empty(layout.query_position)
    found = layout.rows_of(found)
    return found.lo.astype(np.int32), found.hi.astype(np.int32)
