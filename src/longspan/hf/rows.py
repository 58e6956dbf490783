"""Where the rows of a forward pass stand, in place of a mask: a small record for all its layers.

Rows of one text, of packed documents and of padding are numbers on the rows, so a pattern's plan
is made of them in O(N), and no tensor of pairs is formed. ``masks`` makes the record.

Axes: B batch, N query rows, M key rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from longspan.errors import Refusal
from longspan.pattern import Causal, Dense, Pattern
from longspan.planning import Plan, plan

Table = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """Where the query and key rows of one forward pass stand, for all layers of one type.

    transformers carries it where a mask would be, through checkpointing and static caches.

    Attributes:
        attention: the attention implementation it was made for.
        queries: query rows N.
        keys: key rows M.
        query_start: row of the first query in the whole sequence, padding counted.
        key_start: row of the first key, above 0 where a sliding cache has dropped keys.
        own: what the model's own mask allows.
        positions: query positions [B, N]; None if rows count as they lie.
        segments: query segments [B, N], negative for padding; None if there is only one.
        key_positions: key positions [B, M]; None as for queries.
        key_segments: key segments [B, M]; None as for queries.
        masked: whether padding was stated, by an ``attention_mask``.
        real: which rows so far are tokens, the queries among them, bool [B, rows]; None: all.
        kept: what layers of this forward pass share: plans, and whether positions were checked.
    """

    attention: str
    queries: int
    keys: int
    query_start: int
    key_start: int
    own: Pattern
    positions: Table | None = None
    segments: Table | None = None
    key_positions: Table | None = None
    key_segments: Table | None = None
    masked: bool = False
    real: NDArray[np.bool_] | None = None
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    # `generate` with a static cache makes masks ahead and treats them as 4-D tensors.
    ndim: ClassVar[int] = 4

    def contiguous(self) -> Rows:
        """Itself; see ``ndim``."""
        return self

    def __getitem__(self, index: Any) -> Rows:
        """The record of the last query rows, as of a 4-D mask: ``rows[:, :, -1:, :]``.

        Gemma 4 computes layers that share keys for the rows alone whose logits are wanted.

        Raises:
            Refusal: for anything else.
        """
        whole = slice(None)
        taken = index[2] if isinstance(index, tuple) and len(index) == 4 else None
        if isinstance(taken, slice) and (whole, whole, taken, whole) == index:
            first, end, step = taken.indices(self.queries)
            if (first, end, step) == (0, self.queries, 1):
                return self
            if first < end == self.queries and step == 1:
                return replace(
                    self,
                    queries=end - first,
                    query_start=self.query_start + first,
                    # Packed documents have none: the planner takes queries for the last keys.
                    positions=None if self.positions is None else self.positions[:, first:],
                    segments=None if self.segments is None else self.segments[:, first:],
                    kept={},
                )
        raise Refusal(
            f"This model takes {index!r} of its attention mask, which longspan does not read; use "
            "its own attention: longspan.hf.remove(model)."
        )

    def __getattr__(self, name: str) -> Any:
        # Reached only for what the record does not have.
        raise AttributeError(
            f"{name!r}: this model computes with its attention mask instead of handing it on, "
            "which longspan does not support; use its own attention: longspan.hf.remove(model)."
        )

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        """Take the place of a mask only with longspan's attention.

        Raises:
            Refusal: when another attention function receives the record.
        """
        raise Refusal(
            "Another attention received the mask record of longspan: a backward pass with "
            "gradient checkpointing after the pattern was removed, or masks made ahead for "
            "another attention. Keep the pattern applied until the backward pass is done."
        )

    def plan(self, pattern: Pattern, layer: int, heads: int) -> Plan:
        """The plan of a layer's pattern within the model's own mask; one per kind of layer."""
        seen = within(pattern.at_layer(layer), self.own)
        if (seen, heads) not in self.kept:
            if self.segments is None:
                found = _plain_plan(
                    seen, self.queries, self.keys, self.query_start, self.key_start, heads
                )
            else:
                found = plan(
                    seen,
                    self.queries,
                    heads,
                    keys=self.keys,
                    positions=self.positions,
                    segments=self.segments,
                    key_positions=self.key_positions,
                    key_segments=self.key_segments,
                )
            self.kept[seen, heads] = found
        return self.kept[seen, heads]

    def newest(self) -> Rows:
        """The same queries over their own rows alone, without what a cache held before."""
        if self.keys == self.queries:
            return self
        if "newest" not in self.kept:
            self.kept["newest"] = replace(
                self,
                keys=self.queries,
                key_start=self.query_start,
                key_positions=self.positions,
                key_segments=self.segments,
                kept={},
            )
        return self.kept["newest"]


def within(pattern: Pattern, own: Pattern) -> Pattern:
    """Intersection, written without the parts that add nothing."""
    if pattern == own or own == Dense() or (own == Causal() and pattern.is_causal):
        return pattern
    if pattern == Dense() or (pattern == Causal() and own.is_causal):
        return own
    return pattern & own


@lru_cache(maxsize=16)
def _plain_plan(
    pattern: Pattern, queries: int, keys: int, query_start: int, key_start: int, heads: int
) -> Plan:
    """A plan without padding or documents: kept, because every training step asks for the same."""
    if key_start == 0 and query_start + queries == keys:
        return plan(pattern, queries, heads, keys=keys)
    return plan(
        pattern,
        queries,
        heads,
        keys=keys,
        positions=query_start + np.arange(queries),
        key_positions=key_start + np.arange(keys),
    )
