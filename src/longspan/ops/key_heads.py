"""Key heads of a pass on a CPU, each gathered, computed and put back while it lies in the cache.

    all heads:       gather q, k, v | attend          | put out back
    by key heads:    gather, attend, put back (head 0) | gather, attend, put back (head 1) | ...

Gathered for all heads at once, rows leave the cache before the kernel comes to them, and so do its
outputs before they are put back. Threads take key heads in turns, as they do inside the kernel.
Without gradients only: for those autograd wants the rows of all heads.

Axes: B batch, H query heads, K key heads, N query rows, P places, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.capability import choose, needs_grad
from longspan.ops.loaded import Loaded
from longspan.ops.merge import Part
from longspan.ops.ranges import KeyRanges
from longspan.ops.workers import can_share_threads, run_parts

# Rows of this many numbers do not stay in a cache that several cores share.
_WORTH = 1 << 22

_kept: WeakKeyDictionary[Loaded, dict[tuple[int, int], list[Loaded]]] = WeakKeyDictionary()


def by_key_heads(one: Loaded, q: Tensor, k: Tensor, v: Tensor, impl: str) -> list[Loaded] | None:
    """The pass for each key head alone; None where it is better computed for all at once."""
    heads, key_heads = q.shape[1], k.shape[1]
    if (
        one.heads is not None
        or one.kv_heads is not None
        or q.device.type != "cpu"
        or impl not in ("auto", "tiled")
        or _moved(one, q, k, v) < _WORTH
        or not max(2, torch.get_num_threads()) <= key_heads
        or needs_grad(q, k, v)
        or torch.compiler.is_compiling()
        or not can_share_threads()
    ):
        return None
    kept = _kept.setdefault(one, {})
    if (heads, key_heads) not in kept:
        share, ranges = heads // key_heads, one.ranges
        kept[heads, key_heads] = [
            replace(
                one,
                ranges=KeyRanges(
                    ranges.lo_GNm,
                    ranges.hi_GNm,
                    ranges.group_BH[:, h * share : (h + 1) * share],
                    ranges.keys,
                ),
                queries=one.queries and one.queries.of_heads(h * share, share, heads),
                keys=one.keys and one.keys.of_heads(h, 1, key_heads),
                all_heads=share,
            )
            for h in range(key_heads)
        ]
    return kept[heads, key_heads]


def _moved(one: Loaded, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Numbers that are gathered and put back for all heads."""
    keys = 0 if one.keys is None else one.keys.places * k.shape[1] * (k.shape[3] + v.shape[3])
    if one.queries is not None:
        keys += one.queries.places * q.shape[1] * (q.shape[3] + v.shape[3])
    return len(q) * keys


def attend_by_key_heads(
    one: Loaded,
    alone: Sequence[Loaded],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    impl: str,
    scale: float,
    *,
    place: bool,
) -> Part:
    """What the kernel gives, for all heads.

    Args:
        one: the pass.
        alone: the same for each key head.
        q: queries [B, H, N, D].
        k: keys [B, K, M, D].
        v: values [B, K, M, Dv].
        impl: kernel name.
        scale: factor on the logits.
        place: whether outputs are put back in the order of the queries, not only those of other
            passes with them.
    """
    share = q.shape[1] // len(alone)
    order = one.queries
    rows = q.shape[2] if order is None or place else order.places
    lse = q.new_empty(*q.shape[:2], rows, dtype=torch.promote_types(q.dtype, torch.float32))
    out = q.new_empty(*q.shape[:2], rows, v.shape[3])

    def part(h: int) -> None:
        mine, own = slice(h * share, (h + 1) * share), alone[h]
        q_, k_, v_ = own.inputs(q[:, mine], k[:, h : h + 1], v[:, h : h + 1])
        kernel = choose(impl, q_, k_, v_, own.ranges).load()
        found = own.outputs(*kernel(q_, k_, v_, own.ranges, scale))
        if place and found.order is not None:
            lse[:, mine] = found.order.put_lse(found.lse)
            found.order.put_into(found.out, out[:, mine])
        else:
            lse[:, mine], out[:, mine] = found.lse, found.out

    run_parts(part, len(alone))
    return Part(out, lse, None if place else order)
