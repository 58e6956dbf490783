"""Compute the passes of a plan: order the rows, call a kernel, say where its results belong.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.apart import Own, apart, join, split
from longspan.ops.capability import (
    FEW_ROWS,
    Capability,
    Halves,
    Known,
    choose,
    choose_together,
    may_read_in_place,
    needs_grad,
    with_long_rows,
)
from longspan.ops.copies import copies_of
from longspan.ops.few_rows import few_rows
from longspan.ops.joint import attend_jointly, rows_of
from longspan.ops.key_heads import attend_by_key_heads, by_key_heads
from longspan.ops.lanes import Lanes
from longspan.ops.loaded import Loaded
from longspan.ops.merge import Part
from longspan.ops.more_keys import more_keys
from longspan.ops.own_keys import own_keys
from longspan.ops.placed import attend_placed
from longspan.ops.places import Places
from longspan.ops.ranges import KeyRanges
from longspan.ops.rows import Order, spread
from longspan.ops.views import Views, keys_in_turn, views_of
from longspan.planning import Pass

# Queries of a remainder that fill a tile: of fewer, most of it would be computed for nothing.
_LEAST_ROWS = 128

_Kept = dict[tuple[object, ...], "Loaded | Views"]
_loaded: WeakKeyDictionary[Pass, _Kept] = WeakKeyDictionary()
_lying: WeakKeyDictionary[Pass, dict[tuple[object, ...], Any]] = WeakKeyDictionary()
_more: WeakKeyDictionary[Loaded, dict[bool, Loaded | None]] = WeakKeyDictionary()
_with_few: WeakKeyDictionary[Pass, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
_loaded_apart: WeakKeyDictionary[Pass, dict[tuple[object, ...], Any]] = WeakKeyDictionary()


def load(one: Pass, q: Tensor, k: Tensor) -> Loaded | Views:
    """The pass as tensors on the device of ``q``; kept as long as the pass lives."""
    kept = _loaded.setdefault(one, {})
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
        _ranges(one, lo, hi, heads, keys if key_order is None else key_order.shape[-1], device),
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
            _ranges(one, one.lo, one.hi, heads, places, device),
            Places(
                query_rows=found[0],
                key_rows=found[1],
                query_heads=picked[0],
                key_heads=picked[1],
                covers=heads is None and _covers(query_rows, q.shape[2]),
            ),
        )
    return kept[name]


def in_place(
    passes: Sequence[Pass], q: Tensor, k: Tensor, v: Tensor, impl: str, *, use_lse: bool
) -> Capability | None:
    """The kernel that takes all passes and reads rows where they lie; None where none does."""
    if not may_read_in_place(impl, q, k, v):
        return None
    if _new_tokens(q, k, v):
        ranges, _ = load_where_rows_lie(passes[0], q, k)
        moved = any(one.key_order is not None or one.query_order is not None for one in passes)
    else:
        ranges, moved = load(passes[0], q, k).ranges, False
    kernel = choose(impl, q, k, v, ranges, use_lse=use_lse, moved=moved)
    return kernel if kernel.reads_in_place else None


def _new_tokens(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.shape[2] <= FEW_ROWS and not needs_grad(q, k, v)


def _covers(row_BGP: NDArray[np.int32] | None, rows: int) -> bool:
    """Whether an order has every row."""
    # Each row stands once at most.
    return row_BGP is None or bool(((row_BGP >= 0).sum(-1) == rows).all())


def _ranges(
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


def compute(
    passes: Sequence[Pass],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    impl: str,
    scale: float,
    *,
    use_lse: bool = True,
    known: Known | None = None,
) -> list[Part]:
    """Output and log-sum-exp of each pass, in its order of queries.

    Without ``use_lse`` the log-sum-exp may be without gradient. With what all passes give
    together, for gradients alone, kernels whose backward asks for nothing else compute no forward.
    """
    if (kernel := in_place(passes, q, k, v, impl, use_lse=use_lse)) is not None:
        if _new_tokens(q, k, v):
            lying = [load_where_rows_lie(one, q, k) for one in passes]
            return [Part(*kernel.load_passes()(q, k, v, lying, scale))]
        return _in_place([load(one, q, k) for one in passes], q, k, v, kernel, scale, known)
    if calls := calls_apart(passes, q, k):
        return [_compute_apart(calls, q, k, v, impl, scale, use_lse=use_lse, known=known)]
    asked = as_computed(passes, q, k, v, impl, use_lse=use_lse)
    loaded = [suited(one, q, k, v, impl, use_lse=use_lse) for _, one in asked]
    together = _together(loaded, q, k, v)
    parts = []
    with Lanes(loaded, (q, k, v), impl) as lanes:
        if (len(loaded) > 1 or known is not None) and needs_grad(q, k, v):
            together = together or _each(loaded, q, k, v, lanes)
            if halves := _halves(loaded, together, impl, scale):
                return [attend_jointly(loaded, halves, together, lanes, known)]
        for index, one in enumerate(loaded):
            if isinstance(one, Loaded) and (alone := by_key_heads(one, q, k, v, impl)):
                place = len(loaded) == 1
                parts.append(attend_by_key_heads(one, alone, q, k, v, impl, scale, place=place))
                continue
            with lanes.lane(index) as lane:
                # One after the other, so that the rows of a pass are gone before the next one.
                own = one.inputs(q, k, v) if together is None else together[index]
                kernel = choose(impl, *own, one.ranges, use_lse=use_lse).load()
                part = one.outputs(*kernel(*own, one.ranges, scale))
                lanes.keep(lane, own, (part.out, part.lse))
            parts.append(part)
    return parts


def _in_place(
    loaded: Sequence[Loaded | Views],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Capability,
    scale: float,
    known: Known | None,
) -> list[Part]:
    """What a kernel gives that needs no order of rows in memory."""
    plain = [(one.ranges, one.places) for one in loaded if isinstance(one, Loaded)]
    views = [one for one in loaded if isinstance(one, Views)]
    attend = kernel.load_passes()
    parts = []
    for one in views:
        own = None if known is None else (rows_of(one, known[0]), rows_of(one, known[1]))
        here = [(one.ranges, Places())]
        parts.append(one.outputs(*attend(*one.inputs(q, k, v), here, scale, own)))
    if plain:
        parts.append(Part(*attend(q, k, v, plain, scale, known)))
    if known is None or len(parts) == 1:
        return parts
    # Each takes the gradients of what all give together, as a sum hands them on; its numbers are
    # of no use.
    outs, lses = zip(*(part.placed() for part in parts), strict=True)
    return [Part(reduce(torch.add, outs), reduce(torch.add, lses))]


def calls_apart(passes: Sequence[Pass], q: Tensor, k: Tensor) -> tuple[Own, ...] | None:
    """The passes as calls for heads of their own, on a GPU; kept while the first one lives."""
    if q.device.type != "cuda":
        return None
    first, *rest = passes
    kept = _loaded_apart.setdefault(first, {})
    name = (q.device, q.shape[1:3], k.shape[1:3], len(q) == 1, *map(id, rest))
    if name not in kept:
        # With what the name speaks of, which has to live as long.
        kept[name] = apart(passes, q, k), rest
    return kept[name][0]


def as_computed(
    passes: Sequence[Pass], q: Tensor, k: Tensor, v: Tensor, impl: str, *, use_lse: bool
) -> list[tuple[tuple[int, ...], Pass]]:
    """The passes as they are computed, and which ones of the plan each of them is.

    Those of a few rows are part of another one where the kernel that takes it likes that.
    """
    found = _with_few_rows(passes, q, k, v, impl, use_lse=use_lse)
    which, rest = ((), []) if found is None else (found[0], [found])
    return rest + [((i,), one) for i, one in enumerate(passes) if i not in which]


def _with_few_rows(
    passes: Sequence[Pass], q: Tensor, k: Tensor, v: Tensor, impl: str, *, use_lse: bool
) -> tuple[tuple[int, ...], Pass] | None:
    few = next((x for x in passes if x.query_order is not None and x.key_order is None), None)
    if few is None or not (kernels := with_long_rows(impl, q.device)):
        return None
    first, *rest = passes
    kept = _with_few.setdefault(first, {})
    name = tuple(map(id, rest))
    if name not in kept:
        # A pass of few rows is quickly loaded: where no kernel comes into question, nothing is
        # joined.
        small = load(few, q, k).ranges
        if all(kernel.reasons(q, k, v, small, use_lse=use_lse) for kernel in kernels):
            return None
        # With what the name speaks of, which has to live as long.
        kept[name] = few_rows(passes), rest
    found = kept[name][0]
    if found is None:
        return None
    try:
        kernel = choose(impl, q, k, v, load(found[1], q, k).ranges, use_lse=use_lse)
    except Refusal:
        return None
    return found if kernel.takes_long_rows else None


def _compute_apart(
    calls: tuple[Own, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    impl: str,
    scale: float,
    *,
    use_lse: bool,
    known: Known | None,
) -> Part:
    views = [(*one.inputs(q, k, v), one.ranges) for one in calls]
    chosen = [choose(impl, *own, use_lse=use_lse) for own in views]
    if all(kernel.places for kernel in chosen):
        halves = [
            kernel.load_placed()(*own, scale) for kernel, own in zip(chosen, views, strict=True)
        ]
        lanes = Lanes(calls, (q, k, v), impl)
        return Part(*attend_placed(calls, halves, (q, k, v), lanes, known))
    outs, lses = [], []
    inputs = split(calls, q, k, v)
    with Lanes(calls, (q, k, v), impl) as lanes:
        for index, (one, own, kernel) in enumerate(zip(calls, inputs, chosen, strict=True)):
            with lanes.lane(index) as lane:
                out, lse = kernel.load()(*own, one.ranges, scale)
                lanes.keep(lane, own, (out, lse))
            outs.append(out)
            lses.append(lse)
    return Part(*join(calls, outs, lses, q.shape[1]))


def suited(
    one: Pass, q: Tensor, k: Tensor, v: Tensor, impl: str, *, use_lse: bool
) -> Loaded | Views:
    """The pass as the kernel that will compute it likes it best."""
    found = load(one, q, k)
    if isinstance(found, Views) or found.heads is not None:
        return found
    kernel = choose(impl, q, k, v, found.ranges, use_lse=use_lse)
    kept = _loaded[one]
    if kernel.adds_key_tiles and needs_grad(k, v):
        programs = k.shape[1] if kernel.adds_key_tiles == "of a key head" else q.shape[1]
        name = ("copies", q.device, q.shape[1], k.shape[1:3], programs)
        if name not in kept:
            kept[name] = _with_copies(one, found, k.shape[2], programs)
        return kept[name]
    if found.keys is None:
        return found
    grads = needs_grad(q, k, v)
    name = ("keys", q.device, len(q), q.shape[1], k.shape[1:3], kernel.name, grads, use_lse)
    if name not in kept:
        best = found
        if len(q) == 1 and kernel.takes_shared_keys(q, k, v):
            best = _with_shared_keys(one, found, q, k, v, kernel, use_lse=use_lse)
        if len(q) == 1 and kernel.takes_keys_in_turn:
            best = _with_keys_in_turn(one, best, k.shape[2])
        if best is found and kernel.takes_more_keys:
            best = _with_more_keys(one, found, k)
            if kernel.reasons(q, k, v, best.ranges, use_lse=use_lse):
                best = found
        kept[name] = best
    return kept[name]


def _with_shared_keys(
    one: Pass,
    found: Loaded,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Capability,
    *,
    use_lse: bool,
) -> Loaded | Views:
    """The pass over views of its queries; as it is where these are worse, or are refused."""
    rows, keys = q.shape[2], k.shape[2]
    if rows < _LEAST_ROWS * max(one.steps):
        return found
    views = views_of(one, rows, keys, q.device, found.keys)
    if views is None:
        return found
    # Keys for their looks alone: none is gathered.
    own_k, own_v = (x[:, :, :1].expand(-1, -1, views.ranges.keys, -1) for x in (k, v))
    own_q = views.query_rows(q)
    refused = kernel.reasons(own_q, own_k, own_v, views.ranges, use_lse=use_lse)
    return found if refused else views


def _with_keys_in_turn(one: Pass, found: Loaded | Views, keys: int) -> Loaded | Views:
    """The pass with keys as views, one remainder after another; as it is where they are none."""
    step = keys_in_turn(one, keys)
    if step is None:
        return found
    ranges = replace(found.ranges, keys=keys, key_rows=step)
    if isinstance(found, Views):
        return replace(found, ranges=ranges, keys=None)
    return replace(found, ranges=ranges, keys=None, key_step=step)


# As those of ``_load``.
@torch.inference_mode(False)
def _with_more_keys(one: Pass, found: Loaded, k: Tensor) -> Loaded:
    """The pass with keys in their own order where they lie; kept likewise.

    As it is where that is no part of its order.
    """
    kept = _more.setdefault(found, {})
    name = len(k) == 1
    if name not in kept:
        more = more_keys(one, k.shape[2], len(k), k.device)
        kept[name] = None
        if more is not None:
            lo, hi, others = more
            ranges = _ranges(one, lo, hi, None, others.border + others.count, k.device)
            kept[name] = replace(found, ranges=replace(ranges, more=others), keys=None)
    return kept[name] or found


def _with_copies(one: Pass, found: Loaded, keys: int, programs: int) -> Loaded:
    """The pass with copies of keys that most queries see; as it is where there are none."""
    copies = copies_of(found.ranges, found.all_heads, programs)
    if copies is None:
        return found
    order = np.arange(keys, dtype=np.int32)[None] if one.key_order is None else one.key_order
    row = copies.row_E.cpu().numpy()
    order = np.concatenate([order, np.where(row < 0, -1, order[:, row.clip(min=0)])], axis=1)
    return replace(found, ranges=copies.ranges, keys=Order.of(order, keys, copies.row_E.device))


def _together(
    loaded: Sequence[Loaded | Views], *tensors: Tensor
) -> list[tuple[Tensor, ...]] | None:
    """What the kernel gets in each pass, so that gradients are added up at once; None if apart."""
    if len(loaded) < 2 or not needs_grad(*tensors):
        return None
    if any(isinstance(one, Loaded) and one.of_some_heads for one in loaded):
        return None
    orders = zip(*(one.orders for one in loaded), strict=True)
    each = [spread(x, own) for x, own in zip(tensors, orders, strict=True)]
    return [one.of_ordered(*own) for one, own in zip(loaded, zip(*each, strict=True), strict=True)]


def _each(
    loaded: Sequence[Loaded | Views], q: Tensor, k: Tensor, v: Tensor, lanes: Lanes
) -> list[tuple[Tensor, ...]]:
    """What the kernel gets in each pass, each by itself."""
    found = []
    for index, one in enumerate(loaded):
        with lanes.lane(index) as lane:
            found.append(one.inputs(q, k, v))
            lanes.keep(lane, (q, k, v), found[-1])
    return found


def _halves(
    loaded: Sequence[Loaded | Views], inputs: Sequence[Sequence[Tensor]], impl: str, scale: float
) -> list[Halves] | None:
    """Forward and backward of the kernel of each pass; None if one has no such halves."""
    each = [(q, k, v, one.ranges) for (q, k, v), one in zip(inputs, loaded, strict=True)]
    if len(each) > 1:
        chosen, _ = choose_together(impl, each)
    else:
        chosen = [choose(impl, *each[0])]
    if not all(kernel.has_halves for kernel in chosen):
        return None
    return [kernel.load_halves()(*own, scale) for kernel, own in zip(chosen, each, strict=True)]


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
