"""A kernel over ranges that the data decides, also as one operator inside ``torch.compile``.

Kernels derive schedules from ranges in numpy, which a compiler cannot trace. In a compiled graph
the call is therefore opaque, as ``attend`` is there, and its backward is handed the output and its
log-sum-exp (see ``longspan.ops.compiled``). Eager code calls the kernel itself.

Axes: B batch, H query heads, K key heads, L query rows, M key rows, D head width, m
ranges of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.ops.capability import Known, choose, in_dual_level
from longspan.ops.compiled import NOT_RECORDED, slopes_within
from longspan.ops.inputs import autocast
from longspan.ops.joint import attend_jointly
from longspan.ops.lanes import Lanes
from longspan.ops.loaded import Loaded
from longspan.ops.places import Places
from longspan.ops.ranges import KeyRanges


def over_ranges(
    q: Tensor, k: Tensor, v: Tensor, lo_BHLm: Tensor, hi_BHLm: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """Run a kernel on ranges that may differ for every batch row and head.

    Args:
        q: queries [B, H, L, D].
        k: keys [B, K, M, D].
        v: values [B, K, M, Dv].
        lo_BHLm: first key row of each range; disjoint within a row, in any order. One table may
            serve all batch rows [1, ...], and neighbouring heads.
        hi_BHLm: one past the last; empty ranges may lie anywhere.
        scale: factor on the logits.
        impl: kernel name, or ``auto``.

    Returns:
        out [B, H, L, Dv] and lse [B, H, L]; 0 and -inf where a row sees no key. Under autocast
        inputs are cast as those of torch's own attention are.
    """
    empty = lo_BHLm >= hi_BHLm
    lo, hi = (x.masked_fill(empty, 0).to(torch.int32).contiguous() for x in (lo_BHLm, hi_BHLm))
    if lo.shape[-1] > 1:
        order = lo.masked_fill(empty, k.shape[2] + 1).argsort(dim=-1)
        lo, hi = lo.gather(-1, order), hi.gather(-1, order)
    q, k, v = autocast(q, k, v)
    run: Any = _now
    if torch.compiler.is_compiling():
        # The operator would drop forward-mode derivatives: the graph breaks there.
        run = torch.compiler.disable(_now) if in_dual_level() else _over_ranges
    return run(q.contiguous(), k.contiguous(), v.contiguous(), lo, hi, scale, impl)


def _now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    scale: float,
    impl: str,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    batch, tables = lo.shape[:2]
    group = torch.arange(batch * tables, device=q.device).view(batch, tables)
    group = group.repeat_interleave(q.shape[1] // tables, dim=1)
    ranges = KeyRanges(lo.flatten(0, 1), hi.flatten(0, 1), group, k.shape[2])
    kernel = choose(impl, q, k, v, ranges)
    if known is not None and kernel.reads_in_place:
        return kernel.load_passes()(q, k, v, [(ranges, Places())], scale, known)
    if known is not None and kernel.has_halves:
        one = [Loaded(ranges, None, None, None, None, q.shape[1])]
        halves = [kernel.load_halves()(q, k, v, ranges, scale)]
        found = attend_jointly(one, halves, [(q, k, v)], Lanes(one, (q, k, v), impl), known)
        return found.out, found.lse
    return kernel.load()(q, k, v, ranges, scale)


@torch.library.custom_op("longspan::attention_over_ranges", mutates_args=(), tags=NOT_RECORDED)
def _over_ranges(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    out, lse = _now(q, k, v, lo, hi, scale, impl)
    return out.contiguous(), lse.contiguous()


@_over_ranges.register_fake
def _(q, k, v, lo, hi, scale, impl):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.custom_op(
    "longspan::attention_over_ranges_backward", mutates_args=(), tags=NOT_RECORDED
)
def _over_ranges_backward(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # Autograd hangs their gradients on what it is handed.
    known = out.detach(), lse.detach()

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _now(q, k, v, lo, hi, scale, impl, known)

    return slopes_within(run, (q, k, v), (dout, dlse))


@_over_ranges_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, lo, hi, scale, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, dout, dlse):
    grads = _over_ranges_backward(dout, dlse, *ctx.saved_tensors, ctx.scale, ctx.impl)
    return *grads, None, None, None, None


_over_ranges.register_autograd(_backward, setup_context=_keep)
