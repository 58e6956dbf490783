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
    pattern: Pattern | str,
    *,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_segments: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    layer: int = 0,
) -> Any:
    """``longspan.attend``, also inside ``torch.compile``; see there for the arguments.

    Patterns made inside what is compiled must be in text form.
    """
    if torch.compiler.is_compiling():
        factor = q_BHND.shape[-1] ** -0.5 if scale is None else scale
        text = pattern if isinstance(pattern, str) else str(pattern)
        rows = (positions, segments, key_positions, key_segments)
        found = _attend(q_BHND, k_BKND, v_BKND, text, *rows, factor, impl, layer)
        return found if return_lse else found[0]
    return attend_now(
        q_BHND,
        k_BKND,
        v_BKND,
        _parsed(pattern) if isinstance(pattern, str) else pattern,
        positions=positions,
        segments=segments,
        key_positions=key_positions,
        key_segments=key_segments,
        scale=scale,
        return_lse=return_lse,
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


@torch.library.custom_op("longspan::attend_backward", mutates_args=())
def _attend_backward(
    dout: Tensor,
    dlse: Tensor,
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
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        found = _now(q, k, v, pattern, rows, scale, impl, layer)
        dq, dk, dv = torch.autograd.grad(found, (q, k, v), (dout, dlse))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attend_backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _now(q, k, v, pattern, rows, scale, impl, layer) -> tuple[Tensor, Tensor]:
    names = ("positions", "segments", "key_positions", "key_segments")
    given: dict[str, Any] = dict(zip(names, rows, strict=True))
    how: dict[str, Any] = {"scale": scale, "impl": impl, "layer": layer, "return_lse": True}
    return attend_now(q, k, v, _parsed(pattern), **given, **how)


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.pattern, *rows, scale, impl, layer = inputs
    ctx.save_for_backward(q, k, v, *rows)
    ctx.how = (scale, impl, layer)


def _backward(ctx, dout, dlse):
    q, k, v, *rows = ctx.saved_tensors
    grads = _attend_backward(dout, dlse, q, k, v, ctx.pattern, *rows, *ctx.how)
    return *grads, *(None for _ in range(8))


_attend.register_autograd(_backward, setup_context=_keep)
