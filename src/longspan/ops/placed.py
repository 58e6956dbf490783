"""Calls for heads of their own by a kernel that writes where results belong.

Calls of ``apart`` read views of q, k and v. A kernel that takes any layout writes views of the
output and of the gradients, so that no row is copied: out and dQ, and gradients of keys that one
call alone reads. Those that several calls read are added up.

Axes: B batch, H query heads, K key heads, N rows, D width, r remainders, n rows of a remainder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.ops.apart import Own, add_up, each_alone
from longspan.ops.capability import Known, PlacedHalves
from longspan.ops.empty import harmless
from longspan.ops.lanes import Lanes
from longspan.ops.libraries import room_for
from longspan.ops.once import once


def attend_placed(
    calls: Sequence[Own],
    halves: Sequence[PlacedHalves],
    inputs: tuple[Tensor, Tensor, Tensor],
    lanes: Lanes,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    """out [1, H, N, Dv] and lse [1, H, N] of all calls, differentiable once.

    Args:
        calls: every query head is in one of them.
        halves: forward and backward of the kernel of each.
        inputs: q, k and v of all heads.
        lanes: where each of them runs.
        known: what is given in the place of a forward, for gradients alone.
    """
    return _Placed.apply(tuple(calls), tuple(halves), lanes, known, *inputs)


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        calls: tuple[Own, ...],
        halves: tuple[PlacedHalves, ...],
        lanes: Lanes,
        known: Known | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = inputs
        out_BHND, lse_BHN = known or _computed(calls, halves, lanes, q, k, v)
        ctx.save_for_backward(q, k, v, out_BHND, lse_BHN)
        ctx.calls, ctx.halves, ctx.lanes = calls, halves, lanes
        ctx.set_materialize_grads(False)
        return out_BHND, lse_BHN

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout_BHND: Tensor | None, dlse_BHN: Tensor | None
    ) -> tuple[Any, ...]:
        q, k, v, out_BHND, lse_BHN = ctx.saved_tensors
        given = [x for x in (*ctx.saved_tensors, dout_BHND, dlse_BHN) if x is not None]
        # Without a gradient of the output, values have none.
        whole = [q, k] if dout_BHND is None else [q, k, v]
        alone = each_alone([one.key_heads for one in ctx.calls], k.shape[1])
        room = [room_for(x) if x is q or alone else None for x in whole]
        found = []
        with ctx.lanes as lanes:
            for index, (one, half) in enumerate(zip(ctx.calls, ctx.halves, strict=True)):
                own = one.inputs(q, k, v)
                heads = one.heads, one.key_heads, one.key_heads
                into = [
                    None if x is None else one.of(x, at)
                    for x, at in zip(room, heads, strict=False)
                ]
                with lanes.lane(index) as lane:
                    lanes.keep(lane, (*given, *(x for x in room if x is not None)), ())
                    out, lse, dout, dlse = (
                        None if x is None else one.of(x, one.heads)
                        for x in (out_BHND, lse_BHN, dout_BHND, dlse_BHN)
                    )
                    assert lse is not None
                    slopes = harmless(one.empty, lse, dout, dlse)
                    grads = half.backward(*own, out, *slopes, into=into)
                    lanes.keep(lane, (), (x for x in grads if x is not None))
                found.append(grads)
        if not alone:
            room[1:] = [
                add_up(
                    [
                        (one, one.key_heads, grads[i])
                        for one, grads in zip(ctx.calls, found, strict=True)
                    ],
                    whole[i].shape,
                )
                for i in range(1, len(room))
            ]
        return None, None, None, None, *room, *([None] if len(room) < 3 else [])


def _computed(
    calls: Sequence[Own],
    halves: Sequence[PlacedHalves],
    lanes: Lanes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    out_BHND = q.new_empty(*q.shape[:3], v.shape[3])
    lse_BHN = q.new_empty(q.shape[:3], dtype=torch.float32)
    with lanes:
        for index, (one, half) in enumerate(zip(calls, halves, strict=True)):
            own = one.inputs(q, k, v)
            with lanes.lane(index) as lane:
                lanes.keep(lane, (q, k, v, out_BHND, lse_BHN), ())
                _, lse = half.forward(*own, out=one.of(out_BHND, one.heads))
                one.of(lse_BHN, one.heads).copy_(lse)
    return out_BHND, lse_BHN
