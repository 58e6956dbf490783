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
import importlib.util
from typing import Any

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.capability import needs_grad
from longspan.ops.kernels._cudnn_plan import (
    MOST_ENDPOINTS,
    MOST_WORDS,
    empty_rows,
    endpoint_count,
    last_queries_first,
    mask_words,
    plan_of,
)
from longspan.ops.libraries import aligned
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
    if importlib.util.find_spec("cudnn") is None:
        return "the package nvidia-cudnn-frontend is not installed: pip install 'longspan[cuda]'"
    try:
        importlib.import_module("cudnn.flex_attention")
    # Whatever the stack of compilers and drivers below raises, the sentence for people is this.
    except Exception as error:
        return (
            "cudnn.flex_attention does not load: it needs nvidia-cudnn-frontend 1.29 or newer "
            f"with its CuTe packages, pip install 'longspan[cuda]' ({error})"
        )
    return None


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
    backward = needs_grad(q_BHND, k_BKMD, v_BKMD)
    batch, heads, _, width = q_BHND.shape
    fixed = torch.are_deterministic_algorithms_enabled()
    kind = (batch, heads, k_BKMD.shape, v_BKMD.shape, width, q_BHND.dtype, backward, fixed)
    q_BNHD, k_BMKD, v_BMKD = (aligned(x.transpose(1, 2)) for x in (q_BHND, k_BKMD, v_BKMD))

    def make(ends_HeN: Tensor) -> Any:
        if found := reasons(q_BHND, k_BKMD, v_BKMD, ranges):
            raise Refusal("cudnn cannot run here: " + "; ".join(found))
        create = importlib.import_module("cudnn.flex_attention").create_mask_plan
        made = create(ends_HeN, q_BNHD, k_BMKD, v_BMKD, build_backward=backward)
        if backward and not fixed:
            last_queries_first(made)
        return made, empty_rows(ends_HeN, batch)

    plan, empty_BHN = plan_of(ranges, (*kind, q_BHND.device), batch, make)
    attend = importlib.import_module("cudnn.flex_attention").flex_attn_func
    out_BNHD, lse_BHN = attend(
        q_BNHD,
        k_BMKD,
        v_BMKD,
        mask_plan=plan,
        softmax_scale=scale,
        deterministic=fixed,
        return_lse=True,
    )
    if empty_BHN is not None:
        # In place, unseen by autograd: a copy of the output would take as long as a short kernel.
        out_BNHD.data.masked_fill_(empty_BHN.transpose(1, 2)[..., None], 0.0)
    if backward:
        out_BNHD, lse_BHN = _CleanGradients.apply(out_BNHD, lse_BHN, empty_BHN)
    if empty_BHN is not None:
        lse_BHN = lse_BHN.masked_fill(empty_BHN, -torch.inf)
    return out_BNHD.transpose(1, 2), lse_BHN


class _CleanGradients(torch.autograd.Function):
    """Nothing forward; backward lays out gradients, which sums broadcast, as the kernel needs.

    A NaN in the incoming gradient of a row without keys must not spread: it is set to 0.
    """

    @staticmethod
    def forward(
        ctx: Any, out_BNHD: Tensor, lse_BHN: Tensor, empty_BHN: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.empty_BHN = empty_BHN
        ctx.set_materialize_grads(False)
        return out_BNHD.view_as(out_BNHD), lse_BHN.view_as(lse_BHN)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout_BNHD: Tensor | None, dlse_BHN: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.empty_BHN is not None and dout_BNHD is not None:
            empty_BNH1 = ctx.empty_BHN.transpose(1, 2)[..., None]
            dout_BNHD = torch.where(empty_BNH1, 0.0, dout_BNHD)
        return (
            None if dout_BNHD is None else aligned(dout_BNHD),
            None if dlse_BHN is None else aligned(dlse_BHN),
            None,
        )
