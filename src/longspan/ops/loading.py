"""A pass as tensors on the device where it will be computed, kept as long as the pass lives.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, G groups of rows, P places.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.ops.loaded import Loaded
from longspan.ops.own_keys import own_keys
from longspan.ops.places import Places
from longspan.ops.ranges import KeyRanges
from longspan.ops.rows import Order
from longspan.ops.views import Views, views_of
from longspan.planning import Pass

Kept = dict[tuple[object, ...], Loaded | Views]
_loaded: WeakKeyDictionary[Pass, Kept] = WeakKeyDictionary()
_lying: WeakKeyDictionary[Pass, dict[tuple[object, ...], Any]] = WeakKeyDictionary()


def kept_of(one: Pass) -> Kept:
    """What is known of a pass, by what it depends on."""
    return _loaded.setdefault(one, {})


def load(one: Pass, q: Tensor, k: Tensor) -> Loaded | Views:
    """The pass as tensors on the device of ``q``; kept as long as the pass lives."""
    kept = kept_of(one)
    name = (q.device, k.shape[1], k.shape[2], len(q) == 1)
    if name not in kept:
        kept[name] = _load(one, q, k)
    return kept[name]


# Training can save what it did not make itself, but for tensors of inference mode.
@torch.inference_mode(False)
def _load(one: Pass, q: Tensor, k: Tensor) -> Loaded | Views:
    device, key_heads, keys = q.device, k.shape[1], k.shape[2]
    if len(q) == 1 and (views := views_of(one, q.shape[2], keys, device)):
        return views
    heads, picked = _taking_part(one, q.shape[1], key_heads, device)
    lo, hi, key_order = one.lo, one.hi, one.key_order
    # On a GPU grouped queries share what is gathered, and copies of keys need one order.
    if device.type == "cpu" and heads is None and (own := own_keys(one, key_heads)):
        lo, hi, key_order = own
    return Loaded(
        ranges_of(one, lo, hi, heads, keys if key_order is None else key_order.shape[-1], device),
        None if key_order is None else Order.of(key_order, keys, device),
        _queries(one, heads, q.shape[2], device),
        *picked,
        q.shape[1],
    )


def load_where_rows_lie(one: Pass, q: Tensor, k: Tensor) -> tuple[KeyRanges, Places]:
    """The pass for a few queries and a kernel that needs no order of rows, kept likewise.

    Orders are not turned round, which would take longer than the attention of a new token.
    """
    kept = _lying.setdefault(one, {})
    name = (q.device, *k.shape[1:3])
    if name not in kept:
        device, (key_heads, keys) = q.device, k.shape[1:3]
        heads, picked = _taking_part(one, q.shape[1], key_heads, device)
        key_rows = None if one.key_order is None else one.key_order[:, None]
        query_rows = _rows_of_queries(one, heads)
        dtype = torch.int64 if device.type == "cpu" else torch.int32
        found = [
            None if x is None else torch.from_numpy(x).to(device, dtype).contiguous()
            for x in (query_rows, key_rows)
        ]
        places = keys if key_rows is None else key_rows.shape[-1]
        kept[name] = (
            ranges_of(one, one.lo, one.hi, heads, places, device),
            Places(
                query_rows=found[0],
                key_rows=found[1],
                query_heads=picked[0],
                key_heads=picked[1],
                covers=heads is None and _covers(query_rows, q.shape[2]),
            ),
        )
    return kept[name]


def _covers(row_BGP: NDArray[np.int32] | None, rows: int) -> bool:
    """Whether an order has every row."""
    # Each row stands once at most.
    return row_BGP is None or bool(((row_BGP >= 0).sum(-1) == rows).all())


def ranges_of(
    one: Pass,
    lo: NDArray[np.int32],
    hi: NDArray[np.int32],
    heads: tuple[int, ...] | None,
    keys: int,
    device: torch.device,
) -> KeyRanges:
    """Bounds of a pass [B, G, P, m] for the heads that take part."""
    batch, classes, places, width = lo.shape
    group = torch.arange(batch, device="cpu")[:, None] * classes + torch.tensor(
        one.head_class, device="cpu"
    )
    return KeyRanges(
        torch.from_numpy(lo.reshape(-1, places, width)).to(device),
        torch.from_numpy(hi.reshape(-1, places, width)).to(device),
        (group if heads is None else group[:, heads]).to(device),
        keys,
    )


def _queries(
    one: Pass, heads: tuple[int, ...] | None, rows: int, device: torch.device
) -> Order | None:
    """The order of the queries, for the heads that take part."""
    table = _rows_of_queries(one, heads)
    return None if table is None else Order.of(table, rows, device)


def _rows_of_queries(one: Pass, heads: tuple[int, ...] | None) -> NDArray[np.int32] | None:
    """The query row at each place [B or 1, G, P], for the heads that take part."""
    table = one.query_order
    if table is not None and table.shape[1] > 1:
        table = table[:, [one.head_class[h] for h in heads or range(len(one.head_class))]]
    return table


def _taking_part(
    one: Pass, heads: int, key_heads: int, device: torch.device
) -> tuple[tuple[int, ...] | None, tuple[Tensor | None, Tensor | None]]:
    """Query heads that see anything, where leaving the others out keeps equal groups.

    With these and their key heads on the device; None for all.
    """
    group = heads // key_heads
    kv = sorted({h // group for h in one.heads})
    each = {sum(h // group == own for h in one.heads) for own in kv}
    if len(one.heads) == heads or len(each) != 1:
        return None, (None, None)
    own = None if len(kv) == key_heads else torch.tensor(kv, device=device)
    return one.heads, (torch.tensor(one.heads, device=device), own)
