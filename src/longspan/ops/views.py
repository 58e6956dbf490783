"""Residue orders without copies: the rows of one remainder as a batch row of their own.

    q [1, H, n r, D]  ->  q' [r, H, n, D],   q'[c, h, i] = q[0, h, i r + c]

Where a query of remainder c sees keys of remainder c only (dilated windows and neighbourhoods,
diagonals), one pass over a long row is the same pass over r short rows, and those are views: no
key, query or gradient is copied. FlexAttention, cuDNN and ``hopper`` write their output in the
layout of the queries, so that it is in place too; what other kernels write is put back with one
copy.

Where a query sees keys of other remainders (SDA's neighbourhoods), queries and outputs are views
all the same for a kernel that takes one batch row of keys for many of queries, and so are their
gradients if it does that with gradients too. Keys, of which grouped queries have few, are
gathered, but for a kernel that takes the keys of all remainders in turn, as they are.

Axes: B batch, H heads, N rows, D width, r remainders, n rows of a remainder, G range groups, m
ranges per query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.ops.merge import Part
from longspan.ops.ranges import KeyRanges
from longspan.ops.rows import Order
from longspan.planning import Pass

# Keys of a tile: none has keys of two remainders.
TILE = 128


@dataclass(frozen=True, eq=False)
class Views:
    """A pass as one over its remainders.

    Attributes:
        step: number of remainders r.
        ranges: key ranges for r batch rows.
        order: the order of the queries that the pass asks for.
        keys: order of keys that all batch rows share; None if each has its own, as views, or
            takes all of these views in turn.
    """

    step: int
    ranges: KeyRanges
    order: Order
    keys: Order | None = None

    @property
    def orders(self) -> tuple[Order | None, Order | None, Order | None]:
        """Of queries, keys and values, where rows are moved."""
        return None, self.keys, self.keys

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernel gets besides ``ranges``: [1, H, n r, D] as [r, H, n, D], views."""
        if self.keys is not None:
            k, v = self.keys.take(k), self.keys.take(v)
        return self.of_ordered(q, k, v)

    def of_ordered(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from rows that lie in ``orders``."""
        q, *others = tensors
        k, v = self.of_keys(*others)
        return self.query_rows(q), k, v

    def of_keys(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Keys, values or their gradients in ``orders`` as the kernel has them: views."""
        return in_turn(self.key_step, *tensors)

    @property
    def key_step(self) -> int:
        """Number of remainders that keys are given in, as views."""
        return self.step if self.keys is None else 1

    @property
    def keys_lie(self) -> bool:
        """Whether the kernel reads all keys where they are."""
        return self.keys is None

    def query_rows(self, x_BHND: Tensor) -> Tensor:
        """What lies as the queries do, in the order of the pass: a view."""
        return by_remainder(x_BHND, self.step)

    def outputs(self, out_rHnD: Tensor, lse_rHn: Tensor) -> Part:
        """What the kernel gave, in place if its layout allows."""
        if out_rHnD.stride(2) == self.step * out_rHnD.stride(0):
            return Part(row_after_row(out_rHnD), row_after_row(lse_rHn))
        out_HPD = out_rHnD.transpose(0, 1).flatten(1, 2)
        return Part(out_HPD[None], lse_rHn.transpose(0, 1).flatten(1)[None], self.order)


def views_of(
    one: Pass, queries: int, keys: int, device: torch.device, shared: Order | None = None
) -> Views | None:
    """The pass over its remainders; None where that cannot be.

    Args:
        one: the pass.
        queries: rows.
        keys: rows.
        device: where its ranges go.
        shared: the order of the keys, if all batch rows may have the same ones. Without it a
            query must see keys of its own remainder only.
    """
    step = max(one.steps)
    if step < 2 or len(one.lo) > 1 or not _is_residue(one.query_order, queries, step):
        return None
    # [classes, r, n, m]
    classes = one.lo.shape[1]
    shape = (classes, step, queries // step, -1)
    lo, hi = one.lo[0].reshape(shape), one.hi[0].reshape(shape)
    places = keys
    if shared is None:
        if len(one.steps) > 1 or not _is_residue(one.key_order, keys, step):
            return None
        # Counted from the first key of each remainder.
        places = keys // step
        first = np.arange(0, keys, places, dtype=np.int32)[:, None, None]
        used = lo < hi
        lo, hi = (np.where(used, table - first, 0) for table in (lo, hi))
        if (lo < 0).any() or (hi > places).any():
            return None
    elif one.key_order is None or len(one.key_order) > 1:
        return None
    else:
        places = one.key_order.shape[1]
    group = np.asarray(one.head_class)[None] * step + np.arange(step)[:, None]
    if shared is None and all((table == table[:, :1]).all() for table in (lo, hi)):
        lo, hi, group = lo[:, :1], hi[:, :1], np.asarray(one.head_class)[None]
    lo, hi = (np.ascontiguousarray(t.reshape(-1, *t.shape[2:])) for t in (lo, hi))
    ranges = KeyRanges(
        torch.from_numpy(lo).to(device),
        torch.from_numpy(hi).to(device),
        torch.from_numpy(group.astype(np.int64)).to(device),
        places,
    )
    assert one.query_order is not None
    return Views(step, ranges, Order.of(one.query_order, queries, device), shared)


def keys_in_turn(one: Pass, keys: int) -> int | None:
    """The remainders whose keys a kernel can take in turn (``key_rows``); None if it cannot.

    The last remainders may be missing in the order of the pass: nobody sees their keys.

    Args:
        one: the pass.
        keys: rows.
    """
    order, step = one.key_order, max(one.steps)
    if len(one.steps) > 1 or order is None or len(order) > 1:
        return None
    return step if lies_by_remainder(order[0], keys, step) else None


def lies_by_remainder(order: NDArray[np.int32], keys: int, step: int) -> bool:
    """Whether an order is that of all remainders, or of the first ones, of whole tiles each."""
    if step < 2 or keys % (step * TILE):
        return False
    return np.array_equal(order, residue_order(keys, step)[: len(order)])


def _is_residue(order: NDArray[np.int32] | None, rows: int, step: int) -> bool:
    """Whether the rows lie by remainder, not those of each class of heads for itself."""
    if rows % step or order is None or order.shape not in ((1, rows), (1, 1, rows)):
        return False
    return bool((order.ravel() == residue_order(rows, step)).all())


def residue_order(rows: int, step: int) -> NDArray[np.int32]:
    """Rows of each remainder one after another [rows]; ``step`` divides their number."""
    return np.arange(rows, dtype=np.int32).reshape(-1, step).T.ravel()


def in_turn(step: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each by remainder, one after another; as they are where the step is 1."""
    return tensors if step == 1 else tuple(by_remainder(x, step) for x in tensors)


def by_remainder(x_BHN: Tensor, step: int) -> Tensor:
    """[1, H, n r, ...] as [r, H, n, ...], a view."""
    # Not x[0], whose gradient is copied into zeros.
    return x_BHN.squeeze(0).unflatten(1, (-1, step)).movedim(2, 0)


def row_after_row(x_rHn: Tensor) -> Tensor:
    """The way back, without a copy where it lies so in memory."""
    return x_rHn.movedim(0, 2).flatten(1, 2)[None]
