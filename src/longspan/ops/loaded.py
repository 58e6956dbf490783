"""A pass as tensors: what a kernel gets, and where what it gives belongs.

Axes: B batch, H query heads, N query rows, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from longspan.ops.merge import Part
from longspan.ops.places import Places
from longspan.ops.ranges import KeyRanges
from longspan.ops.rows import Order
from longspan.ops.views import in_turn


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
        key_step: number of remainders that keys are given in, as views, one after another; they
            stay where they are then.
    """

    ranges: KeyRanges
    keys: Order | None
    queries: Order | None
    heads: Tensor | None
    kv_heads: Tensor | None
    all_heads: int
    key_step: int = 1

    @property
    def of_some_heads(self) -> bool:
        """Whether query or key heads are left out."""
        return self.heads is not None or self.kv_heads is not None

    @property
    def orders(self) -> tuple[Order | None, Order | None, Order | None]:
        """Of queries, keys and values."""
        return self.queries, self.keys, self.keys

    def inputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the kernel gets besides ``ranges``, from queries, keys and values."""
        q, *others = tensors
        each = [x if self.kv_heads is None else x.index_select(1, self.kv_heads) for x in others]
        if self.keys is not None:
            each = [self.keys.take(x) for x in each]
        return self.of_ordered(self.query_rows(q), *each)

    def of_ordered(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same from rows that lie in ``orders``."""
        q, *others = tensors
        return q, *self.of_keys(*others)

    def of_keys(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Keys, values or their gradients in ``orders`` as the kernel has them: views."""
        return in_turn(self.key_step, *tensors)

    @property
    def keys_lie(self) -> bool:
        """Whether the kernel reads all keys where they are."""
        return self.keys is None and self.kv_heads is None

    def query_rows(self, x_BHND: Tensor) -> Tensor:
        """What lies as the queries do, for the heads that take part in the order of the pass."""
        own = x_BHND if self.heads is None else x_BHND.index_select(1, self.heads)
        return own if self.queries is None else self.queries.take(own)

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
        """What the kernel gave."""
        heads = None if self.heads is None else (self.heads, self.all_heads)
        return Part(out, lse, self.queries, heads)
