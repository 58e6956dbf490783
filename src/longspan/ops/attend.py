"""``attend``: attention over a pattern, the one operation everything else is built on.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j over the keys that the pattern allows i

The pattern becomes a plan (cached), the plan tensors on the device (cached with it), a kernel
computes each pass in its order of rows, and passes are merged by log-sum-exp. O(pairs of the
pattern) time, O(N) extra memory.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longspan.errors import InputError, PatternError, Refusal
from longspan.ops.capability import (
    Known,
    choose,
    choose_together,
    in_order,
    needs_grad,
    transforming,
)
from longspan.ops.compiled import attend_compiled
from longspan.ops.inputs import (
    autocast,
    check_batch,
    check_tensors,
    factor_of,
    on_cpu,
    without_gradient,
)
from longspan.ops.loading import load
from longspan.ops.measured import Rates
from longspan.ops.merge import merge_parts
from longspan.ops.run import as_computed, calls_apart, compute, in_place
from longspan.ops.suited import suited
from longspan.pattern import Pattern, parse
from longspan.pattern.algebra import whole
from longspan.planning import Plan, plan
from longspan.planning.layout import table


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | str,
    *,
    positions: Any = None,
    segments: Any = None,
    key_positions: Any = None,
    key_segments: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    layer: int = 0,
) -> Any:
    """Attention of each query over the keys that a pattern allows it.

    Under ``torch.autocast`` inputs are cast as those of torch's own attention are. A compiler
    takes it as one operator, with patterns in text form or made outside; at a plan, and where
    forward-mode derivatives are taken, the graph breaks. Under ``torch.func`` (vmap, grad, jvp)
    and ``forward_ad`` ``"auto"`` takes the dense ``reference``. For ``torch.cuda.graph`` call it
    once before, as plans are made on the host; the plan of a recorded call is kept for good.

    Rows that take no part, such as padding, may hold NaN on a CPU. Elsewhere NaN and infinity may
    reach queries that do not see them: kernels multiply tiles of keys, hidden ones by 0.

    Args:
        q: queries [B, H, N, D]; float64, float32, bfloat16 or float16, any device.
        k: keys [B, K, M, D]; K divides H (grouped queries), query head h reads key head ``h // (H
            // K)``.
        v: values [B, K, M, Dv].
        pattern: where each query may look: a pattern, its text form, or a plan made before.
        positions: whole numbers [N] or [B, N], the place of each query in its segment; default:
            counted inside each segment; with N < M the queries are the last rows.
        segments: whole numbers [N] or [B, N]; rows see only their own segment (packed documents),
            and a negative number marks padding, whose output is 0.
        key_positions: the same for keys, [M] or [B, M].
        key_segments: the same for keys, [M] or [B, M].
        scale: factor on the logits, a number; default ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the logits.
        impl: kernel name, or ``"auto"``. A named kernel never falls back to another.
        layer: for patterns that differ between layers.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``; with ``return_lse`` also lse [B, H, N], float32
        (float64 for float64). Both are differentiable. A query without keys gives 0 and -inf; a
        causal pattern that would leave a query without keys keeps the query's own position.

    Raises:
        InputError: if shapes, dtypes or devices do not fit, or ``scale`` is no finite number.
        PatternError: if the pattern does not parse or does not fit the heads.
        PlanError: if positions or segments do not fit.
        Refusal: if a named kernel cannot do it.
    """
    without_gradient(scale)
    q, k, v = autocast(q, k, v)
    rows = (positions, segments, key_positions, key_segments)
    if torch.compiler.is_compiling():
        return attend_compiled(q, k, v, pattern, rows, scale, return_lse, impl, layer)
    out, lse = attend_now(q, k, v, pattern, rows, scale, impl, layer, return_lse=return_lse)
    return (out, lse) if return_lse else out


def attend_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | str,
    rows: tuple[Any, Any, Any, Any],
    scale: float | None,
    impl: str,
    layer: int,
    *,
    return_lse: bool = True,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``attend`` computes, outside of compilers and autocast; see there for the arguments.

    Args:
        rows: positions and segments of queries, then of keys.
        known: out and lse of a call before, where gradients alone are wanted: most kernels then
            compute no forward.

    Returns:
        out and lse, the latter in any order if it is not returned.
    """
    check_tensors(q, k, v)
    factor = factor_of(scale, q.shape[-1])
    laid = _plan(q, k, pattern, rows, layer)
    _check_transforms(laid)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        _recorded.add(laid)
    # A single pass needs no joining.
    use_lse = return_lse or len(laid.passes) > 1
    parts = compute(laid.passes, q, k, v, impl, factor, use_lse=use_lse, known=known)
    return merge_parts(parts, use_lse=use_lse, overwrite=True)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Plan | str,
    *,
    positions: Any = None,
    segments: Any = None,
    key_positions: Any = None,
    key_segments: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    layer: int = 0,
) -> str:
    """Say what ``attend`` would do: the plan, the kernel, and why not the others.

    Takes and raises what ``attend`` does, and computes nothing.
    """
    q, k, v = autocast(q, k, v)
    check_tensors(q, k, v)
    factor_of(scale, q.shape[-1])
    laid = _plan(q, k, pattern, (positions, segments, key_positions, key_segments), layer)
    use_lse = return_lse or len(laid.passes) > 1
    lines = [str(laid)]
    calls = calls_apart(laid.passes, q, k) or ()
    # As every kernel may have them, and as the one that computes them does.
    named = [(f"{one}", one, one) for one in calls] or [
        (_numbered(which), load(one, q, k), suited(one, q, k, v, impl, use_lse=use_lse))
        for which, one in as_computed(laid.passes, q, k, v, impl, use_lse=use_lse)
    ]
    given, best = [], []
    for _, plain, suited_one in named:
        given.append((*plain.inputs(q, k, v), plain.ranges))
        # Rows are gathered once where both are the same.
        same = suited_one is plain
        best.append(given[-1] if same else (*suited_one.inputs(q, k, v), suited_one.ranges))
    if len(best) > 1 and not calls and needs_grad(q, k, v):
        picked, together = choose_together(impl, best)
        if together is not None:
            said = ", ".join(f"{name} {rate:.0f}" for name, rate in together.tflops.items())
            lines.append(
                f"passes with one backward: measured on {together.gpu}: {together.case}, "
                f"TFLOP/s: {said}"
            )
    else:
        whole = in_place(laid.passes, q, k, v, impl, use_lse=use_lse)
        picked = [whole or choose(impl, *own, use_lse=use_lse) for own in best]
    for (name, *_), own, chosen in zip(named, given, picked, strict=True):
        kernels, measured = in_order(*own)
        lines.append(f"{name}: kernel {chosen.name}: {chosen.note}")
        if measured is not None:
            lines.append(f"  measured on {measured.gpu}: {measured.case}")
            if said := _rate(measured, chosen.name):
                lines.append(f"  {chosen.name}: {said}")
        for kernel in kernels:
            if kernel is chosen:
                continue
            why = "; ".join(kernel.reasons(*own, use_lse=use_lse))
            if not why and measured is not None and (said := _rate(measured, kernel.name)):
                why = f"possible, {said}"
            if not why and not kernel.worth(*own):
                why = "possible, slower for so few queries"
            lines.append(f"  not {kernel.name}: {why or 'possible, comes later in the order'}")
    return "\n".join(lines)


def _numbered(which: tuple[int, ...]) -> str:
    """Passes of a plan that are computed together, by their numbers."""
    if len(which) == 1:
        return f"pass {which[0]}"
    return f"passes {', '.join(map(str, which[:-1]))} and {which[-1]} as one"


def _rate(measured: Rates, kernel: str) -> str:
    """What is known of a kernel, empty if nothing."""
    if kernel in measured.tflops:
        return f"{measured.tflops[kernel]:.0f} TFLOP/s there"
    if kernel in measured.elsewhere:
        return f"{measured.elsewhere[kernel]:.0f} TFLOP/s on the nearest case that it has"
    return ""


# Plans that graphs of a GPU read when they are played again.
_recorded: set[Plan] = set()

# Plans of a plain call are kept: a training loop asks for the same one in every layer and step.
_cached_plan = lru_cache(maxsize=32)(plan)
_parsed = lru_cache(maxsize=256)(parse)


def _plan(
    q: Tensor, k: Tensor, pattern: Pattern | Plan | str, rows: tuple[Any, ...], layer: int
) -> Plan:
    heads, n, keys = q.shape[1], q.shape[2], k.shape[2]
    if isinstance(pattern, Plan):
        if any(row is not None for row in rows):
            raise InputError("a plan already holds positions and segments: give them to plan(...)")
        if layer:
            raise InputError(
                f"a plan is that of one layer, got layer={layer!r} beside it: give it to plan(...)"
            )
        if (pattern.heads, pattern.n, pattern.keys) != (heads, n, keys):
            raise InputError(
                f"the plan is for {pattern.heads} heads, {pattern.n} queries and {pattern.keys} "
                f"keys, the tensors have {heads}, {n} and {keys}"
            )
        laid = pattern
    else:
        if isinstance(pattern, str):
            pattern = _parsed(pattern)
        # Before the plans that are kept, which ask for a hash.
        if not isinstance(pattern, Pattern):
            raise PatternError(
                f"expected a pattern, its text form or a plan, got {pattern!r} "
                f"({type(pattern).__name__})"
            )
        layer = whole("attention", "layer", layer, 0)
        # Under torch.func rows have to stay in place.
        orders = 1 if transforming() else "auto"
        if all(row is None for row in rows):
            return _cached_plan(pattern, n, heads, keys=keys, layer=layer, orders=orders)
        names = ("positions", "segments", "key_positions", "key_segments")
        lengths = (n, n, keys, keys)
        tables: dict[str, Any] = {
            name: table(name, on_cpu(name, row), length)
            for name, row, length in zip(names, rows, lengths, strict=True)
        }
        # A plan of equal rows has a single one: what was given tells more.
        for one in tables.values():
            check_batch(1 if one is None else len(one), q)
        laid = plan(pattern, n, heads, keys=keys, layer=layer, orders=orders, **tables)
    check_batch(laid.batch, q)
    return laid


def _check_transforms(laid: Plan) -> None:
    if not transforming():
        return
    for one in laid.passes:
        if one.key_order is not None or one.query_order is not None:
            raise Refusal(
                f"{laid.pattern} was laid out with rows in another order, and gathering them has "
                "a backward of its own, through which torch.func (vmap, grad, jvp) and forward_ad "
                "do not go; call attend without them (more batch rows for vmap, .backward() for "
                "grad), or give the pattern in place of a plan"
            )
