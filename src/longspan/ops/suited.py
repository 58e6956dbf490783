"""A pass in the form that the kernel which will compute it likes best.

Views of queries that share keys, keys by remainder one after another, keys in their own order with
others behind, or copies of keys that most queries see.

Axes: B batch, H query heads, K key heads, E copied rows.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from longspan.ops.capability import Capability, choose, needs_grad
from longspan.ops.copies import copies_of
from longspan.ops.loaded import Loaded
from longspan.ops.loading import kept_of, load, ranges_of
from longspan.ops.more_keys import more_keys
from longspan.ops.rows import Order
from longspan.ops.views import Views, keys_in_turn, views_of
from longspan.planning import Pass

# Queries of a remainder that fill a tile: of fewer, most of it would be computed for nothing.
_LEAST_ROWS = 128

_more: WeakKeyDictionary[Loaded, dict[bool, Loaded | None]] = WeakKeyDictionary()


def suited(
    one: Pass, q: Tensor, k: Tensor, v: Tensor, impl: str, *, use_lse: bool
) -> Loaded | Views:
    """The pass as the kernel that will compute it likes it best."""
    found = load(one, q, k)
    if isinstance(found, Views) or found.heads is not None:
        return found
    kernel = choose(impl, q, k, v, found.ranges, use_lse=use_lse)
    kept = kept_of(one)
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


# Training can save what it did not make itself, but for tensors of inference mode.
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
            ranges = ranges_of(one, lo, hi, None, others.border + others.count, k.device)
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
