"""Where the rows of a pass lie, for a kernel that needs no order of them in memory.

Axes: B batch, G heads that differ in their rows, P places of the order.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Places:
    """Where the rows of a pass lie in the tensors; everything None: as they are.

    Attributes:
        query_rows, key_rows: int64 on a CPU, int32 on a GPU, [B or 1, G, P], the row at each
            place, -1 for none; G divides the heads that take part, and neighbouring heads share.
        query_heads, key_heads: int64, which heads take part.
        covers: whether every query row of every head has a place.
    """

    query_rows: Tensor | None = None
    key_rows: Tensor | None = None
    query_heads: Tensor | None = None
    key_heads: Tensor | None = None
    covers: bool = True
