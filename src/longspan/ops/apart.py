"""Heads that see keys in orders of their own, each order as a kernel call over views of its heads.

A pattern that differs from head to head (mixed dilations) has one order of rows for some heads and
another for others. Where no head needs two of them nothing has to be joined: the heads of each
order are a slice of q, k and v, their residue order is a view of that slice (see ``views``), and
what the kernel gives belongs to those heads alone. Rows are copied once on the way out, and once
again for dQ, but for kernels that write where they belong (``placed``); gradients of keys that
several calls read are added up once.

Axes: B batch, H query heads, K key heads, N rows, D width, r remainders, n rows of a remainder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.ops.empty import Index, empty_rows
from longspan.ops.fused import add_rows, can_fuse
from longspan.ops.once import once
from longspan.ops.ranges import KeyRanges
from longspan.ops.views import by_remainder, residue_order, row_after_row, views_of
from longspan.planning import Pass
from longspan.planning.passes import Rows


@dataclass(frozen=True, eq=False)
class Own:
    """What one call of a kernel computes.

    Attributes:
        heads: the query heads.
        key_heads: their key heads.
        step: number of remainders r that the rows are split in; 1 for rows as they are.
        ranges: key ranges for r batch rows.
    """

    heads: slice
    key_heads: slice
    step: int
    ranges: KeyRanges

    @cached_property
    def empty(self) -> Index | None:
        """The rows [r, H', n] that see no key; None if every one sees some."""
        return empty_rows(self.ranges, self.step)

    def __str__(self) -> str:
        own = range(self.heads.start, self.heads.stop, self.heads.step)
        steps = f" in steps of {own.step}" if own.step > 1 else ""
        heads = f"heads {own[0]} to {own[-1]}{steps}" if len(own) > 1 else f"head {own[0]}"
        return heads + (f", rows by remainder mod {self.step}" if self.step > 1 else "")

    def of(self, x_BHN: Tensor, heads: slice) -> Tensor:
        """Some heads of [1, H, n r, ...] as [r, H', n, ...], a view."""
        own = x_BHN[:, heads]
        return own if self.step == 1 else by_remainder(own, self.step)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernel gets besides ``ranges``."""
        return self.of(q, self.heads), self.of(k, self.key_heads), self.of(v, self.key_heads)


# Training reads what is made here, whoever asks first.
@torch.inference_mode(False)
def apart(passes: Sequence[Pass], q: Tensor, k: Tensor) -> tuple[Own, ...] | None:
    """The calls that the passes come to; None where a head needs two orders, or rows must move."""
    every = list(range(q.shape[1]))
    whole = all(one.lo.shape[2] == q.shape[2] for one in passes)
    if len(q) > 1 or not whole or sorted(h for one in passes for h in one.heads) != every:
        return None
    orders = [(one, *order) for one in passes for order in _orders(one, k.shape[2])]
    # Most plans have one, and packed documents a new plan in every step: no tables are made.
    if len(orders) < 2:
        return None
    found = []
    for one, turn, classes in orders:
        heads = tuple(h for h, c in enumerate(one.head_class) if c in classes)
        part = _alone(one, turn, classes, heads, k.shape[2])
        own = None if part is None else _own(heads, part, q, k)
        if own is None:
            return None
        found.append(own)
    return tuple(found)


def split(
    calls: Sequence[Own], q: Tensor, k: Tensor, v: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the kernel gets in each call."""
    flat = _Split.apply(tuple(calls), q, k, v)
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def join(
    calls: Sequence[Own], outs: Sequence[Tensor], lses: Sequence[Tensor], heads: int
) -> tuple[Tensor, Tensor]:
    """out [1, H, N, Dv] and lse [1, H, N] from what the calls gave."""
    return _Join.apply(tuple(calls), heads, *outs, *lses)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: tuple[Own, ...], *given: Tensor) -> tuple[Tensor, ...]:
        ctx.calls, ctx.shapes = calls, [x.shape for x in given]
        ctx.set_materialize_grads(False)
        return tuple(x for one in calls for x in one.inputs(*given))

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None]
        for i, shape in enumerate(ctx.shapes):
            parts = [
                (one, one.heads if i == 0 else one.key_heads, grad)
                for one, grad in zip(ctx.calls, grads[i::3], strict=True)
                if grad is not None
            ]
            found.append(add_up(parts, shape) if parts else None)
        return tuple(found)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, calls: tuple[Own, ...], heads: int, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.calls = calls
        ctx.set_materialize_grads(False)
        outs, lses = given[: len(calls)], given[len(calls) :]
        out, lse = (_room(x, heads) for x in (outs[0], lses[0]))
        for one, own_out, own_lse in zip(calls, outs, lses, strict=True):
            _copy(one.of(out, one.heads), own_out)
            one.of(lse, one.heads).copy_(own_lse)
        return out, lse

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Any, ...]:
        own = (
            None if grad is None else one.of(grad, one.heads)
            for grad in grads
            for one in ctx.calls
        )
        return None, None, *own


def _room(x_rHn: Tensor, heads: int) -> Tensor:
    """Room for all heads and rows of [r, H', n, ...]."""
    r, _, n, *rest = x_rHn.shape
    return x_rHn.new_empty(1, heads, r * n, *rest)


def _copy(to: Tensor, x: Tensor) -> None:
    """Copy rows, 16 bytes at a time where they lie so."""
    wide = torch.complex128
    both = (to, x)
    if all(t.stride(-1) == 1 and _is_wide(t, wide.itemsize) for t in both):
        to, x = (t.view(wide) for t in both)
    to.copy_(x)


def _is_wide(x: Tensor, size: int) -> bool:
    steps = (*x.stride()[:-1], x.shape[-1], x.storage_offset())
    return all(step * x.element_size() % size == 0 for step in steps) and x.data_ptr() % size == 0


def add_up(parts: Sequence[tuple[Own, slice, Tensor]], shape: torch.Size) -> Tensor:
    """Gradients of the calls added up where several calls read the same heads."""
    first = parts[0][2]
    if each_alone([own for _, own, _ in parts], shape[1]):
        total = first.new_empty(shape)
        for one, own, grad in parts:
            _copy(one.of(total, own), grad)
        return total
    rows = [grad if one.step == 1 else row_after_row(grad) for one, _, grad in parts]
    if all(grad.shape[1] == shape[1] for _, _, grad in parts) and can_fuse(*rows):
        return add_rows([(x, None) for x in rows])
    total = first.new_zeros(shape, dtype=torch.promote_types(first.dtype, torch.float32))
    for (_, own, _), x in zip(parts, rows, strict=True):
        total[:, own] += x
    return total.to(first.dtype)


def each_alone(owns: Sequence[slice], heads: int) -> bool:
    """Whether every head is in one of these."""
    return sorted(h for own in owns for h in range(heads)[own]) == list(range(heads))


def _orders(one: Pass, keys: int) -> Iterator[tuple[int, list[int]]]:
    """The orders of keys that lie side by side, by number, and the classes that see each first."""
    there = one.lo < one.hi
    turns: dict[int, list[int]] = {}
    for c in np.flatnonzero(there.any(axis=(0, 2, 3))).tolist():
        turns.setdefault(int(one.lo[:, c][there[:, c]].min()) // keys, []).append(c)
    yield from turns.items()


def _alone(
    one: Pass, turn: int, classes: Sequence[int], heads: Sequence[int], keys: int
) -> Pass | None:
    """The pass as one of some heads over the keys of one order, with queries in the same order.

    None where it is none, because batch rows differ or a head reaches into several orders.
    """
    tables = (one.lo, one.key_order, one.query_order)
    if any(table is not None and len(table) > 1 for table in tables) or turn >= len(one.steps):
        return None
    lo, hi = one.lo[:, classes], one.hi[:, classes]
    there = lo < hi
    if int(hi[there].max()) > (turn + 1) * keys:
        return None
    lo, hi = (np.where(there, table - turn * keys, 0).astype(np.int32) for table in (lo, hi))
    n, step = lo.shape[2], one.steps[turn]
    if step < 1 or n % step:
        return None
    order = residue_order(n, step)
    if one.query_order is not None:
        lo, hi = (_reordered(table, classes, one.query_order, order) for table in (lo, hi))
    elif step > 1:
        lo, hi = lo[:, :, order], hi[:, :, order]
    key_order = one.key_order
    return Pass(
        lo,
        hi,
        tuple(classes.index(one.head_class[h]) for h in heads),
        None if key_order is None else key_order[:, turn * keys : (turn + 1) * keys],
        order[None, None],
        (step,),
    )


def _reordered(table: Rows, classes: Sequence[int], old: Rows, new: Rows) -> Rows:
    """Bounds of queries that lie in one order, for another."""
    rows = [old[0, c % old.shape[1]] for c in classes]
    # Rows that are missing see nothing.
    found = np.zeros((*table.shape[:2], len(new), table.shape[3]), np.int32)
    for i, row in enumerate(rows):
        found[:, i, row[row >= 0]] = table[:, i, row >= 0]
    return found[:, :, new]


def _own(heads: Sequence[int], one: Pass, q: Tensor, k: Tensor) -> Own | None:
    group = q.shape[1] // k.shape[1]
    kv = sorted({h // group for h in heads})
    each = {sum(h // group == one_kv for h in heads) for one_kv in kv}
    own, own_kv = _slice(heads), _slice(kv)
    if len(each) > 1 or own is None or own_kv is None:
        return None
    if one.steps == (1,) and one.key_order is None:
        ranges = KeyRanges(
            torch.from_numpy(one.lo[0]).to(q.device),
            torch.from_numpy(one.hi[0]).to(q.device),
            torch.tensor([one.head_class], device=q.device),
            k.shape[2],
        )
        return Own(own, own_kv, 1, ranges)
    views = views_of(one, q.shape[2], k.shape[2], q.device)
    return None if views is None else Own(own, own_kv, views.step, views.ranges)


def _slice(heads: Sequence[int]) -> slice | None:
    """Heads at one distance from each other as a slice."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    found = range(heads[0], heads[-1] + 1, step)
    return slice(found.start, found.stop, step) if tuple(found) == tuple(heads) else None
