"""``attend`` as one operator, so that ``torch.compile`` keeps a layer in one graph.

Plans are made in numpy and kept in Python caches, which a compiler can neither trace nor see
through. Inside a compiled graph the operation is therefore opaque: shapes are known, the work
happens outside. Its backward runs the forward again, because the graph of the first run is gone:
about a third more attention time in compiled training. Eager code calls ``attend`` itself.

Axes: B batch, H query heads, K key heads, N rows, D head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longspan.ops import attend as attend_now
from longspan.pattern import Pattern, parse

_parsed = lru_cache(maxsize=256)(parse)


def attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKND: Tensor,
    pattern: Pattern,
    *,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    layer: int = 0,
) -> Tensor:
    """``longspan.attend``, also inside ``torch.compile``; see there for the arguments."""
    if torch.compiler.is_compiling():
        factor = q_BHND.shape[-1] ** -0.5 if scale is None else scale
        text = str(pattern)
        return _attend(q_BHND, k_BKND, v_BKND, text, positions, segments, factor, impl, layer)
    return attend_now(
        q_BHND,
        k_BKND,
        v_BKND,
        pattern,
        positions=positions,
        segments=segments,
        scale=scale,
        impl=impl,
        layer=layer,
    )


@torch.library.custom_op("longspan::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    positions: Tensor | None,
    segments: Tensor | None,
    scale: float,
    impl: str,
    layer: int,
) -> Tensor:
    rest: dict[str, Any] = {"positions": positions, "segments": segments, "scale": scale}
    return attend_now(q, k, v, _parsed(pattern), impl=impl, layer=layer, **rest).contiguous()


@_attend.register_fake
def _(q, k, v, pattern, positions, segments, scale, impl, layer):
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("longspan::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    positions: Tensor | None,
    segments: Tensor | None,
    scale: float,
    impl: str,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rest: dict[str, Any] = {"positions": positions, "segments": segments, "scale": scale}
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = attend_now(q, k, v, _parsed(pattern), impl=impl, layer=layer, **rest)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attend_backward.register_fake
def _(grad, q, k, v, pattern, positions, segments, scale, impl, layer):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.pattern, positions, segments, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, positions, segments)


def _backward(ctx, grad):
    q, k, v, positions, segments = ctx.saved_tensors
    grads = _attend_backward(grad, q, k, v, ctx.pattern, positions, segments, *ctx.rest)
    return *grads, None, None, None, None, None, None


_attend.register_autograd(_backward, setup_context=_keep)
