"""Passes over several orders of keys as one pass, with the orders side by side.

    keys     | own order      | by remainder mod 32 | listed |
    ranges     window           strided - window      sinks

Two passes read every query twice and merge two outputs; one pass over twice the keys does that in
the kernel's own softmax. What it takes more is a copy of the keys, which grouped queries share. A
pair that two of the passes hold counts twice, as it does when passes are merged.

Passes go together whose queries stay in place, and those whose queries lie in residue orders that
one of them refines: by remainder mod 8, remainders mod 4 and mod 2 lie side by side too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from longspan.planning.lead import led
from longspan.planning.passes import Pass, Rows, alike, used_first

# Rows of a tile, as GPU kernels see them.
_TILE = 128
# Pairs for every row that a pass less is worth.
_WORTH = 160


def joined(passes: Sequence[Pass], n: int, keys: int) -> tuple[Pass, ...]:
    """The same pairs with fewer passes.

    Args:
        passes: of one plan.
        n: query rows.
        keys: key rows.
    """
    # Few queries over many keys, as in decoding: copying the keys would cost more than merging.
    if len(passes) < 2 or 2 * n < keys:
        return tuple(passes)
    found: list[Pass] = []
    stay = [one for one in passes if one.query_order is None]
    move = [one for one in passes if one.query_order is not None]
    # Passes over a few rows only stay alone.
    whole = [one for one in move if one.query_order is not None and one.query_order.shape[2] == n]
    if stay:
        found.append(led(_side_by_side(stay, keys)))
    if whole:
        finest = max(whole, key=lambda one: one.steps)
        group = [finest]
        for one in whole:
            if one is finest:
                continue
            moved = _reordered(one, finest)
            if moved is None:
                found.append(one)
            else:
                group.append(moved)
        found.append(led(_side_by_side(group, keys)))
    return (*found, *(one for one in move if one not in whole))


def _reordered(one: Pass, finest: Pass) -> Pass | None:
    """A pass with the queries of another, if that costs little."""
    assert one.query_order is not None
    assert finest.query_order is not None
    if any(step == 0 or finest.steps[0] % step for step in one.steps):
        return None
    place = np.argsort(one.query_order, axis=2)
    index = np.take_along_axis(*np.broadcast_arrays(place, finest.query_order), axis=2)
    lo, hi = (np.take_along_axis(*_broadcast(table, index), axis=2) for table in (one.lo, one.hi))
    moved = replace(one, lo=lo, hi=hi, query_order=finest.query_order)
    extra = (moved.tiles(_TILE) - one.tiles(_TILE)) * _TILE**2
    return moved if extra <= _WORTH * lo.shape[2] * len(one.head_class) else None


def _broadcast(table: Rows, index: Rows) -> tuple[Rows, Rows]:
    batch = max(len(table), len(index))
    return (
        np.broadcast_to(table, (batch, *table.shape[1:])),
        np.broadcast_to(index[..., None], (batch, *index.shape[1:], 1)),
    )


def _side_by_side(passes: Sequence[Pass], keys: int) -> Pass:
    if len(passes) == 1:
        return passes[0]
    own = np.arange(keys, dtype=np.int32)[None]
    orders = [own if one.key_order is None else one.key_order for one in passes]
    starts = [0, *accumulate(order.shape[1] for order in orders)]
    head_class, classes = alike(passes)
    batch, n = max(len(one.lo) for one in passes), passes[0].lo.shape[2]
    columns = [0, *accumulate(one.lo.shape[3] for one in passes)]
    lo, hi = np.zeros((2, batch, len(classes[0]), n, columns[-1]), np.int32)
    for one, taken, start, column in zip(passes, classes, starts, columns, strict=False):
        to = slice(column, column + one.lo.shape[3])
        # One class at a time: a million queries of many heads are gigabytes at once.
        for b, c in np.ndindex(lo.shape[:2]):
            own_lo, own_hi = (table[b % len(table), taken[c]] for table in (one.lo, one.hi))
            used = own_lo < own_hi
            # Faster than a choice for each.
            lo[b, c, :, to], hi[b, c, :, to] = (own_lo + start) * used, (own_hi + start) * used
    lo, hi = used_first(lo, hi)
    steps = tuple(step for one in passes for step in one.steps)
    return Pass(lo, hi, head_class, _beside(orders), passes[0].query_order, steps)


def _beside(tables: Sequence[Rows]) -> Rows:
    """Along the last axis, for the most batch rows that any of them has."""
    batch = max(len(table) for table in tables)
    full = [np.broadcast_to(table, (batch, *table.shape[1:])) for table in tables]
    return np.concatenate(full, axis=-1).astype(np.int32, copy=False)
