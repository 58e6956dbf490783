"""Residue orders without copies: the rows of one remainder as a batch row of their own.

    q [1, H, n r, D]  ->  q' [r, H, n, D],   q'[c, h, i] = q[0, h, i r + c]

Where a query of remainder c sees keys of remainder c only (dilated windows and neighbourhoods,
diagonals), one pass over a long row is the same pass over r short rows, and those are views: no
key, query or gradient is copied. FlexAttention writes its output in the layout of the queries, so
that it is in place too; what other kernels write is put back with one copy.

Axes: B batch, H heads, N rows, D width, r remainders, n rows of a remainder, G range groups, m
ranges per query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longspan.ops.merge import Part
from longspan.ops.ranges import KeyRanges
from longspan.ops.rows import Order
from longspan.planning import Pass


@dataclass(frozen=True, eq=False)
class Views:
    """A pass as one over its remainders.

    Attributes:
        step: number of remainders r.
        ranges: key ranges for r batch rows.
        order: the order of the queries that the pass asks for.
    """

    step: int
    ranges: KeyRanges
    order: Order

    def inputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the kernel gets besides ``ranges``: [1, H, n r, D] as [r, H, n, D], views."""
        return tuple(x[0].unflatten(1, (-1, self.step)).permute(2, 0, 1, 3) for x in tensors)

    def outputs(self, out_rHnD: Tensor, lse_rHn: Tensor) -> Part:
        """What the kernel gave, in place if its layout allows."""
        if out_rHnD.stride(2) == self.step * out_rHnD.stride(0):
            out_HND = out_rHnD.permute(1, 2, 0, 3).flatten(1, 2)
            return Part(out_HND[None], lse_rHn.permute(1, 2, 0).flatten(1)[None])
        out_HPD = out_rHnD.transpose(0, 1).flatten(1, 2)
        return Part(out_HPD[None], lse_rHn.transpose(0, 1).flatten(1)[None], self.order)


def views_of(one: Pass, queries: int, keys: int, device: torch.device) -> Views | None:
    """The pass over its remainders; None where a query sees keys of another one."""
    step = one.steps[0]
    if len(one.steps) > 1 or step < 2 or len(one.lo) > 1 or queries % step or keys % step:
        return None
    for order, rows in ((one.query_order, queries), (one.key_order, keys)):
        # Not rows of each class of heads for itself.
        if order is None or order.shape not in ((1, rows), (1, 1, rows)):
            return None
        if not (order.ravel() == np.arange(rows).reshape(-1, step).T.ravel()).all():
            return None
    # [classes, r, n, m], counted from the first key of each remainder.
    classes, per = one.lo.shape[1], keys // step
    first = np.arange(0, keys, per, dtype=np.int32)[:, None, None]
    shape = (classes, step, queries // step, -1)
    lo, hi = one.lo[0].reshape(shape), one.hi[0].reshape(shape)
    used = lo < hi
    lo, hi = (np.where(used, table - first, 0) for table in (lo, hi))
    if (lo < 0).any() or (hi > per).any():
        return None
    group = np.asarray(one.head_class)[None] * step + np.arange(step)[:, None]
    if all((table == table[:, :1]).all() for table in (lo, hi)):
        lo, hi, group = lo[:, :1], hi[:, :1], np.asarray(one.head_class)[None]
    lo, hi = (np.ascontiguousarray(t.reshape(-1, *t.shape[2:])) for t in (lo, hi))
    ranges = KeyRanges(
        torch.from_numpy(lo).to(device),
        torch.from_numpy(hi).to(device),
        torch.from_numpy(group.astype(np.int64)).to(device),
        per,
    )
    assert one.query_order is not None
    return Views(step, ranges, Order.of(one.query_order, queries, device))
