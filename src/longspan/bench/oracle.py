"""Compare what a kernel gives with dense attention in higher precision, before it is timed.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from longspan.ops import attend
from longspan.planning import Plan
from longspan.planning.passes import Pass

# Relative to the norm of the exact result.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 1e-2,
}
# A gradient of this share of that of v is 0 but for rounding, by the oracle's dtype.
_VANISHED = {torch.float64: 1e-12, torch.float32: 1e-6}
NAMES = ("out", "lse", "dq", "dk", "dv")

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN stays NaN."""
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def errors(
    ours: Attend, theirs: Attend, inputs: Sequence[Tensor], *, use_lse: bool = True
) -> dict[str, float]:
    """Relative errors of output, log-sum-exp and the gradients.

    Args:
        ours: what is tested, from q, k and v.
        theirs: the oracle; it gets them in float32, or float64 on a CPU.
        inputs: q [B, H, N, D], k and v [B, K, M, D].
        use_lse: send gradients through the log-sum-exp too.
    """
    exact = torch.float64 if inputs[0].device.type == "cpu" else torch.float32
    leaves = [x.detach().requires_grad_() for x in inputs]
    sharp = [x.detach().to(exact).requires_grad_() for x in inputs]
    given, expected = ours(*leaves), theirs(*sharp)
    seen = expected[1] > -torch.inf
    make = torch.Generator(inputs[0].device).manual_seed(1)
    slopes = [torch.randn(x.shape, generator=make, device=x.device) for x in expected]
    if not (given[1][~seen] == -torch.inf).all():
        return dict.fromkeys(NAMES, float("nan"))

    def gradients(results: tuple[Tensor, Tensor], of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        out, lse = results
        ends, starts = [out], [slopes[0].to(out.dtype)]
        if use_lse:
            ends, starts = [out, lse], [*starts, slopes[1].masked_fill(~seen, 0.0).to(lse.dtype)]
        return torch.autograd.grad(ends, of, starts)

    sides = [
        (out, lse.masked_fill(~seen, 0.0), *gradients((out, lse), of))
        for (out, lse), of in ((given, leaves), (expected, sharp))
    ]
    found = {name: relative(a, b) for name, a, b in zip(NAMES, *sides, strict=True)}
    exactly = dict(zip(NAMES, sides[1], strict=True))
    unit = exactly["dv"].double().norm()
    for name, value in zip(NAMES, sides[0], strict=True):
        # One key a row has the weight 1 whatever q and k are: their gradients are no more than
        # rounding on both sides, and their quotient says nothing.
        if name in ("dq", "dk") and exactly[name].double().norm() <= _VANISHED[exact] * unit:
            found[name] = ((value.double() - exactly[name].double()).norm() / unit).item()
    return found


def reference(plan: Plan, scale: float) -> Attend:
    """Dense masked attention over a plan: O(N M) memory for each head."""
    return lambda q, k, v: attend(q, k, v, plan, impl="reference", scale=scale, return_lse=True)


def beside(call: Callable[[Tensor, Tensor, Tensor], Tensor], theirs: Attend) -> Attend:
    """A call that gives no log-sum-exp, with the oracle's, so that only the rest is compared."""

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = call(q, k, v)
        with torch.no_grad():
            return out, theirs(*(x.float() for x in (q, k, v)))[1]

    return both


def wrong(found: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """The errors beyond the tolerance of a dtype; NaN is one."""
    return {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]}


def row_error(
    plan: Plan, inputs: Sequence[Tensor], out_BHND: Tensor, rows: Sequence[int]
) -> float:
    """Relative error of some rows of an output, where the whole oracle would not fit.

    Collects the keys of each row from the ranges of all passes, and computes them in float32.
    """

    def keys(head: int, row: int) -> Tensor:
        found = [key for part in plan.passes for key in _keys(part, head, row, plan.keys)]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device="cpu")

    return row_error_over(keys, inputs, out_BHND, rows)


def row_error_over(
    keys: Callable[[int, int], Tensor],
    inputs: Sequence[Tensor],
    out_BHND: Tensor,
    rows: Sequence[int],
) -> float:
    """The same, where ``keys`` says which ones a head and row sees."""
    q, k, v = (x.detach() for x in inputs)
    group = q.shape[1] // k.shape[1]
    given, expected = [], []
    for row in rows:
        for head in range(q.shape[1]):
            at = keys(head, row).to(q.device)
            logits = k[0, head // group, at].float() @ q[0, head, row].float()
            weight = (logits * q.shape[-1] ** -0.5).softmax(0)
            expected.append(weight @ v[0, head // group, at].float())
            given.append(out_BHND[0, head, row].float())
    return relative(torch.stack(given), torch.stack(expected))


def _keys(part: Pass, head: int, row: int, keys: int) -> list[Tensor]:
    """Key rows that a query row sees in a pass, range by range."""
    own = part.head_class[head]
    place = row
    if part.query_order is not None:
        table = part.query_order[0]
        found = np.flatnonzero(table[own % len(table)] == row)
        if len(found) == 0:
            return []
        place = int(found[0])
    order = part.keys(0, keys)
    ranges = zip(part.lo[0, own, place], part.hi[0, own, place], strict=True)
    return [torch.from_numpy(order[a:b].copy()) for a, b in ranges if a < b]
