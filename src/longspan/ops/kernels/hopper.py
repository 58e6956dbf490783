"""Key ranges on NVIDIA Hopper by a kernel of our own, written in Gluon, which comes with Triton.

Of the FlashAttention-3 kind (Shah et al., arXiv 2407.08608), for short rows: persistent programs
that load the next task while they write the last one (see ``_hopper_forward``), over tiles of keys
that begin where the ranges do (see ``_hopper_plan``). What is compiled depends on dtype and width,
and on two properties of a plan: a new pattern is a plan of a few milliseconds. A few queries that
see very many keys are computed by parts of the keys (see ``_hopper_parts``), whose outputs are
rounded to the dtype of the queries before they are joined, and heads stand as rows there (see
``_hopper_rows``).

4 D flops for each pair of a tile that is visited, 10 D in the backward (see ``_hopper_backward``);
memory O(N D), the bounds and the lists of tiles, keys and values that lie behind those that are
given (see ``MoreKeys``), with their gradients, and in the backward 4 N D bytes for each head, and
8 M D for each key head whose keys many queries see. Where keys are split, an output and a
log-sum-exp for each part, 32 at most and on fewer than 132 tiles of queries.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.capability import PlacedHalves, looks, needs_grad
from longspan.ops.empty import empty_rows, harmless
from longspan.ops.kernels._hopper_back_plan import back_plan_of, most_entries
from longspan.ops.kernels._hopper_calls import Ready, backward_kernels, forward_kernels
from longspan.ops.kernels._hopper_plan import (
    MOST_PLANES,
    MOST_TASKS,
    MOST_TILES,
    most_tiles,
    plan_of,
)
from longspan.ops.kernels._hopper_rows import HeadsAsRows, heads_as_rows
from longspan.ops.kernels._hopper_tasks import TILE
from longspan.ops.libraries import why_missing
from longspan.ops.once import once
from longspan.ops.ranges import KeyRanges

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
# The first row of the task that says that there are no more.
MOST_ROWS = 1 << 30
_kept: WeakKeyDictionary[KeyRanges, dict[tuple[object, ...], Ready | HeadsAsRows]] = (
    WeakKeyDictionary()
)


def reasons(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges) -> list[str]:
    """Why this kernel cannot take the given tensors, one sentence each; empty where it can."""
    device = q_BHND.device
    if device.type != "cuda":
        return [f"hopper needs CUDA tensors, got {device}"]
    found = []
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip:
        found.append("hopper is written for GPUs of NVIDIA")
    elif capability != CAPABILITY:
        found.append(
            f"hopper is written for compute capability 9.0 (Hopper), this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    if q_BHND.dtype not in DTYPES:
        found.append(f"hopper computes bfloat16 and float16, got {q_BHND.dtype}")
    found += _shape_reasons(q_BHND, k_BKMD, v_BKMD, ranges.key_rows)
    backward = needs_grad(q_BHND, k_BKMD, v_BKMD)
    if backward and torch.are_deterministic_algorithms_enabled():
        found.append(
            "hopper adds gradients of queries up in any order, not deterministically, and "
            "torch.use_deterministic_algorithms is on"
        )
    if not found and (missing := missing_gluon()):
        found.append(missing)
    # Counted only where it matters: it may take a look at all ranges.
    return found or _range_reasons(q_BHND, k_BKMD, ranges, backward=backward)


def _shape_reasons(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, key_rows: int) -> list[str]:
    found = []
    widths = (q_BHND.shape[-1], v_BKMD.shape[-1])
    if any(width % 8 or not 0 < width <= 128 for width in widths):
        found.append(
            f"hopper takes head widths that are multiples of 8 up to 128; got {widths[0]} with "
            f"values of {widths[1]}"
        )
    if 0 in (*q_BHND.shape[:3], *k_BKMD.shape[:3]):
        found.append(
            "hopper takes at least one query and one key; got "
            f"{q_BHND.shape[2]} and {k_BKMD.shape[2]}"
        )
    if q_BHND.shape[2] >= MOST_ROWS:
        found.append(f"hopper takes fewer than 2**30 queries; got {q_BHND.shape[2]:,}")
    batch, *others = (x.shape[0] for x in (q_BHND, k_BKMD, v_BKMD))
    # Rows that are not there would be read as zeros.
    if key_rows > 1:
        if others != [key_rows, key_rows] or k_BKMD.shape[2] % TILE:
            found.append(
                f"hopper takes keys and values of {key_rows} batch rows in turn, with a multiple "
                f"of {TILE} keys in each; got {others[0]} and {others[1]} with {k_BKMD.shape[2]}"
            )
    elif others not in ([batch, batch], [1, 1]):
        found.append(
            "hopper takes keys and values of as many batch rows as queries, or both of one; got "
            f"{others[0]} and {others[1]} for {batch}"
        )
    return found


def _range_reasons(
    q_BHND: Tensor, k_BKMD: Tensor, ranges: KeyRanges, *, backward: bool
) -> list[str]:
    batch, heads, rows, _ = q_BHND.shape
    longest = max(rows, ranges.keys) if backward else rows
    if batch * heads * -(-longest // TILE) > MOST_TASKS:
        return [
            f"heads of all batch rows times rows of a head, here {batch * heads:,} times "
            f"{longest:,} rows, are more than 2**28 tasks of {TILE} rows"
        ]
    groups, _, count = ranges.lo_GNm.shape
    if groups * count >= MOST_PLANES:
        return [
            f"groups of heads times ranges of a query are 2**25 or more: {groups:,} times {count}"
        ]
    if most_tiles(ranges) > MOST_TILES:
        return ["the ranges touch more than 2**28 tiles of 128 x 128, whose list is too long"]
    if backward and most_entries(ranges) > MOST_TILES:
        return ["the ranges touch more than 2**28 tiles of 64 x 128, whose list is too long"]
    return []


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
        lambda: (forward_kernels(), backward_kernels()),
        "Triton is not installed: it comes with torch for CUDA",
        "hopper needs Gluon as in Triton 3.6 and newer, which comes with torch for CUDA",
    )


# Under an outer torch.compile this is a graph break: plans are cached by identity, outside graphs.
@torch.compiler.disable
def hopper(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D], bfloat16 or float16 on a Hopper GPU; D a multiple of 8 up to
            128.
        k_BKMD: keys [B or 1, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
            Or [r, K, M / r, D], M / r a multiple of 128, where ranges have ``key_rows`` r.
        v_BKMD: values with as many batch rows [B or 1, K, M, Dv], Dv as D.
        ranges: visible keys, on the device of ``q``; ``more`` may say which further keys they
            count behind those of ``k``.
        scale: factor on the logits.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, laid out in memory as ``q`` where it is as wide,
        and natural-log lse [B, H, N] in float32. Both are differentiable, once.

    Raises:
        Refusal: ``reasons`` has one.
    """
    backward = needs_grad(q_BHND, k_BKMD, v_BKMD)
    ready = _ready(q_BHND, k_BKMD, v_BKMD, ranges, scale, backward=backward)
    if not backward:
        return ready.forward(q_BHND, k_BKMD, v_BKMD)
    return _Attend.apply(q_BHND, k_BKMD, v_BKMD, ready)


def hopper_halves(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> PlacedHalves:
    """The same as a forward and, where gradients are wanted, a backward of their own.

    Raises:
        Refusal: ``reasons`` has one.
    """
    backward = needs_grad(q_BHND, k_BKMD, v_BKMD)
    return _ready(q_BHND, k_BKMD, v_BKMD, ranges, scale, backward=backward)


def _ready(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    ranges: KeyRanges,
    scale: float,
    *,
    backward: bool,
) -> Ready | HeadsAsRows:
    """The plans for these ranges and tensors, made once for such tensors."""
    inputs = q_BHND, k_BKMD, v_BKMD
    kept = _kept.setdefault(ranges, {})
    name = (scale, backward, *looks(*inputs))
    if name in kept:
        return kept[name]
    if found := reasons(*inputs, ranges):
        raise Refusal("hopper cannot run here: " + "; ".join(found))
    (batch, heads), key_heads = q_BHND.shape[:2], k_BKMD.shape[1]
    rows = heads_as_rows(ranges, heads, key_heads)
    if rows and max(most_tiles(rows), most_entries(rows)) <= MOST_TILES:
        ready = _planned(rows, (batch, key_heads), k_BKMD, v_BKMD, scale, backward=backward)
        # Training reads what is made here, whoever asks first.
        with torch.inference_mode(False):
            empty = empty_rows(ranges, batch) if backward else None
        made = HeadsAsRows(ready, heads // key_heads, empty)
    else:
        made = _planned(ranges, (batch, heads), k_BKMD, v_BKMD, scale, backward=backward)
    kept[name] = made
    return made


def _planned(
    ranges: KeyRanges,
    heads: tuple[int, ...],
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    scale: float,
    *,
    backward: bool,
) -> Ready:
    """Both kernels over ranges of the given batch rows and heads of queries, (B, H)."""
    length = k_BKMD.shape[2] if ranges.key_rows > 1 else None
    key_heads = 1 if length else k_BKMD.shape[0], k_BKMD.shape[1]
    row_bytes = sum(x.shape[3] * x.dtype.itemsize for x in (k_BKMD, v_BKMD))
    plan = plan_of(ranges, heads, key_heads, row_bytes, length)
    back = back_plan_of(ranges, heads, key_heads, length) if backward else None
    return Ready(plan, back, scale, length, ranges.more)


class _Attend(torch.autograd.Function):
    """Both kernels for a pass that stands alone."""

    @staticmethod
    def forward(
        ctx: Any, q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ready: Ready | HeadsAsRows
    ) -> tuple[Tensor, Tensor]:
        out_BHND, lse_BHN = ready.forward(q_BHND, k_BKMD, v_BKMD)
        ctx.save_for_backward(q_BHND, k_BKMD, v_BKMD, out_BHND, lse_BHN)
        ctx.ready = ready
        ctx.set_materialize_grads(False)
        return out_BHND, lse_BHN

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout_BHND: Tensor | None, dlse_BHN: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *rows, lse_BHN = ctx.saved_tensors
        slopes = harmless(ctx.ready.empty, lse_BHN, dout_BHND, dlse_BHN)
        return *ctx.ready.backward(*rows, *slopes), None
