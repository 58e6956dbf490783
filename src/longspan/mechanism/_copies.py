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

from longspan.ops.rows import Order, Table


class Copies:
    """A list in which every row stands at ``c`` places.

    Args:
        copy_BHP: which copy stands at each place; copy p is one of row ``p // c``.
        c: places of a row.

    Attributes:
        place_cBHN: where the copies of each row stand.
    """

    def __init__(self, copy_BHP: Tensor, c: int = 1) -> None:
        self.copy_BHP, self.c = copy_BHP, c
        at = torch.arange(copy_BHP.shape[-1], device=copy_BHP.device)
        place_BHP = torch.empty_like(copy_BHP).scatter_(-1, copy_BHP, at.expand_as(copy_BHP))
        self.place_cBHN = place_BHP.unflatten(-1, (-1, c)).movedim(-1, 0)

    @classmethod
    def sorted(cls, key_BHP: Tensor, most: int, c: int = 1) -> tuple[Copies, Tensor]:
        """Copies in ascending order of their keys, equal ones in that of rows; and the keys.

        Args:
            key_BHP: whole numbers from 0 to ``most``.
            most: the largest.
            c: places of a row.
        """
        # Sorting takes time by the bytes of what is sorted.
        narrow = torch.int16 if most < 1 << 15 else torch.int32
        key_BHP, copy_BHP = key_BHP.to(narrow).sort(dim=-1, stable=True)
        return cls(copy_BHP, c), key_BHP.to(torch.int64)

    def spread(self, x_BHND: Tensor) -> Tensor:
        """Rows in the order of the list [B, H, P, D]; heads that share a list side by side."""
        back = _table(*self.place_cBHN)
        return Order(x_BHND.shape[2], _table(self.copy_BHP // self.c), back).take(x_BHND)

    def collect(self, x_BHPD: Tensor, lse_BHP: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The c parts (out [B, H, N, D], lse [B, H, N]) of every row."""
        repeat = x_BHPD.shape[1] // self.copy_BHP.shape[1]
        lses = [
            lse_BHP.gather(2, place.repeat_interleave(repeat, dim=1)) for place in self.place_cBHN
        ]
        # A compiler differentiates by itself.
        if torch.compiler.is_compiling():
            outs = [_table(place).take(x_BHPD, plain=True) for place in self.place_cBHN]
        else:
            outs = _Collect.apply(x_BHPD, self)
        return list(zip(outs, lses, strict=True))


def _table(rows_BHP: Tensor, *more: Tensor) -> Table:
    parts = torch.stack([rows_BHP, *more])
    dtype = torch.int32 if parts.is_cuda else torch.int64
    return Table(parts.to(dtype), (True,) * len(parts))


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHPD: Tensor, copies: Copies) -> tuple[Tensor, ...]:
        ctx.copies = copies
        return tuple(_table(place).take(x_BHPD) for place in copies.place_cBHN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # In the order of the copies [B, H, N c, D], then in that of the list.
        together = torch.stack(grads, dim=3).flatten(2, 3)
        return _table(ctx.copies.copy_BHP).take(together), None
