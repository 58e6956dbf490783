"""``attend`` as one operator, so that ``torch.compile`` keeps what calls it in one graph.

Plans are made in numpy and kept in Python caches, which a compiler can neither trace nor see
through. Inside a compiled graph the operation is therefore opaque: shapes are known, the work
happens outside. Its backward runs the forward again, because the graph of the first run is gone:
about a third more attention time in compiled training. Eager code never comes here.

Axes: B batch, H query heads, K key heads, N rows, D head width.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from longspan.pattern import Pattern
from longspan.planning import Plan


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

    A plan holds arrays and is no argument of an operator: the graph breaks at it.
    """
    if isinstance(pattern, Plan):
        how = {"scale": scale, "impl": impl, "layer": layer}
        outside: Any = torch.compiler.disable(_now)
        found = outside(q_BHND, k_BKND, v_BKND, pattern, rows, how)
    else:
        factor = q_BHND.shape[-1] ** -0.5 if scale is None else float(scale)
        tables = [row if row is None else torch.as_tensor(row) for row in rows]
        found = _attend(q_BHND, k_BKND, v_BKND, str(pattern), *tables, factor, impl, layer)
    return found if return_lse else found[0]


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
    out, lse = _now(q, k, v, pattern, rows, {"scale": scale, "impl": impl, "layer": layer})
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
    how = {"scale": scale, "impl": impl, "layer": layer}
    stream = torch.cuda.current_stream(q.device) if q.is_cuda else None

    def work() -> list[Tensor]:
        with torch.cuda.stream(stream):
            leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
            found = _now(leaves[0], leaves[1], leaves[2], pattern, rows, how)
            return [x.contiguous() for x in torch.autograd.grad(found, leaves, (dout, dlse))]

    # Inside an operator the dispatcher passes autograd by, and what is not recorded would be
    # missing in the gradients. A new thread starts with everything switched on.
    with ThreadPoolExecutor(1) as thread:
        dq, dk, dv = thread.submit(work).result()
    return dq, dk, dv


@_attend_backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _now(q, k, v, pattern, rows, how) -> tuple[Tensor, Tensor]:
    from longspan.ops.attend import attend

    names = ("positions", "segments", "key_positions", "key_segments")
    given: dict[str, Any] = dict(zip(names, rows, strict=True))
    return attend(q, k, v, pattern, **given, **how, return_lse=True)


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.pattern, *rows, scale, impl, layer = inputs
    ctx.save_for_backward(q, k, v, *rows)
    ctx.how = (scale, impl, layer)


def _backward(ctx, dout, dlse):
    q, k, v, *rows = ctx.saved_tensors
    grads = _attend_backward(dout, dlse, q, k, v, ctx.pattern, *rows, *ctx.how)
    return *grads, *(None for _ in range(8))


_attend.register_autograd(_backward, setup_context=_keep)
