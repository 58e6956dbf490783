"""Compute the passes of a plan: call a kernel for each, say where its results belong.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

import torch
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
from longspan.ops.few_rows import few_rows
from longspan.ops.joint import attend_jointly, rows_of
from longspan.ops.key_heads import attend_by_key_heads, by_key_heads
from longspan.ops.lanes import Lanes
from longspan.ops.loaded import Loaded
from longspan.ops.loading import load, load_where_rows_lie
from longspan.ops.merge import Part
from longspan.ops.placed import attend_placed
from longspan.ops.places import Places
from longspan.ops.rows import spread
from longspan.ops.suited import suited
from longspan.ops.views import Views
from longspan.planning import Pass

_with_few: WeakKeyDictionary[Pass, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
_loaded_apart: WeakKeyDictionary[Pass, dict[tuple[object, ...], Any]] = WeakKeyDictionary()


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
                found, places = halves
                return [attend_jointly(loaded, found, together, lanes, known, places=places)]
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
) -> tuple[list[Halves], bool] | None:
    """Forward and backward of the kernel of each pass; None if one has no such halves.

    With whether all of them write into places.
    """
    each = [(q, k, v, one.ranges) for (q, k, v), one in zip(inputs, loaded, strict=True)]
    if len(each) > 1:
        chosen, _ = choose_together(impl, each)
    else:
        chosen = [choose(impl, *each[0])]
    if not all(kernel.has_halves for kernel in chosen):
        return None
    found = [kernel.load_halves()(*own, scale) for kernel, own in zip(chosen, each, strict=True)]
    return found, all(kernel.places for kernel in chosen)
