"""Move rows into the order of a pass and back.

A residue order puts keys of one remainder side by side, so that a kernel reads ranges; queries
and outputs move likewise. Gathering rows costs one copy; where an order is a permutation its
gradient is a gather too, by the inverse, instead of a scatter that adds.

Axes: B batch, H heads, N rows, P places of the order, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """Which row stands at each place.

    Attributes:
        row_BP: int64 [B or 1, P].
        place_BN: int64 [B or 1, N], the place of each row; None unless every row has one place.
        rows: number of rows N.
    """

    row_BP: Tensor
    place_BN: Tensor | None
    rows: int

    @classmethod
    def of(cls, order: NDArray[np.int32], rows: int, device: torch.device) -> Order:
        """From the table of a pass [B or 1, P]."""
        row_BP = torch.from_numpy(order.astype(np.int64))
        place_BN = None
        if order.shape[1] == rows:
            ascending, place_BN = torch.sort(row_BP, dim=1)
            if not bool((ascending == torch.arange(rows)).all()):
                place_BN = None
        return cls(row_BP.to(device), None if place_BN is None else place_BN.to(device), rows)

    def take(self, x_BHND: Tensor) -> Tensor:
        """Rows in the order of the places [B, H, P, D]."""
        if self.place_BN is None:
            return _pick(x_BHND, self.row_BP)
        return _Permute.apply(x_BHND, self.row_BP, self.place_BN)

    def put(self, x_BHPD: Tensor, fill: float) -> Tensor:
        """Places back in the order of the rows [B, H, N, D]; rows without a place get ``fill``."""
        if self.place_BN is not None:
            return _Permute.apply(x_BHPD, self.place_BN, self.row_BP)
        batch, heads, _, width = x_BHPD.shape
        index = self.row_BP[:, None, :, None].expand(batch, heads, -1, width)
        return x_BHPD.new_full((batch, heads, self.rows, width), fill).scatter(2, index, x_BHPD)


def _pick(x_BHND: Tensor, row_BP: Tensor) -> Tensor:
    batch, heads, rows, width = x_BHND.shape
    # Rows of one flat table: several times faster on a CPU than selecting along an inner axis.
    first_X = torch.arange(0, batch * heads * rows, rows, device=x_BHND.device)
    flat = first_X.view(batch, heads, 1) + row_BP[:, None]
    return x_BHND.reshape(-1, width).index_select(0, flat.view(-1)).view(batch, heads, -1, width)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHND: Tensor, row_BP: Tensor, place_BN: Tensor) -> Tensor:
        ctx.orders = (row_BP, place_BN)
        return _pick(x_BHND, row_BP)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        row_BP, place_BN = ctx.orders
        return _Permute.apply(grads[0], place_BN, row_BP), None, None
