"""Keys of a pass that lie in their own order, and more of them behind.

    order of the pass   0 5000 20000 | 0 1 2 3 ..        or   0 1 2 3 .. | 0 8 16 .. | 1 9 17 ..
    keys                as they lie: 0 1 2 3 ..  | from ``border`` on: 0 5000 20000, or remainders

Orders of keys side by side are a copy of all keys, for a few that stand in front of them or for
the same ones by remainder. A kernel that takes keys of two tensors reads their own order where it
lies; what is gathered are the others alone, and nothing where these are remainders, which are
views.

O(N m) time once, for the ranges; moved are P rows in the place of M + P.

Axes: B batch, K key heads, M key rows, P further places, D head width, G range groups, N query
rows, m ranges per query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.ops.rows import Order, added
from longspan.ops.views import TILE, by_remainder, lies_by_remainder
from longspan.planning import Pass
from longspan.planning.passes import Rows


@dataclass(frozen=True, eq=False)
class MoreKeys:
    """Keys that ranges count from ``border`` on.

    Attributes:
        border: the first of them, a multiple of 128 and not less than M.
        count: their number P.
        order: which rows they are; None where they lie by remainder.
        length: keys of a remainder, a multiple of 128, where they are those of the first ones, a
            view of the one batch row; None if they are gathered.
    """

    border: int
    count: int
    order: Order | None
    length: int | None

    @property
    def numbering(self) -> tuple[int, int | None]:
        """What plans of equal bounds may differ by."""
        return self.border, self.length

    def of(self, x_BKMD: Tensor) -> Tensor:
        """These rows of keys or values [B, K, P, D]; remainders are a view [r, K, length, D]."""
        if self.order is not None:
            return self.order.take(x_BKMD)
        assert self.length is not None
        step = x_BKMD.shape[2] // self.length
        return by_remainder(x_BKMD, step)[: self.count // self.length]

    def add(self, grad_BKMD: Tensor, more: Tensor) -> Tensor:
        """The gradient of keys or values, which may be overwritten, with that of gathered rows.

        Without gradient, on a GPU. Remainders are views, also of a gradient.
        """
        assert self.order is not None
        return added([(grad_BKMD, None), (more, self.order)])

    def part(self, key: Tensor) -> Tensor:
        """Which stretch of memory keys lie in: no tile has some of two."""
        behind = key - self.border
        if self.length is None:
            return (behind >= 0).int()
        return (behind // self.length + 1).clamp(min=0)


def more_keys(
    one: Pass, keys: int, batch: int, device: torch.device
) -> tuple[Rows, Rows, MoreKeys] | None:
    """The bounds of a pass in this numbering.

    None where the keys in their own order are no part of its order, or gradients of the others
    would have to be scattered.

    Args:
        one: the pass.
        keys: rows M.
        batch: batch rows of the keys.
        device: where orders go.
    """
    if one.key_order is None or len(one.key_order) > 1:
        return None
    order = one.key_order[0]
    start = _own(order, keys)
    if start is None:
        return None
    end = start + keys
    used = one.lo < one.hi
    behind = one.lo >= start
    if (used & np.where(behind, (one.lo < end) & (one.hi > end), one.hi > start)).any():
        return None
    others = np.concatenate([order[:start], order[end:]])
    if not len(others):
        return None
    border = -(-keys // TILE) * TILE
    # There are many: no number takes more room than it needs.
    before, own, after = np.array([border, -start, border - keys], np.int32)
    shift = np.where(behind, np.where(one.lo < end, own, after), before)
    lo, hi = (np.where(used, table + shift, np.int32(0)) for table in (one.lo, one.hi))
    if batch == 1 and lies_by_remainder(others, keys, max(one.steps)):
        length = keys // max(one.steps)
        # All keys of the last remainder have a gradient, those that nobody sees as well.
        return lo, hi, MoreKeys(border, -(-len(others) // length) * length, None, length)
    moved = Order.of(others[None], keys, device)
    return None if moved.back is None else (lo, hi, MoreKeys(border, len(others), moved, None))


def _own(order: NDArray[np.int32], keys: int) -> int | None:
    """Where the keys begin in their own order."""
    own = np.arange(keys, dtype=order.dtype)
    for start in np.flatnonzero(order == 0):
        # Its end first: there may be many such places.
        found = order[start : start + keys]
        if found[-1] == keys - 1 and np.array_equal(found, own):
            return int(start)
    return None
