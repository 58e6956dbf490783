"""Rows copied to the places of a list, and what a kernel gave at those places brought back.

Content decides which rows stand side by side: sorted by bucket, by cluster, or once for each block
that a row chose. Both ways are gathers, and so are their gradients: a row's gradient is summed
over its places instead of scattered and added.

Axes: B batch, H heads, N rows, c places of a row, P = N c places, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.ops.rows import Order


class Copies:
    """A list in which every row stands at ``c`` places.

    Args:
        copy_BHP: which copy stands at each place; copy p is one of row ``p // c``.
        c: places of a row.

    Attributes:
        row_BHP: row at each place.
        place_BHP: where each copy stands.
    """

    def __init__(self, copy_BHP: Tensor, c: int = 1) -> None:
        self.copy_BHP, self.c = copy_BHP, c
        self.row_BHP = copy_BHP if c == 1 else copy_BHP // c
        at = torch.arange(copy_BHP.shape[-1], device=copy_BHP.device)
        self.place_BHP = torch.empty_like(copy_BHP).scatter_(-1, copy_BHP, at.expand_as(copy_BHP))

    @classmethod
    def sorted(cls, key_BHP: Tensor, c: int = 1) -> tuple[Copies, Tensor]:
        """Copies in ascending order of their keys, equal ones in that of rows; and the keys."""
        key_BHP, copy_BHP = key_BHP.sort(dim=-1, stable=True)
        return cls(copy_BHP, c), key_BHP

    def spread(self, x_BHND: Tensor) -> Tensor:
        """Rows in the order of the list [B, H, P, D]; heads that share a list side by side."""
        return _Spread.apply(x_BHND, self)

    def collect(self, x_BHPD: Tensor, lse_BHP: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The c parts (out [B, H, N, D], lse [B, H, N]) of every row."""
        repeat = x_BHPD.shape[1] // self.place_BHP.shape[1]
        place_BHNc = self.place_BHP.repeat_interleave(repeat, dim=1).unflatten(2, (-1, self.c))
        outs = _Collect.apply(x_BHPD, self)
        return [(out, lse_BHP.gather(2, place_BHNc[..., i])) for i, out in enumerate(outs)]


def pick(x_BHND: Tensor, row_BHP: Tensor) -> Tensor:
    """Rows of each head [B, H, P, D]; as many neighbouring heads as needed share a table."""
    batch, lists = row_BHP.shape[:2]
    table = Order(row_BHP.flatten(0, 1), None, x_BHND.shape[2], exact=False)
    shared = x_BHND.reshape(batch * lists, -1, *x_BHND.shape[2:])
    return table.take(shared).reshape(*x_BHND.shape[:2], row_BHP.shape[2], x_BHND.shape[3])


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHND: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return pick(x_BHND, copies.row_BHP)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        found = pick(grads[0], ctx.copies.place_BHP)
        c = ctx.copies.c
        return found if c == 1 else found.unflatten(2, (-1, c)).sum(dim=3), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHPD: Tensor, copies: Copies) -> tuple[Tensor, ...]:
        ctx.copies = copies
        place_BHNc = copies.place_BHP.unflatten(2, (-1, copies.c))
        return tuple(pick(x_BHPD, place_BHN) for place_BHN in place_BHNc.unbind(3))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        copies = ctx.copies
        # [.., N c, D] in the order of the copies, then in that of the list.
        return pick(torch.stack(grads, dim=3).flatten(2, 3), copies.copy_BHP), None
