"""Passes of a plan with gradients: one forward, and a backward that needs no merge.

    lse_i = log sum_p exp(lse_ip)          out_i = sum_p exp(lse_ip - lse_i) out_ip
    P_ij = exp(s_ij - lse_i)               dS_ij = P_ij (dout_i . v_j - dout_i . out_i + dlse_i)

The gradient of a score in any pass p depends on the other passes through the joint out and lse
alone. So each pass runs its own backward on rows of those, in its own order: no gradient of the
merge is computed, no pass has gradients of its out and lse, and the outputs of single passes are
gone once they are joined. A key that several passes see counts in each: a kernel that writes where
gradients belong adds those of the later passes to those of the first one, one after the other.

Time that of the kernels and of moving rows; memory O(N D): the rows of each pass, one out and lse.

Axes: B batch, H query heads, N query rows, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.capability import Halves, Known
from longspan.ops.empty import Index, harmless, index_of
from longspan.ops.lanes import Lanes
from longspan.ops.loaded import Loaded
from longspan.ops.merge import Part, merge_parts
from longspan.ops.once import once
from longspan.ops.views import Views

# Rows of a pass that adds gradients of keys to those of another one: this part of all, or more.
_LEAST = 8

_unseen: WeakKeyDictionary[object, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def attend_jointly(
    passes: Sequence[Loaded | Views],
    halves: Sequence[Halves],
    inputs: Sequence[Sequence[Tensor]],
    lanes: Lanes,
    known: Known | None = None,
    *,
    places: bool = False,
) -> Part:
    """Output and log-sum-exp over all passes, differentiable once.

    Args:
        passes: at least one.
        halves: forward and backward of the kernel of each.
        inputs: queries, keys and values of each, in its order.
        lanes: where each of them runs.
        known: what is given in the place of a forward, for gradients alone.
        places: whether all halves are ``PlacedHalves``.
    """
    # Now: a wait in the backward would leave the GPU without work.
    empty = unseen(passes, [len(own[0]) for own in inputs])
    flat = (x for own in inputs for x in own)
    run = tuple(passes), tuple(halves), lanes, places
    return Part(*_Joint.apply(run, empty, known, *flat))


# Passes, halves, lanes, and whether the halves write into places.
_Run = tuple[tuple[Loaded | Views, ...], tuple[Any, ...], Lanes, bool]


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: _Run,
        empty: Index | None,
        known: Known | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        passes, halves, lanes, _ = run
        out_BHND, lse_BHN = known or _merged(passes, halves, lanes, inputs)
        ctx.save_for_backward(*inputs, out_BHND, lse_BHN)
        ctx.run, ctx.empty = run, empty
        ctx.set_materialize_grads(False)
        return out_BHND, lse_BHN

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout_BHND: Tensor | None, dlse_BHN: Tensor | None
    ) -> tuple[Any, ...]:
        *inputs, out_BHND, lse_BHN = ctx.saved_tensors
        joint = (out_BHND, *harmless(ctx.empty, lse_BHN, dout_BHND, dlse_BHN))
        grads: list[Tensor | None] = []
        passes, halves, lanes, places = ctx.run
        # Gradients of keys where they lie, to which later passes add, and when that may begin.
        whole: Sequence[Tensor | None] = ()
        after = None
        with lanes:
            for index, (one, half) in enumerate(zip(passes, halves, strict=True)):
                own = inputs[3 * index : 3 * index + 3]
                with lanes.lane(index) as lane:
                    out, lse, dout, dlse = (x if x is None else rows_of(one, x) for x in joint)
                    assert out is not None
                    assert lse is not None
                    # Where few rows would wait for others, they fill processors that others leave.
                    many = _LEAST * lse.numel() >= lse_BHN.numel()
                    adds = places and one.keys_lie and many
                    if adds and after is not None:
                        into = (x if x is None else one.of_keys(x)[0] for x in whole)
                        given = *own, out, lse, dout, dlse
                        found = half.backward(*given, into=(None, *into), after=after)
                        found = found[0], None, None
                    else:
                        found = half.backward(*own, out, lse, dout, dlse)
                        adds = adds and one.key_step == 1
                        whole = found[1:] if adds else whole
                    if adds:
                        after = _now(out.device)
                    taken = (x for x in (*own, *joint, *whole) if x is not None)
                    lanes.keep(lane, taken, (x for x in found if x is not None))
                grads += found
        return None, None, None, *grads


def _now(device: torch.device) -> Any:
    """When all that was asked for so far is done."""
    return torch.cuda.current_stream(device).record_event()


def _merged(
    passes: Sequence[Loaded | Views],
    halves: Sequence[Halves],
    lanes: Lanes,
    inputs: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    parts = []
    with lanes:
        for index, (one, half) in enumerate(zip(passes, halves, strict=True)):
            own = inputs[3 * index : 3 * index + 3]
            with lanes.lane(index) as lane:
                part = one.outputs(*half.forward(*own))
                lanes.keep(lane, own, (part.out, part.lse))
            parts.append(part)
    return merge_parts(parts, overwrite=True)


def unseen(passes: Sequence[Loaded | Views], batches: Sequence[int]) -> Index | None:
    """The query rows that see no key in any pass; kept as long as the first one lives.

    Args:
        passes: at least one.
        batches: batch rows of the queries in each.
    """
    first, *rest = passes
    kept = _unseen.setdefault(first, {})
    name = (*batches, *map(id, rest))
    if name not in kept:
        lses = [_seen(*own).placed_lse() for own in zip(passes, batches, strict=True)]
        # With what the name speaks of, which has to live as long.
        kept[name] = index_of(torch.stack(lses).isneginf().all(0)), rest
    return kept[name][0]


def _seen(one: Loaded | Views, batch: int) -> Part:
    """A log-sum-exp of 0 where a row sees something, in place of what a kernel gives."""
    ranges = one.ranges
    empty_GN = ranges.empty_GN()
    lse_GN = torch.zeros_like(empty_GN, dtype=torch.float32).masked_fill(empty_GN, -torch.inf)
    lse_BHN = lse_GN[ranges.group_BH.expand(batch, -1)]
    return one.outputs(lse_BHN[..., None], lse_BHN)


def rows_of(one: Loaded | Views, x: Tensor) -> Tensor:
    """Rows of outputs [B, H, N, D] or numbers [B, H, N] as the pass has them."""
    return one.query_rows(x) if x.dim() == 4 else one.query_rows(x[..., None])[..., 0]
