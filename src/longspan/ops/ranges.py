"""Key ranges as tensors: what every kernel reads.

Axes: B batch, H query heads, G range groups, N query rows, M key rows, m ranges per query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from longspan.ops.more_keys import MoreKeys


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """The keys that each query row sees, as half-open ranges of key rows.

    Query row ``i`` of batch row ``b`` and head ``h`` sees key rows ``j`` with ``lo[g, i, t] <= j <
    hi[g, i, t]`` for some ``t``, where ``g = group[b, h]``. The ranges of a row are disjoint and
    sorted; unused ones are empty (``lo == hi``) and come last. Compared by identity, so that a
    kernel can cache what it derives.

    Attributes:
        lo_GNm: int32 [G, N, m], first key row of each range.
        hi_GNm: int32 [G, N, m], one past its last key row.
        group_BH: int64 [B or 1, H], the group of each head; a leading 1 means every batch row
            alike.
        keys: number of key rows M.
        key_rows: number of batch rows that keys are counted through, one after another: keys are
            then given as [key_rows, K, M / key_rows, D], whatever the batch of the queries, as
            the rows of remainders are, which are views of rows in their own order.
        more: the keys that are counted behind those that are given, for a kernel that takes them;
            ranges of a row need not be sorted then. None if there are none.
    """

    lo_GNm: Tensor
    hi_GNm: Tensor
    group_BH: Tensor
    keys: int
    key_rows: int = 1
    more: MoreKeys | None = None

    @property
    def queries(self) -> int:
        """Number of query rows N."""
        return self.lo_GNm.shape[1]

    @property
    def groups(self) -> int:
        """Number of distinct rows of ranges G."""
        return self.lo_GNm.shape[0]

    def empty_GN(self) -> Tensor:
        """bool [G, N]: the rows that see no key."""
        return (self.lo_GNm >= self.hi_GNm).all(-1)

    def mask_GNM(self) -> Tensor:
        """Dense boolean form [G, N, M], for the oracle and for tests only: O(N M) memory."""
        key_M = torch.arange(self.keys, device=self.lo_GNm.device)
        inside = (self.lo_GNm[..., None] <= key_M) & (key_M < self.hi_GNm[..., None])
        return inside.any(dim=2)
