"""Move rows into the order of a pass and back.

A residue order puts keys of one remainder side by side, so that a kernel reads ranges; queries
and outputs move likewise. Gathering rows costs one copy, and so does its gradient: a row's
gradient is gathered from its places, instead of scattered and added.

Axes: B batch, H heads, G heads that differ in their rows, N rows, P places of the order, c places
of a row at most, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.ops.capability import needs_grad, transforming
from longspan.ops.fused import add_into, add_rows, can_fuse, gather
from longspan.ops.once import once
from longspan.ops.workers import can_share_threads, run_parts

# A few rows may stand at more places than this; if many do, their gradients are scattered.
_MOST_PLACES = 8
_MOST_RESTS = 128
# From this many numbers on a CPU moves them head by head.
_WORTH_HEADS = 1 << 18


@dataclass(frozen=True, eq=False)
class Table:
    """Which rows are added up at each place.

    Attributes:
        row_cBGP: int32 on a GPU, else int64: [c, B or 1, G, P] where G divides the heads, and
            neighbouring heads share; -1 for no row.
        full: for each of the c, whether it names a row at every place.
    """

    row_cBGP: Tensor
    full: tuple[bool, ...]

    @classmethod
    def of(cls, row_cBGP: Tensor, device: torch.device) -> Table:
        """From a table on the CPU."""
        full = tuple((row_cBGP >= 0).flatten(1).all(1).tolist())
        dtype = torch.int32 if device.type == "cuda" else torch.int64
        return cls(row_cBGP.to(device, dtype), full)

    def take(self, x_BHND: Tensor, *, plain: bool = False) -> Tensor:
        """The sum of the rows of each place [B, H, P, D]; 0 where there is none.

        Args:
            x_BHND: rows.
            plain: by operations that autograd knows.
        """
        if not plain and can_fuse(x_BHND):
            return gather(x_BHND, self.row_cBGP)
        batch, heads, _, width = x_BHND.shape
        size = batch * heads * self.row_cBGP.shape[-1] * width
        if not plain and _by_heads(x_BHND) and size >= _WORTH_HEADS:
            out_BHPD = x_BHND.new_empty(batch, heads, self.row_cBGP.shape[-1], width)
            return self.take_into(x_BHND, out_BHPD)
        parts = [pick(x_BHND, row) for row in self.row_cBGP.clamp(min=0)]
        for i, full in enumerate(self.full):
            if not full:
                parts[i] = parts[i].masked_fill(self._gaps(i, x_BHND.shape[1])[..., None], 0.0)
        return reduce(torch.add, parts)

    def take_into(self, x_BHND: Tensor, out_BHPD: Tensor) -> Tensor:
        """The same into ``out_BHPD`` on a CPU, each head by one thread; without gradient."""
        batches, groups = self.row_cBGP.shape[1:3]
        batch, heads = x_BHND.shape[:2]

        def part(i: int) -> None:
            b, h = divmod(i, heads)
            x_ND, out_PD = x_BHND[b, h], out_BHPD[b, h]
            rows = self._rows[b % batches * groups + h * groups // heads]
            for first, (row_P, place_Q) in enumerate(rows):
                if first == 0:
                    torch.index_select(x_ND, 0, row_P, out=out_PD)
                    if place_Q is not None:
                        out_PD.index_fill_(0, place_Q, 0.0)
                elif place_Q is None:
                    out_PD.add_(x_ND.index_select(0, row_P))
                else:
                    out_PD.index_add_(0, place_Q, x_ND.index_select(0, row_P))

        run_parts(part, batch * heads)
        return out_BHPD

    @cached_property
    def _rows(self) -> list[list[tuple[Tensor, Tensor | None]]]:
        """For each batch row and group what is added up: first any row at places without one, and
        those places; then rows, and the places where there is one. No places are all or none."""
        found: list[list[tuple[Tensor, Tensor | None]]] = []
        for own_cP in self.row_cBGP.flatten(1, 2).unbind(1):
            parts: list[tuple[Tensor, Tensor | None]] = []
            for i, (row_P, full) in enumerate(zip(own_cP.contiguous(), self.full, strict=True)):
                there_P = row_P >= 0
                if full:
                    parts.append((row_P, None))
                elif i == 0:
                    parts.append((row_P.clamp(min=0), (~there_P).nonzero()[:, 0]))
                else:
                    parts.append((row_P[there_P], there_P.nonzero()[:, 0]))
            found.append(parts)
        return found

    def of_heads(self, first: int, count: int, heads: int) -> Table:
        """The table of some of ``heads`` neighbouring heads."""
        groups = self.row_cBGP.shape[2]
        own = [h * groups // heads for h in range(first, first + count)]
        own = own[:1] if len(set(own)) == 1 else own
        return self if groups == 1 else Table(self.row_cBGP[:, :, own], self.full)

    def fill(self, x_BHN: Tensor, gap: float) -> Tensor:
        """Numbers in place of rows [B, H, P], and ``gap`` where there is no row; for c = 1."""
        found = pick(x_BHN[..., None], self.row_cBGP[0].clamp(min=0))[..., 0]
        return found if self.full[0] else found.masked_fill(self._gaps(0, x_BHN.shape[1]), gap)

    def _gaps(self, i: int, heads: int) -> Tensor:
        gap_BGP = self.row_cBGP[i] < 0
        return gap_BGP.repeat_interleave(heads // gap_BGP.shape[1], 1)


@dataclass(frozen=True, eq=False)
class Order:
    """Which row stands at each place, and where each row stands.

    Attributes:
        rows: number of rows N.
        table: the row of each place.
        back: the places of each row, but for those in ``rest``; None if too many rows stand at
            more than ``_MOST_PLACES``.
        rest: a few rows [R] that stand at further places, and the table of those, or None.
    """

    rows: int
    table: Table
    back: Table | None
    rest: tuple[Tensor, Table] | None = None

    @classmethod
    def of(cls, order: NDArray[np.int32], rows: int, device: torch.device) -> Order:
        """From a table [B or 1, P] or [B or 1, G, P], -1 for places without a row."""
        row_BGP = torch.from_numpy(order.astype(np.int64, order="C"))
        if row_BGP.dim() == 2:
            row_BGP = row_BGP[:, None]
        table = Table.of(row_BGP[None], device)
        flat_LP = row_BGP.flatten(0, 1)
        # Places without a row are those of a row behind the last one.
        ascending_LP, place_LP = torch.sort(flat_LP.where(flat_LP >= 0, rows), dim=1, stable=True)
        # How many places of the same row come before each.
        turn_LP = torch.arange(flat_LP.shape[1], device="cpu") - torch.searchsorted(
            ascending_LP, ascending_LP
        )
        turn_LP = turn_LP.where(ascending_LP < rows, 0)
        rest = None
        often = ascending_LP[turn_LP >= _MOST_PLACES].unique()
        if len(often):
            if len(flat_LP) > 1 or len(often) > _MOST_RESTS:
                return cls(rows, table, None)
            more = torch.isin(flat_LP[0], often)
            own = torch.searchsorted(often, flat_LP[0][more])
            turn = (own[:, None] == own).tril(-1).sum(1)
            place_cR = torch.full((int(turn.max()) + 1, len(often)), -1, device="cpu")
            place_cR[turn, own] = torch.nonzero(more)[:, 0]
            rest = often.to(device), Table.of(place_cR[:, None, None], device)
            kept = ~torch.isin(ascending_LP, often)
            ascending_LP, place_LP, turn_LP = (
                x[kept][None] for x in (ascending_LP, place_LP, turn_LP)
            )
        most = int(turn_LP.max()) + 1 if turn_LP.numel() else 1
        back_cLN = torch.full((most, len(flat_LP), rows + 1), -1, device="cpu")
        back_cLN[turn_LP, torch.arange(len(flat_LP), device="cpu")[:, None], ascending_LP] = (
            place_LP
        )
        back = back_cLN[..., :rows].unflatten(1, row_BGP.shape[:2])
        return cls(rows, table, Table.of(back, device), rest)

    def take(self, x_BHND: Tensor) -> Tensor:
        """Rows in the order of the places [B, H, P, D]."""
        # A compiler differentiates by itself.
        if self.back is None or torch.compiler.is_compiling():
            return self.table.take(x_BHND, plain=True)
        # Who asks for no derivatives need not pay for them.
        if needs_grad(x_BHND) or transforming():
            return _Take.apply(x_BHND, self)
        return self.table.take(x_BHND)

    def put(self, x_BHPD: Tensor) -> Tensor:
        """Places back in the order of the rows [B, H, N, D]; 0 for rows without a place.

        For orders in which each row stands once at most.
        """
        return _Sum.apply(x_BHPD, self)

    def put_into(self, x_BHPD: Tensor, out_BHND: Tensor) -> None:
        """The same into ``out_BHND`` on a CPU, without gradient."""
        self._inverse.take_into(x_BHPD, out_BHND)

    def put_lse(self, lse_BHP: Tensor) -> Tensor:
        """The same for numbers in place of rows [B, H, N]; -inf for rows without a place."""
        return self._inverse.fill(lse_BHP, -torch.inf)

    def add(self, x_BHND: Tensor, y_BHPD: Tensor) -> Tensor:
        """``x``, overwritten, with ``y`` added to the rows of its places."""
        return _Add.apply(x_BHND, y_BHPD, self)

    def sums(self, x_BHPD: Tensor) -> Tensor:
        """For every row the sum over its places [B, H, N, D]; without gradient."""
        assert self.back is not None
        return self.add_rest(x_BHPD, self.back.take(x_BHPD))

    def add_rest(self, x_BHPD: Tensor, found_BHND: Tensor) -> Tensor:
        """Sums over the places in ``back``, overwritten, with those in ``rest`` added."""
        if self.rest is not None:
            row_R, table = self.rest
            more = table.take(x_BHPD)
            found_BHND.index_copy_(2, row_R, found_BHND.index_select(2, row_R) + more)
        return found_BHND

    def of_heads(self, first: int, count: int, heads: int) -> Order:
        """The order of some of ``heads`` neighbouring heads."""
        back = self.back and self.back.of_heads(first, count, heads)
        return Order(self.rows, self.table.of_heads(first, count, heads), back, self.rest)

    @property
    def places(self) -> int:
        """Number of places P."""
        return self.table.row_cBGP.shape[-1]

    @cached_property
    def covers(self) -> bool:
        """Whether every row has a place."""
        return self.back is None or bool((self.back.row_cBGP[0] >= 0).all())

    @property
    def place(self) -> tuple[Tensor, bool]:
        """The place of each row [B or 1, G, N], and whether every place holds a row."""
        return self._inverse.row_cBGP[0], self.table.full[0]

    @property
    def _inverse(self) -> Table:
        assert self.back is not None
        assert len(self.back.full) == 1
        assert self.rest is None
        return self.back


def spread(x_BHND: Tensor, orders: Sequence[Order | None]) -> list[Tensor]:
    """Rows in each of several orders; None leaves them as they are.

    On a GPU their gradients are added up in one pass over each of them.
    """
    several = len(orders) > 1 and any(order is not None for order in orders)
    if several and can_fuse(x_BHND) and all(o is None or o.back is not None for o in orders):
        return list(_Spread.apply(x_BHND, tuple(orders)))
    return [x_BHND if order is None else order.take(x_BHND) for order in orders]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHND: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return order.table.take(x_BHND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grads[0], ctx.order), None


class _Sum(torch.autograd.Function):
    """The transpose of ``_Take``."""

    @staticmethod
    def forward(ctx: Any, x_BHPD: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return order.sums(x_BHPD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Take.apply(grads[0], ctx.order), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHND: Tensor, orders: tuple[Order | None, ...]) -> tuple[Tensor, ...]:
        ctx.orders = orders
        ctx.set_materialize_grads(False)
        return tuple(
            x_BHND.view_as(x_BHND) if order is None else order.table.take(x_BHND)
            for order in orders
        )

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, None]:
        seen = [(g, o) for g, o in zip(grads, ctx.orders, strict=True) if g is not None]
        return (added(seen) if seen else None), None


def added(parts: Sequence[tuple[Tensor, Order | None]]) -> Tensor:
    """The sum of gradients of rows that lie in several orders, each with ``back``; on a GPU.

    What is given may be overwritten.
    """
    if (found := _added_to_one(parts)) is None:
        tables = [None if order is None else order.back for _, order in parts]
        found = add_rows(
            [
                (grad, None if table is None else table.row_cBGP)
                for (grad, _), table in zip(parts, tables, strict=True)
            ]
        )
        for grad, order in parts:
            if order is not None:
                order.add_rest(grad, found)
    return found


def _added_to_one(parts: Sequence[tuple[Tensor, Order | None]]) -> Tensor | None:
    """The sum of gradients where one is of all rows and the others of few, which are added to it.

    None where that would be more to read and write than a new sum. What a kernel gave belongs to
    nobody else.
    """
    whole = next((x for x, order in parts if order is None and x.stride(-1) == 1), None)
    if whole is None:
        return None
    others = [(x, order) for x, order in parts if x is not whole]
    once = all(o and o.rest is None and o.back and len(o.back.full) == 1 for _, o in others)
    # Read and written on one side, read on the other.
    if not once or 3 * sum(x.shape[2] for x, _ in others) > 2 * whole.shape[2]:
        return None
    for x, order in others:
        assert order is not None
        add_into(whole, x, order.table.row_cBGP[0])
    return whole


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHND: Tensor, y_BHPD: Tensor, order: Order) -> Tensor:
        ctx.order = order
        ctx.mark_dirty(x_BHND)
        row_BGP = order.table.row_cBGP[0]
        flat_X, rows_XD = _flat(x_BHND, row_BGP), y_BHPD.reshape(-1, y_BHPD.shape[-1])
        if not order.table.full[0]:
            share = x_BHND.shape[1] // row_BGP.shape[1]
            there_BHP = (row_BGP >= 0).repeat_interleave(share, 1).expand(y_BHPD.shape[:3])
            flat_X, rows_XD = (x[there_BHP.reshape(-1)] for x in (flat_X, rows_XD))
        all_XD = x_BHND.view(-1, x_BHND.shape[-1])
        # Each row stands once at most, so that nothing is written twice.
        all_XD[flat_X] = all_XD.index_select(0, flat_X) + rows_XD
        return x_BHND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.order.take(grads[0]), None


def _by_heads(x: Tensor) -> bool:
    return x.device.type == "cpu" and can_share_threads() and not torch.compiler.is_compiling()


def pick(x_BHND: Tensor, row_BGP: Tensor) -> Tensor:
    """Rows [B, H, P, D], differentiable by scattering.

    Args:
        x_BHND: where they come from.
        row_BGP: whole numbers [B or 1, G, P]; G divides H, and neighbouring heads share.
    """
    batch, heads, _, width = x_BHND.shape
    # Rows of one flat table: several times faster on a CPU than selecting along an inner axis.
    flat_XD = x_BHND.reshape(-1, width).index_select(0, _flat(x_BHND, row_BGP))
    return flat_XD.view(batch, heads, -1, width)


def _flat(x_BHND: Tensor, row_BGP: Tensor) -> Tensor:
    """Rows of each batch row and head as rows of one table [B H P]."""
    batch, heads, rows, _ = x_BHND.shape
    first_X = torch.arange(0, batch * heads * rows, rows, device=x_BHND.device)
    row_BHP = row_BGP.repeat_interleave(heads // row_BGP.shape[1], 1)
    return (first_X.view(batch, heads, 1) + row_BHP).view(-1)
