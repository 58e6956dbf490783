"""Compute one pass of a plan: order the rows, call a kernel, put the results back.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.capability import choose
from longspan.ops.merge import Part
from longspan.ops.ranges import KeyRanges
from longspan.ops.rows import Order
from longspan.ops.views import Views, views_of
from longspan.planning import Pass

_Kept = dict[tuple[torch.device, int, int, bool], "Loaded | Views"]
_loaded: WeakKeyDictionary[Pass, _Kept] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Loaded:
    """A pass as tensors.

    Attributes:
        ranges: key ranges in the order of the pass, for the heads that take part.
        keys: order of the keys; None if they stay.
        queries: order of the queries; None if they stay.
        heads: query heads that take part; None for all.
        kv_heads: their key heads; None for all.
        all_heads: number of query heads, whether they take part or not.
    """

    ranges: KeyRanges
    keys: Order | None
    queries: Order | None
    heads: Tensor | None
    kv_heads: Tensor | None
    all_heads: int

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What the kernel gets besides ``ranges``."""
        if self.heads is not None:
            q = q.index_select(1, self.heads)
        if self.kv_heads is not None:
            k, v = k.index_select(1, self.kv_heads), v.index_select(1, self.kv_heads)
        if self.queries is not None:
            q = self.queries.take(q)
        return (q, k, v) if self.keys is None else (q, self.keys.take(k), self.keys.take(v))

    def outputs(self, out: Tensor, lse: Tensor) -> Part:
        """What the kernel gave, for all heads."""
        if self.heads is None:
            return Part(out, lse, self.queries)
        out, lse = Part(out, lse, self.queries).placed()
        batch, _, n, width = out.shape
        heads = self.all_heads
        return Part(
            out.new_zeros(batch, heads, n, width).index_copy(1, self.heads, out),
            lse.new_full((batch, heads, n), -torch.inf).index_copy(1, self.heads, lse),
        )


def load(one: Pass, q: Tensor, k: Tensor) -> Loaded | Views:
    """The pass as tensors on the device of ``q``; kept as long as the pass lives."""
    device, key_heads, keys = q.device, k.shape[1], k.shape[2]
    kept = _loaded.setdefault(one, {})
    # On a CPU rows that lie side by side are worth their copies.
    single = len(q) == 1 and device.type == "cuda"
    name = (device, key_heads, keys, single)
    if name not in kept and single and (views := views_of(one, q.shape[2], keys, device)):
        kept[name] = views
    if name not in kept:
        batch, classes, places, width = one.lo.shape
        heads, kv_heads = _taking_part(one, q.shape[1], key_heads)
        group = torch.arange(batch)[:, None] * classes + torch.tensor(one.head_class)
        ranges = KeyRanges(
            torch.from_numpy(one.lo.reshape(-1, places, width)).to(device),
            torch.from_numpy(one.hi.reshape(-1, places, width)).to(device),
            (group if heads is None else group[:, heads]).to(device),
            keys if one.key_order is None else one.key_order.shape[1],
        )
        kept[name] = Loaded(
            ranges,
            None if one.key_order is None else Order.of(one.key_order, keys, device),
            _queries(one, heads, q.shape[2], device),
            None if heads is None else torch.tensor(heads, device=device),
            None if kv_heads is None else torch.tensor(kv_heads, device=device),
            q.shape[1],
        )
    return kept[name]


def compute(
    one: Pass, q: Tensor, k: Tensor, v: Tensor, impl: str, scale: float, *, use_lse: bool = True
) -> Part:
    """Output and log-sum-exp of one pass, in its order of queries.

    Without ``use_lse`` the log-sum-exp may be without gradient.
    """
    loaded = load(one, q, k)
    q, k, v = loaded.inputs(q, k, v)
    kernel = choose(impl, q, k, v, loaded.ranges, use_lse=use_lse).load()
    out, lse = kernel(q, k, v, loaded.ranges, scale)
    return loaded.outputs(out, lse)


def _queries(
    one: Pass, heads: tuple[int, ...] | None, rows: int, device: torch.device
) -> Order | None:
    """The order of the queries, for the heads that take part."""
    if one.query_order is None:
        return None
    table = one.query_order
    if table.shape[1] > 1:
        table = table[:, [one.head_class[h] for h in heads or range(len(one.head_class))]]
    return Order.of(table, rows, device)


def _taking_part(
    one: Pass, heads: int, key_heads: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Query and key heads that see anything, where leaving the others out keeps equal groups."""
    group = heads // key_heads
    kv = sorted({h // group for h in one.heads})
    each = {sum(h // group == own for h in one.heads) for own in kv}
    if len(one.heads) == heads or len(each) != 1:
        return None, None
    return one.heads, tuple(kv) if len(kv) < key_heads else None
