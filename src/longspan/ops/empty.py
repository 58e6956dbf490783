"""Query rows that see no key: 0 and -inf on the way out, nothing on the way back; and idle rows.

What a library writes there is undefined, and a NaN in the gradient of such a row, as any loss of
-inf has, must not reach the keys beside it. Rows are few, so they are overwritten by index.

Idle are these rows, and keys that no query sees: padding above all, which may hold anything. A
kernel that gives them a weight of 0 in a product with their neighbours makes NaN of NaN.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D width, G range groups.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.ranges import KeyRanges

Index = tuple[Any, ...]

_idle: WeakKeyDictionary[KeyRanges, dict[tuple[int, ...], tuple[Index | None, Index | None]]] = (
    WeakKeyDictionary()
)


def index_of(empty_BHN: Tensor | None) -> Index | None:
    """The marked rows [B, 1 or H, N] as an index, over all heads where they are alike.

    None where no row is marked, or nothing was.
    """
    if empty_BHN is None or not bool(empty_BHN.any()):
        return None
    if bool((empty_BHN == empty_BHN[:, :1]).all()):
        empty_BHN = empty_BHN[:, :1]
    batch, head, row = empty_BHN.nonzero(as_tuple=True)
    return batch, slice(None) if empty_BHN.shape[1] == 1 else head, row


def empty_rows(ranges: KeyRanges, batch: int) -> Index | None:
    """The rows [B, H, N] that see no key; None if every one sees some."""
    return index_of(ranges.empty_GN()[ranges.group_BH.expand(batch, -1)])


def clear(out_BHND: Tensor, lse_BHN: Tensor, empty: Index | None) -> None:
    """Overwrite what a kernel gave in these rows."""
    if empty is not None:
        _fill(out_BHND, empty, 0.0)
        _fill(lse_BHN, empty, -torch.inf)


def harmless(
    empty: Index | None, lse_BHN: Tensor, dout_BHND: Tensor | None, dlse_BHN: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-sum-exp and gradients with 0 in these rows, as copies if there are any.

    A kernel hides every key of such a row, whatever the log-sum-exp, but -inf would make it NaN.
    """
    if empty is None:
        return lse_BHN, dout_BHND, dlse_BHN
    dout, dlse = (
        None if x is None else _fill(x.clone(), empty, 0.0) for x in (dout_BHND, dlse_BHN)
    )
    return _fill(lse_BHN.clone(), empty, 0.0), dout, dlse


def idle_rows(
    ranges: KeyRanges, q_BHND: Tensor, k_BKMD: Tensor
) -> tuple[Index | None, Index | None]:
    """Query rows that see no key and key rows that no query sees, as indices; None for none.

    O(G N m + B H (N + M)) time, once for the ranges.
    """
    kept = _idle.setdefault(ranges, {})
    batch, heads, key_heads = q_BHND.shape[0], q_BHND.shape[1], k_BKMD.shape[1]
    name = (batch, heads, key_heads)
    if name not in kept:
        group_BH = ranges.group_BH.expand(batch, heads)
        used_GNm = ranges.lo_GNm < ranges.hi_GNm
        edge_GM = used_GNm.new_zeros(ranges.groups, ranges.keys + 1, dtype=torch.int32)
        for end_GNm, step in ((ranges.lo_GNm, 1), (ranges.hi_GNm, -1)):
            place = end_GNm.flatten(1).long().clamp(0, ranges.keys)
            edge_GM.scatter_add_(1, place, used_GNm.flatten(1).int() * step)
        unseen_GM = edge_GM.cumsum(1)[:, :-1] == 0
        unseen_BKM = unseen_GM[group_BH].unflatten(1, (key_heads, -1)).all(2)
        kept[name] = empty_rows(ranges, batch), index_of(unseen_BKM)
    return kept[name]


def quiet(x_BHND: Tensor, idle: Index | None) -> Tensor:
    """The rows, with 0 where idle ones hold NaN or infinity; themselves where none does."""
    if idle is None or bool(x_BHND[idle].isfinite().all()):
        return x_BHND
    return _fill(x_BHND.clone(), idle, 0.0)


def _fill(x_BHN: Tensor, index: Index, value: float) -> Tensor:
    """Overwrite some rows."""
    # A number from the host would be waited for.
    x_BHN[index] = x_BHN.new_full((), value)
    return x_BHN
