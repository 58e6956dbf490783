"""Hopper's own instructions over key ranges: ``cudnn.flex_attention`` of the cuDNN frontend.

A kernel of the FlashAttention-3 kind (Shah et al., arXiv 2407.08608: a warp group loads, two
multiply, softmax hides behind the products) that walks lists of tiles. It takes ranges as they
are (see ``_cudnn_plan``), so a new pattern is a new plan of a few milliseconds and never a new
compilation. Heads may differ, heads may be grouped, batch rows may differ (packed documents).

Forward 4 D flops per visited pair, backward 10 D; memory O(N D), the endpoints, and the masks of
tiles that are partly visible.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.capability import Halves, needs_grad
from longspan.ops.empty import Index, clear, harmless, index_of
from longspan.ops.kernels._cudnn_plan import (
    MOST_ENDPOINTS,
    MOST_WORDS,
    empty_rows,
    endpoint_count,
    last_queries_first,
    mask_words,
    plan_of,
)
from longspan.ops.libraries import NO_CUDNN, aligned, why_missing
from longspan.ops.once import once
from longspan.ops.ranges import KeyRanges

DTYPES = (torch.bfloat16, torch.float16)
CAPABILITIES = ((9, 0), (10, 0), (10, 3))
# Besides all pairs of multiples of 8 up to 128.
WIDE = ((192, 128), (256, 256))


def reasons(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges) -> list[str]:
    """Why this kernel cannot take the given tensors, one sentence each; empty where it can."""
    found = []
    device = q_BHND.device
    if device.type != "cuda":
        return [f"cudnn needs CUDA tensors, got {device}"]
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        found.append(
            f"cudnn is written for compute capability 9.0 (Hopper), 10.0 and 10.3, this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    if q_BHND.dtype not in DTYPES:
        found.append(f"cudnn computes bfloat16 and float16, got {q_BHND.dtype}")
    found += _width_reasons(q_BHND, k_BKMD, v_BKMD, capability)
    if not found and (missing := missing_stack()):
        found.append(missing)
    if not found:
        batch, heads = q_BHND.shape[:2]
        if endpoint_count(ranges, batch, heads) >= MOST_ENDPOINTS:
            found.append("the ranges have more than 2**31 endpoints, which cudnn counts in int32")
        # Nothing can be wrong where all tiles together hold few words.
        area = batch * heads * (ranges.queries + 128) * (ranges.keys + 128) // 32
        if area > MOST_WORDS and mask_words(ranges, batch, heads) > MOST_WORDS:
            found.append(
                "the partly visible tiles need more than 4 GiB of masks: the ranges begin and end "
                "at too many places"
            )
    return found


def _width_reasons(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, capability: tuple[int, int]
) -> list[str]:
    widths = (q_BHND.shape[-1], v_BKMD.shape[-1])
    if widths not in WIDE and any(width % 8 or width > 128 for width in widths):
        return [
            "cudnn takes head widths that are multiples of 8 up to 128, or 192 with values of "
            f"128, or 256; got {widths[0]} with values of {widths[1]}"
        ]
    if not needs_grad(q_BHND, k_BKMD, v_BKMD):
        return []
    if widths[0] != widths[1] and q_BHND.shape[1] != k_BKMD.shape[1]:
        return [
            "cudnn has gradients of grouped queries only where queries and values are equally "
            f"wide; got {widths[0]} and {widths[1]}"
        ]
    if widths == (256, 256) and capability != (9, 0):
        return ["cudnn has no gradient of the log-sum-exp at width 256 on this GPU"]
    return []


@functools.cache
def missing_stack() -> str | None:
    """What has to be installed, None if nothing."""
    return why_missing(
        "cudnn",
        lambda: importlib.import_module("cudnn.flex_attention"),
        NO_CUDNN,
        "cudnn.flex_attention does not load: it needs nvidia-cudnn-frontend 1.29 or newer with "
        "its CuTe packages, pip install 'longspan[cuda]'",
    )


# Under an outer torch.compile this is a graph break: plans are cached by identity, outside graphs.
@torch.compiler.disable
def cudnn(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D], bfloat16 or float16 on a GPU of ``CAPABILITIES``; D a
            multiple of 8 up to 128, 192 or 256.
        k_BKMD: keys [B, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
        v_BKMD: values [B, K, M, Dv].
        ranges: visible keys, on the device of ``q``.
        scale: factor on the logits.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, and natural-log lse [B, H, N] in float32. Both are
        differentiable, once.

    Raises:
        Refusal: ``reasons`` has one.
    """
    ready = _ready(q_BHND, k_BKMD, v_BKMD, ranges, backward=needs_grad(q_BHND, k_BKMD, v_BKMD))
    rows = (_laid(x) for x in (q_BHND, k_BKMD, v_BKMD))
    out_BNHD, lse_BHN = _Attend.apply(*rows, ready, scale)
    return out_BNHD.transpose(1, 2), lse_BHN


def cudnn_halves(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> Halves:
    """The same, with gradients, as a forward and a backward of their own.

    Raises:
        Refusal: ``reasons`` has one.
    """
    return _Halves(_ready(q_BHND, k_BKMD, v_BKMD, ranges, backward=True), scale)


@dataclass(frozen=True, eq=False)
class _Ready:
    """A plan with what belongs to it.

    Attributes:
        plan: of the library.
        empty: the rows [B, H, N] that see no key; None if every one sees some.
        fixed: whether gradients are added up in a fixed order.
        calls: the library's kernels for this plan and tensors of some layouts.
    """

    plan: Any
    empty: Index | None
    fixed: bool
    calls: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def call(self, name: str, *tensors: Tensor | None, **options: Any) -> Any:
        """The library's kernel for tensors that lie in memory as these do, the last optional."""
        key = (name, *(None if x is None else (x.shape, x.stride()) for x in tensors))
        if key not in self.calls:
            *first, last = tensors
            build = getattr(importlib.import_module("cudnn.flex_attention"), name)
            made = build(*first, self.plan, last, **options)
            made.check_support()
            made.compile()
            self.calls[key] = _settled(made, *first[:3], self.plan)
        return self.calls[key]


def _settled(kernel: Any, *given: Any) -> Any:
    """The kernel with what it works out in every call worked out once.

    Its answer depends on the layout and the plan alone; a third of the time until it is launched.
    """
    if hasattr(kernel, "_prepare"):
        found = kernel._prepare(*given)
        kernel._prepare = lambda *_: found
    return kernel


def _ready(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, *, backward: bool
) -> _Ready:
    """The plan for these ranges and tensors."""
    batch, heads, _, width = q_BHND.shape
    fixed = torch.are_deterministic_algorithms_enabled()
    kind = (batch, heads, k_BKMD.shape, v_BKMD.shape, width, q_BHND.dtype, backward, fixed)

    def make(ends_HeN: Tensor) -> _Ready:
        if found := reasons(q_BHND, k_BKMD, v_BKMD, ranges):
            raise Refusal("cudnn cannot run here: " + "; ".join(found))
        create = importlib.import_module("cudnn.flex_attention").create_mask_plan
        rows = (_laid(x) for x in (q_BHND, k_BKMD, v_BKMD))
        made = create(ends_HeN, *rows, build_backward=backward)
        if backward and not fixed:
            last_queries_first(made)
        return _Ready(made, index_of(empty_rows(ends_HeN, batch)), fixed)

    return plan_of(ranges, (*kind, q_BHND.device), batch, make)


def _laid(x_BHND: Tensor) -> Tensor:
    """[B, N, H, D] as the library loads it."""
    return aligned(x_BHND.transpose(1, 2))


class _Attend(torch.autograd.Function):
    """The two kernels of the library for a pass that stands alone."""

    @staticmethod
    def forward(
        ctx: Any, q_BNHD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor, ready: _Ready, scale: float
    ) -> tuple[Tensor, Tensor]:
        out_BNHD, lse_BHN = _forward(ready, q_BNHD, k_BMKD, v_BMKD, scale)
        ctx.save_for_backward(q_BNHD, k_BMKD, v_BMKD, out_BNHD, lse_BHN)
        ctx.ready, ctx.scale = ready, scale
        ctx.set_materialize_grads(False)
        return out_BNHD, lse_BHN

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout_BNHD: Tensor | None, dlse_BHN: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q_BNHD, k_BMKD, v_BMKD, out_BNHD, lse_BHN = ctx.saved_tensors
        dout_BHND = None if dout_BNHD is None else dout_BNHD.transpose(1, 2)
        slopes = harmless(ctx.ready.empty, lse_BHN, dout_BHND, dlse_BHN)
        grads = _backward(ctx.ready, (q_BNHD, k_BMKD, v_BMKD, out_BNHD), *slopes, ctx.scale)
        return *grads, None, None


@dataclass(frozen=True, eq=False)
class _Halves:
    """The two kernels of the library for a pass among others."""

    ready: _Ready
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out_BNHD, lse_BHN = _forward(self.ready, _laid(q), _laid(k), _laid(v), self.scale)
        return out_BNHD.transpose(1, 2), lse_BHN

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        rows = (_laid(q), _laid(k), _laid(v), _laid(out))
        grads = _backward(self.ready, rows, lse.contiguous(), dout, dlse, self.scale)
        return tuple(None if x is None else x.transpose(1, 2) for x in grads)


def _forward(
    ready: _Ready, q_BNHD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output, laid out in memory as the queries, and log-sum-exp [B, H, N].

    So what belongs to a view, as the rows of a remainder, comes back as one.
    """
    batch, rows, heads, width = q_BNHD.shape
    out_BNHD = torch.empty_like(q_BNHD)
    if v_BMKD.shape[3] != width:
        out_BNHD = q_BNHD.new_empty(batch, rows, heads, v_BMKD.shape[3])
    numbers = torch.promote_types(q_BNHD.dtype, torch.float32)
    lse_BHN = q_BNHD.new_empty(batch, heads, rows, dtype=numbers)
    given = (q_BNHD, k_BMKD, v_BMKD, out_BNHD)
    _run(ready.call("FlexAttentionFwd", *given, lse_BHN), *given, ready.plan, lse_BHN, scale)
    clear(out_BNHD.transpose(1, 2), lse_BHN, ready.empty)
    return out_BNHD, lse_BHN


def _backward(
    ready: _Ready,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    lse_BHN: Tensor,
    dout_BHND: Tensor | None,
    dlse_BHN: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of queries, keys and values, laid out in memory as these are.

    Args:
        ready: the plan.
        rows: queries, keys, values and output, [B, N, H, D] as the library loads them.
        lse_BHN: finite, as all that follows; with the output it may be that of more keys.
        dout_BHND: of any layout; None for 0.
        dlse_BHN: of any layout; None for 0.
        scale: factor on the logits.
    """
    dout_BNHD = torch.zeros_like(rows[3]) if dout_BHND is None else _laid(dout_BHND)
    dlse_BHN = None if dlse_BHN is None else aligned(dlse_BHN)
    dq_BNHD, dk_BMKD, dv_BMKD = (torch.empty_like(x) for x in rows[:3])
    given = (*rows, dout_BNHD, lse_BHN, dq_BNHD, dk_BMKD, dv_BMKD)
    kernel = ready.call("FlexAttentionBwd", *given, dlse_BHN, deterministic=ready.fixed)
    _run(kernel, *given, ready.plan, dlse_BHN, scale)
    # The log-sum-exp does not depend on the values.
    return dq_BNHD, dk_BMKD, None if dout_BHND is None else dv_BMKD


def _run(kernel: Any, *given: Any) -> None:
    """Run a kernel of the library; its scratch lives as long as the call."""
    *tensors, scale = given
    device = tensors[0].device
    scratch = torch.empty(kernel.workspace_size, dtype=torch.uint8, device=device)
    kernel.execute(*tensors, workspace=scratch, softmax_scale=scale)
