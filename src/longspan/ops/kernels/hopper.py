"""Key ranges on NVIDIA Hopper by a kernel of our own, written in Gluon, which comes with Triton.

Of the FlashAttention-3 kind (Shah et al., arXiv 2407.08608), for short rows: persistent programs
that load the next task while they write the last one (see ``_hopper_forward``), over tiles of keys
that begin where the ranges do (see ``_hopper_plan``). What is compiled depends on dtype and width
alone, so that a new pattern is a new plan of a few milliseconds.

Forward only: 4 D flops for each pair of a tile that is visited; memory O(N D), the bounds and the
lists of tiles.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.capability import needs_grad
from longspan.ops.kernels._hopper_plan import (
    MOST_PLANES,
    MOST_TILES,
    HopperPlan,
    most_tiles,
    plan_of,
)
from longspan.ops.libraries import aligned, why_missing
from longspan.ops.ranges import KeyRanges

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
# What is compiled, and the tiles of keys and values that then fit into shared memory.
_PLACES = {64: 8, 128: 5}
_LOG2_E = 1.4426950408889634


def reasons(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges) -> list[str]:
    """Why this kernel cannot take the given tensors, one sentence each; empty where it can."""
    device = q_BHND.device
    if device.type != "cuda":
        return [f"hopper needs CUDA tensors, got {device}"]
    found = []
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        found.append(
            f"hopper is written for compute capability 9.0 (Hopper), this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    if q_BHND.dtype not in DTYPES:
        found.append(f"hopper computes bfloat16 and float16, got {q_BHND.dtype}")
    widths = (q_BHND.shape[-1], v_BKMD.shape[-1])
    if any(width % 8 or not 0 < width <= 128 for width in widths):
        found.append(
            f"hopper takes head widths that are multiples of 8 up to 128; got {widths[0]} with "
            f"values of {widths[1]}"
        )
    if 0 in (*q_BHND.shape, *k_BKMD.shape):
        found.append("hopper takes at least one query and one key")
    if needs_grad(q_BHND, k_BKMD, v_BKMD):
        found.append("hopper computes no gradients")
    if not found and (missing := missing_gluon()):
        found.append(missing)
    if ranges.lo_GNm[:, 0].numel() >= MOST_PLANES:
        found.append("groups of heads times ranges of a query are 2**25 or more")
    if not found and most_tiles(ranges) > MOST_TILES:
        found.append("the ranges touch more than 2**28 tiles of 128 x 128, whose list is too long")
    return found


def why_no_hopper() -> str | None:
    """What keeps a Hopper GPU of this machine from it; None if nothing, or if there is none."""
    every = range(torch.cuda.device_count())
    if any(torch.cuda.get_device_capability(device) == CAPABILITY for device in every):
        return missing_gluon()
    return None


@functools.cache
def missing_gluon() -> str | None:
    """What has to be installed, None if nothing."""
    return why_missing(
        "triton",
        _kernels,
        "Triton is not installed: it comes with torch for CUDA",
        "hopper needs Gluon as in Triton 3.6 and newer, which comes with torch for CUDA",
    )


def _kernels() -> Any:
    return importlib.import_module("longspan.ops.kernels._hopper_forward")


# Under an outer torch.compile this is a graph break: plans are cached by identity, outside graphs.
@torch.compiler.disable
def hopper(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D], bfloat16 or float16 on a Hopper GPU; D a multiple of 8 up to
            128.
        k_BKMD: keys [B, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
        v_BKMD: values [B, K, M, Dv], Dv as D.
        ranges: visible keys, on the device of ``q``.
        scale: factor on the logits.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, laid out in memory as ``q`` where it is as wide,
        and natural-log lse [B, H, N] in float32. Without gradients.

    Raises:
        Refusal: ``reasons`` has one.
    """
    if found := reasons(q_BHND, k_BKMD, v_BKMD, ranges):
        raise Refusal("hopper cannot run here: " + "; ".join(found))
    batch, heads = q_BHND.shape[:2]
    row_bytes = k_BKMD.shape[3] * k_BKMD.element_size() + v_BKMD.shape[3] * v_BKMD.element_size()
    plan = plan_of(ranges, batch, heads, k_BKMD.shape[1], row_bytes)
    if scale <= 0:
        # The greatest logit is found before the logits are scaled.
        q_BHND, scale = (-q_BHND, -scale) if scale else (torch.zeros_like(q_BHND), 1.0)
    return _forward(plan, aligned(q_BHND), aligned(k_BKMD), aligned(v_BKMD), scale)


def _forward(
    plan: HopperPlan, q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp. What belongs to a view, as the rows of a remainder, is one."""
    batch, heads, rows, width = q_BHND.shape
    out_BHND = torch.empty_like(q_BHND)
    if v_BKMD.shape[3] != width:
        out_BHND = q_BHND.new_empty(batch, heads, rows, v_BKMD.shape[3])
    lse_BHN = q_BHND.new_empty(batch, heads, rows, dtype=torch.float32)
    compiled = next(wide for wide in _PLACES if wide >= max(width, v_BKMD.shape[3]))
    device = q_BHND.device
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    tasks = len(plan.tasks_T8)
    with torch.cuda.device(device):
        _kernels().forward[(min(programs, tasks),)](
            _described(q_BHND, 64, compiled),
            _described(k_BKMD, 128, compiled),
            _described(v_BKMD, 128, compiled),
            _described(out_BHND, 64, compiled),
            lse_BHN,
            plan.tasks_T8,
            plan.entries_E2,
            plan.lo_PN,
            plan.hi_PN,
            tasks,
            rows,
            heads,
            heads // k_BKMD.shape[1],
            scale * _LOG2_E,
            _PLACES[compiled],
            compiled,
            num_warps=4,
        )
    return out_BHND, lse_BHN


def _described(x_BHND: Tensor, rows: int, width: int) -> Any:
    """A tensor for the unit that copies tiles."""
    gluon = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    language = importlib.import_module("triton.experimental.gluon.language")
    layout = language.NVMMASharedLayout(128, 16, 4)
    shape, strides = list(x_BHND.shape), list(x_BHND.stride())
    return gluon.TensorDescriptor(x_BHND, shape, strides, [1, 1, rows, width], layout)
