"""``attend`` as one operator, so that ``torch.compile`` keeps what calls it in one graph.

Plans are made in numpy and kept in Python caches, which a compiler can neither trace nor see
through. Inside a compiled graph the operation is therefore opaque: shapes are known, the work
happens outside. The graph of the first run is gone when its backward comes, which is handed the
output and its log-sum-exp instead: kernels whose backward asks for nothing else (``native``,
``hopper``, ``cudnn``) run it at once, others their forward again, a third more of attention's
time. Eager code never comes here.

Axes: B batch, H query heads, K key heads, N rows, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from longspan.ops.capability import in_dual_level
from longspan.pattern import Pattern
from longspan.planning import Plan

# A graph of the GPU would not know of the plans that a first run makes, nor that they live as long
# as the graph: around these operators mode="reduce-overhead" records graphs of their own.
NOT_RECORDED = (torch.Tag.cudagraph_unsafe,)

# What the dispatcher passes by inside an operator. What is not recorded there would be missing in
# the gradients; another thread, which has all switched on, would wait for ever: autograd has one
# thread for each GPU, and that is the one that waits.
_PASSED_BY = (
    torch.DispatchKey.AutogradFunctionality,
    torch.DispatchKey.AutogradOther,
    torch.DispatchKey.ADInplaceOrView,
)


def attend_compiled(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKND: Tensor,
    pattern: Pattern | Plan | str,
    rows: tuple[Any, Any, Any, Any],
    scale: float | None,
    return_lse: bool,
    impl: str,
    layer: int,
) -> Any:
    """What ``longspan.attend`` does while a compiler traces it; see there for the arguments.

    A plan holds arrays and is no argument of an operator: the graph breaks at it. So it does where
    forward-mode derivatives are taken, which an operator would drop without a word.
    """
    if isinstance(pattern, Plan) or in_dual_level():
        outside: Any = torch.compiler.disable(_now)
        found = outside(q_BHND, k_BKND, v_BKND, pattern, rows, scale, impl, layer)
    else:
        factor = q_BHND.shape[-1] ** -0.5 if scale is None else float(scale)
        tables = [
            row if row is None or isinstance(row, Tensor) else torch.as_tensor(row, device="cpu")
            for row in rows
        ]
        found = _attend(q_BHND, k_BKND, v_BKND, str(pattern), *tables, factor, impl, layer)
    return found if return_lse else found[0]


@torch.library.custom_op("longspan::attention", mutates_args=(), tags=NOT_RECORDED)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    positions: Tensor | None,
    segments: Tensor | None,
    key_positions: Tensor | None,
    key_segments: Tensor | None,
    scale: float,
    impl: str,
    layer: int,
) -> tuple[Tensor, Tensor]:
    rows = (positions, segments, key_positions, key_segments)
    out, lse = _now(q, k, v, pattern, rows, scale, impl, layer)
    return out.contiguous(), lse.contiguous()


@_attend.register_fake
def _(q, k, v, *_):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.custom_op("longspan::attention_backward", mutates_args=(), tags=NOT_RECORDED)
def _attend_backward(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    positions: Tensor | None,
    segments: Tensor | None,
    key_positions: Tensor | None,
    key_segments: Tensor | None,
    scale: float,
    impl: str,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (positions, segments, key_positions, key_segments)
    # Autograd hangs their gradients on what it is handed.
    known = out.detach(), lse.detach()

    def run(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return _now(*qkv, pattern, rows, scale, impl, layer, known=known)

    return slopes_within(run, (q, k, v), (dout, dlse))


@_attend_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def slopes_within(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor],
    slopes: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v inside an operator, contiguous.

    Args:
        run: gives out and lse for q, k and v.
        inputs: q, k and v.
        slopes: gradients of out and lse.
    """
    with ExitStack() as recording:
        for key in _PASSED_BY:
            recording.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        recording.enter_context(torch.enable_grad())
        leaves = [x.detach().requires_grad_() for x in inputs]
        dq, dk, dv = torch.autograd.grad(run(*leaves), leaves, slopes)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _now(*given: Any, known: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    from longspan.ops.attend import attend_now

    return attend_now(*given, known=known)


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.pattern, *rows, scale, impl, layer = inputs
    ctx.save_for_backward(*output, q, k, v, *rows)
    ctx.how = (scale, impl, layer)


def _backward(ctx, dout, dlse):
    out, lse, q, k, v, *rows = ctx.saved_tensors
    grads = _attend_backward(dout, dlse, out, lse, q, k, v, ctx.pattern, *rows, *ctx.how)
    return *grads, *(None for _ in range(8))


_attend.register_autograd(_backward, setup_context=_keep)
