"""A pass as tensors: what a kernel gets, and where what it gives belongs.

Axes: B batch, H query heads, N query rows, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longspan.ops.merge import Part
from longspan.ops.places import Places
from longspan.ops.ranges import KeyRanges
from longspan.ops.rows import Order


@dataclass(frozen=True, eq=False)
class Loaded:
    """A pass as tensors.

    Attributes:
        ranges: key ranges in the order of the pass, for the heads that take part.
        keys: order of the keys; None if they stay.
        queries: order of the queries; None if they stay.
        heads: query heads that take part; None for all.
        kv_heads: their key heads; None for all.
        all_heads: number of query heads, whether they take part or not.
    """

    ranges: KeyRanges
    keys: Order | None
    queries: Order | None
    heads: Tensor | None
    kv_heads: Tensor | None
    all_heads: int

    @property
    def orders(self) -> tuple[Order | None, Order | None, Order | None]:
        """Of queries, keys and values."""
        return self.queries, self.keys, self.keys

    def inputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the kernel gets besides ``ranges``, from queries, keys and values."""
        chosen = zip(tensors, (self.heads, self.kv_heads, self.kv_heads), strict=True)
        each = [x if heads is None else x.index_select(1, heads) for x, heads in chosen]
        return tuple(
            x if order is None else order.take(x)
            for x, order in zip(each, self.orders, strict=True)
        )

    @cached_property
    def places(self) -> Places:
        """For a kernel that reads rows where they lie."""
        queries, keys = (
            None if order is None else order.table.row_cBGP[0].contiguous()
            for order in (self.queries, self.keys)
        )
        return Places(
            query_rows=queries,
            key_rows=keys,
            query_heads=self.heads,
            key_heads=self.kv_heads,
            covers=self.heads is None and (self.queries is None or self.queries.covers),
        )

    def outputs(self, out: Tensor, lse: Tensor) -> Part:
        """What the kernel gave, for all heads."""
        if self.heads is None:
            return Part(out, lse, self.queries)
        out, lse = Part(out, lse, self.queries).placed()
        batch, _, n, width = out.shape
        heads = self.all_heads
        return Part(
            out.new_zeros(batch, heads, n, width).index_copy(1, self.heads, out),
            lse.new_full((batch, heads, n), -torch.inf).index_copy(1, self.heads, lse),
        )
