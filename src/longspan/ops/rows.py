"""Move rows into the order of a pass and back.

A residue order puts keys of one remainder side by side, so that a kernel reads ranges; queries
and outputs move likewise. Gathering rows costs one copy, and so does its gradient: a row's
gradient is gathered from its places, instead of scattered and added.

Axes: B batch, H heads, N rows, P places of the order, c places of a row at most, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.ops.fused import can_fuse, gather

# Rows that stand at more places than this have their gradients scattered.
_MOST_PLACES = 4


@dataclass(frozen=True, eq=False)
class Order:
    """Which row stands at each place.

    Attributes:
        row_BP: int64 [B or 1, P].
        places_cBN: int64 [c, B or 1, N], the places of each row, P where there are no more; None
            for c over ``_MOST_PLACES``.
        rows: number of rows N.
        exact: every row has one place.
        full: for each of the c, whether every row has that many places.
    """

    row_BP: Tensor
    places_cBN: Tensor | None
    rows: int
    exact: bool
    full: tuple[bool, ...] = ()

    @classmethod
    def of(cls, order: NDArray[np.int32], rows: int, device: torch.device) -> Order:
        """From the table of a pass [B or 1, P]."""
        row_BP = torch.from_numpy(order.astype(np.int64))
        batch, places = row_BP.shape
        ascending_BP, place_BP = torch.sort(row_BP, dim=1, stable=True)
        # How many places of the same row come before each.
        first_BP = torch.searchsorted(ascending_BP, ascending_BP)
        turn_BP = torch.arange(places) - first_BP
        most = int(turn_BP.max()) + 1
        if most > _MOST_PLACES:
            return cls(row_BP.to(device), None, rows, exact=False)
        places_cBN = torch.full((most, batch, rows), places)
        places_cBN[turn_BP, torch.arange(batch)[:, None], ascending_BP] = place_BP
        exact = places == rows and most == 1
        full = tuple((places_cBN < places).flatten(1).all(1).tolist())
        return cls(row_BP.to(device), places_cBN.to(device), rows, exact, full)

    def take(self, x_BHND: Tensor) -> Tensor:
        """Rows in the order of the places [B, H, P, D]."""
        if self.places_cBN is None:
            return _pick(x_BHND, self.row_BP)
        return _Take.apply(x_BHND, self)

    def put(self, x_BHPD: Tensor, fill: float) -> Tensor:
        """Places back in the order of the rows [B, H, N, D]; rows without a place get ``fill``."""
        if self.exact:
            return _Take.apply(x_BHPD, self.inverse)
        batch, heads, _, width = x_BHPD.shape
        index = self.row_BP[:, None, :, None].expand(batch, heads, -1, width)
        return x_BHPD.new_full((batch, heads, self.rows, width), fill).scatter(2, index, x_BHPD)

    @cached_property
    def inverse(self) -> Order:
        """The order that undoes an exact one."""
        assert self.exact
        assert self.places_cBN is not None
        return Order(self.places_cBN[0], self.row_BP[None], self.rows, True, (True,))

    def add_back(self, x_BHPD: Tensor) -> Tensor:
        """For every row the sum over its places [B, H, N, D]."""
        assert self.places_cBN is not None
        last = x_BHPD.shape[2] - 1
        parts: list[Tensor] = []
        for place_BN, full in zip(self.places_cBN, self.full, strict=True):
            part = _pick(x_BHPD, place_BN if full else place_BN.clamp(max=last))
            if not full:
                part = part.masked_fill((place_BN > last)[:, None, :, None], 0.0)
            parts.append(part)
        return reduce(torch.add, parts)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHND: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return _pick(x_BHND, order.row_BP)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.order.add_back(grads[0]), None


def _pick(x_BHND: Tensor, row_BP: Tensor) -> Tensor:
    # A kernel of ours has no gradient of its own; gradients of gradients need one.
    if not torch.is_grad_enabled() and can_fuse(x_BHND):
        return gather(x_BHND, row_BP)
    batch, heads, rows, width = x_BHND.shape
    # Rows of one flat table: several times faster on a CPU than selecting along an inner axis.
    first_X = torch.arange(0, batch * heads * rows, rows, device=x_BHND.device)
    flat = first_X.view(batch, heads, 1) + row_BP[:, None]
    return x_BHND.reshape(-1, width).index_select(0, flat.view(-1)).view(batch, heads, -1, width)
