"""PyTorch FlexAttention over key ranges: the CUDA kernel that needs nothing but torch and Triton.

Dong et al., FlexAttention, arXiv 2412.05496. The kernel walks only the tiles (128 query rows x 128
key rows) that some range touches, and applies the mask only where a tile is not wholly visible.
Two things differ from the usual way to call it:

* The mask is *data*. One mask function reads the range bounds from tensors, so that a new
  pattern is a new tensor, not a new graph to compile. Graphs are kept per shape class;
  ``compilations()`` counts them.
* The tile lists are computed from the ranges instead of evaluating a mask N M times, and are as
  wide as the longest row needs instead of one column per tile (see ``_flex_tiles``).

Forward 4 D flops per visited pair, backward 14 D; memory O(N D) and the tile lists.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, G range groups,
m ranges per query; Z and Y are the batch rows and heads that differ in what they see, else 1.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo.mutation_guard import GenerationTracker
from torch.fx.experimental import _config as symbols
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from longspan.errors import Refusal
from longspan.ops.copies import copies_of
from longspan.ops.kernels._flex_tiles import TILE, TileLists, count_tiles, tile_lists
from longspan.ops.libraries import has_triton
from longspan.ops.ranges import KeyRanges

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below 16 Triton has no matrix product; above 256 the tiles outgrow the shared memory.
WIDTHS = range(16, 257)
# By head width, where these measured faster on an H200 than what torch chooses: up to a tenth at
# width 128, two to three times at 64 (forward) and a tenth (backward).
_HOPPER = {
    64: {
        "fwd_BLOCK_M": 64,
        "fwd_BLOCK_N": 64,
        "fwd_num_warps": 4,
        "fwd_num_stages": 3,
        "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 64,
        "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 64,
        "bwd_num_warps": 4,
        "bwd_num_stages": 3,
    },
    128: {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3},
}
# Lists are refused rather than allowed to crowd out the model. 2 GiB are enough for a million rows
# and 32 heads, each with its own window of 65,000 keys.
LIST_BYTES = 2 << 30

_Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Schedule:
    """Everything that the compiled function reads besides q, k and v."""

    tile: int
    # [G, m, N], so that the rows of a tile lie side by side.
    lo_GmN: Tensor
    hi_GmN: Tensor
    # int32 [B or 1, H]; None where all heads see the same keys.
    group_BH: Tensor | None
    lists: TileLists
    # bool [B or 1, H or 1, N]; None where every row sees a key.
    empty_BHN: Tensor | None
    # Whether both lengths are whole tiles: then they are compiled in, else they stay symbols.
    whole: bool
    # By shapes, strides and the like: the function, and whether all strides are dense.
    ready: dict[tuple[object, ...], tuple[_Attend, bool]] = field(default_factory=dict)


class _ShapeClass(NamedTuple):
    """What a compiled graph depends on: shapes and dtypes, never which keys are visible."""

    device: torch.device
    dtype: torch.dtype
    # Batch rows of queries and of keys, heads of queries and of keys.
    heads: tuple[int, int, int, int]
    widths: tuple[int, int]
    # (N, M) where both are whole tiles, else only whether N is one row or fewer than a tile.
    lengths: tuple[int | bool, int | bool]
    whole: bool
    ranges: int
    listed: tuple[int, int]
    group_rows: int
    tile: int
    scale: float
    orders: tuple[tuple[int, ...], ...]
    grads: tuple[bool, ...]


_schedules: WeakKeyDictionary[KeyRanges, _Schedule] = WeakKeyDictionary()
_fused: dict[_ShapeClass, _Attend] = {}
_compilations = 0


def reasons(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges) -> list[str]:
    """Why this kernel cannot take the given tensors, one sentence each; empty where it can.

    Counts the tiles of ``ranges`` once (and keeps the counts), if nothing else speaks against the
    kernel.
    """
    tensors = (q_BHND, k_BKMD, v_BKMD)
    devices = {x.device for x in (*tensors, ranges.lo_GNm, ranges.group_BH)}
    dtypes = {x.dtype for x in tensors}
    found = []
    if len(devices) > 1:
        found.append(f"q, k, v and the ranges lie on several devices: {sorted(map(str, devices))}")
    elif q_BHND.device.type != "cuda":
        found.append(f"flex needs CUDA tensors (elsewhere it cannot train), got {q_BHND.device}")
    elif torch.cuda.get_device_capability(q_BHND.device) < (8, 0):
        found.append("flex needs compute capability 8.0 or newer")
    if not has_triton():
        found.append("the package triton is not installed")
    if len(dtypes) > 1:
        found.append(f"q, k and v have different dtypes: {sorted(map(str, dtypes))}")
    elif q_BHND.dtype not in DTYPES:
        found.append(f"flex computes float32, bfloat16 and float16, got {q_BHND.dtype}")
    for name, width in (("q and k", q_BHND.shape[-1]), ("v", v_BKMD.shape[-1])):
        if width not in WIDTHS:
            found.append(
                f"the head width of {name} must be {WIDTHS[0]} to {WIDTHS[-1]}, got {width}"
            )
    if 0 in (*q_BHND.shape[:3], k_BKMD.shape[2], ranges.lo_GNm.shape[2]):
        found.append("there is no query, no key or no range")
    if not found:
        needed = count_tiles(ranges).list_bytes
        if needed > LIST_BYTES:
            found.append(
                f"the tile lists would take {needed / 2**30:.1f} GiB, the limit is "
                f"{LIST_BYTES >> 30} GiB: let more heads share a pattern or cut the sequence"
            )
    return found


def compilations() -> int:
    """Graphs compiled so far in this process: one per shape class, none for another pattern."""
    return _compilations


# Under an outer torch.compile this is a graph break: plans are cached by identity, outside graphs.
@torch.compiler.disable
def flex(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D], float32, bfloat16 or float16 on CUDA, 16 <= D <= 256.
        k_BKMD: keys [B or 1, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
        v_BKMD: values [B or 1, K, M, Dv], 16 <= Dv <= 256.
        ranges: visible keys, on the device of ``q``.
        scale: factor on the logits; part of the shape class.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, and natural-log lse [B, H, N] in float32. Both are
        differentiable.

    Raises:
        Refusal: ``reasons`` has one.
    """
    if torch.is_grad_enabled() and (k_BKMD.requires_grad or v_BKMD.requires_grad):
        copies = copies_of(ranges, q_BHND.shape[1], k_BKMD.shape[1])
        if copies is not None:
            ranges, k_BKMD, v_BKMD = copies.ranges, copies.take(k_BKMD), copies.take(v_BKMD)
    tensors = (q_BHND, k_BKMD, v_BKMD)
    signature = (
        *((x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors),
        torch.is_grad_enabled(),
        q_BHND.is_inference(),
        scale,
    )
    plan = _schedules.get(ranges)
    if plan is None or signature not in plan.ready:
        if found := reasons(q_BHND, k_BKMD, v_BKMD, ranges):
            raise Refusal("flex cannot run here: " + "; ".join(found))
        plan = _schedule(ranges)
        q, k, v = (_dense(x) for x in tensors)
        attend = _compiled(_shape_class(q, k, v, plan, scale))
        plan.ready[signature] = attend, all(map(operator.is_, (q, k, v), tensors))
    attend, dense = plan.ready[signature]
    if not dense:
        tensors = tuple(_dense(x) for x in tensors)
    if not plan.whole:
        # Marks stay on a tensor, so they go on views and not on what the caller passed.
        tensors = tuple(x.view_as(x) for x in tensors)
        for x in tensors:
            torch._dynamo.maybe_mark_dynamic(x, 2)
    # Equal sizes are no equal symbols: else lists of equal width now would tie those of the next
    # pattern.
    duck, symbols.use_duck_shape = symbols.use_duck_shape, False
    # A model compiled around this call runs its CUDA graphs in steps, and takes each call of
    # compiled code for the beginning of one: its tensors from before the call would be gone.
    step = GenerationTracker.generation
    try:
        out_BHND, lse_BHN = attend(*tensors, plan.lo_GmN, plan.hi_GmN, plan.group_BH, *plan.lists)
    finally:
        symbols.use_duck_shape = duck
        GenerationTracker.generation = step
    if plan.empty_BHN is not None:
        # Empty rows are 0 and -inf already; this keeps a NaN in the incoming gradient from
        # spreading.
        out_BHND = out_BHND.masked_fill(plan.empty_BHN[..., None], 0.0)
        lse_BHN = lse_BHN.masked_fill(plan.empty_BHN, -torch.inf)
    return out_BHND, lse_BHN


def walk(ranges: KeyRanges, lists: TileLists) -> None:
    """Visit some tiles of the given ranges instead of all that they touch, forward only.

    Args:
        ranges: visible keys within the tiles that are visited.
        lists: those tiles, for every batch row and head; the lists from key to query tiles may
            be empty.
    """
    _schedules[ranges] = _schedule_of(ranges, lists)


def _dense(x: Tensor) -> Tensor:
    # Strides then follow from shape and order, which name the shape class.
    return x if torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()


# A backward saves these, and tensors of inference mode cannot be saved.
@torch.inference_mode(False)
def _schedule(ranges: KeyRanges) -> _Schedule:
    if ranges not in _schedules:
        _schedules[ranges] = _schedule_of(ranges, tile_lists(ranges))
    return _schedules[ranges]


def _schedule_of(ranges: KeyRanges, lists: TileLists) -> _Schedule:
    counts = count_tiles(ranges)
    shared = counts.group_ZY.numel() == 1
    lo_GmN, hi_GmN = (_bounds(x) for x in (ranges.lo_GNm, ranges.hi_GNm))
    if shared:
        only = int(counts.group_ZY)
        lo_GmN, hi_GmN = lo_GmN[only : only + 1], hi_GmN[only : only + 1]
    empty_GN = ranges.empty_GN()
    whole = not (ranges.queries % counts.tile or ranges.keys % counts.tile)
    # Sizes that differ between patterns of one shape class must stay symbols.
    for x in lists:
        torch._dynamo.maybe_mark_dynamic(x, [] if whole else [2])
    for x in lists[1::2]:
        torch._dynamo.maybe_mark_dynamic(x, 3)
    for x in (lo_GmN, hi_GmN):
        torch._dynamo.maybe_mark_dynamic(x, ([] if shared else [0]) + ([] if whole else [2]))
    return _Schedule(
        tile=counts.tile,
        lo_GmN=lo_GmN,
        hi_GmN=hi_GmN,
        group_BH=None if shared else ranges.group_BH.int().contiguous(),
        lists=lists,
        empty_BHN=empty_GN[counts.group_ZY] if empty_GN.any() else None,
        whole=whole,
    )


def _bounds(x_GNm: Tensor) -> Tensor:
    """Bounds as the mask function reads them: [G, m, N], m rounded up to 1, 2, 3, 4, 8, 16, ..."""
    ranges = x_GNm.shape[2]
    rounded = ranges if ranges <= 4 else 1 << (ranges - 1).bit_length()
    return pad(x_GNm.mT, (0, 0, 0, rounded - ranges)).contiguous()


def _shape_class(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, plan: _Schedule, scale: float
) -> _ShapeClass:
    batch, heads, queries, width = q_BHND.shape
    keys = k_BKMD.shape[2]
    tensors = (q_BHND, k_BKMD, v_BKMD)
    return _ShapeClass(
        device=q_BHND.device,
        dtype=q_BHND.dtype,
        heads=(batch, len(k_BKMD), heads, k_BKMD.shape[1]),
        widths=(width, v_BKMD.shape[3]),
        lengths=(queries, keys) if plan.whole else (queries == 1, queries < TILE),
        whole=plan.whole,
        ranges=plan.lo_GmN.shape[1],
        listed=(plan.lists.kv_count.shape[0], plan.lists.kv_count.shape[1]),
        group_rows=0 if plan.group_BH is None else len(plan.group_BH),
        tile=plan.tile,
        scale=float(scale),
        orders=tuple(tuple(sorted(range(4), key=x.stride, reverse=True)) for x in tensors),
        grads=(
            torch.is_grad_enabled(),
            q_BHND.is_inference(),
            *(x.requires_grad for x in tensors),
        ),
    )


def _compiled(shape: _ShapeClass) -> _Attend:
    if shape not in _fused:
        _fused[shape] = _compile(shape, f"flex_{len(_fused)}")
    return _fused[shape]


def _compile(shape: _ShapeClass, name: str) -> _Attend:
    # The kernel for short queries packs all rows and heads of a group into one tile, and fails if
    # they do not fit: it is left to decoding, which is also what it is good at.
    one_row = not shape.whole and shape.lengths[0] and shape.heads[2] <= shape.heads[3] * TILE
    options: Any = {"BACKEND": "AUTO"} if one_row else _options(shape)

    def attend(
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKMD: Tensor,
        lo_GmN: Tensor,
        hi_GmN: Tensor,
        group_BH: Tensor | None,
        *lists: Tensor,
    ) -> tuple[Tensor, Tensor]:
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = batch if shape.group_rows > 1 else 0
            group = 0 if group_BH is None else group_BH[row, head]
            inside = (lo_GmN[group, 0, query] <= key) & (key < hi_GmN[group, 0, query])
            for t in range(1, shape.ranges):
                more = (lo_GmN[group, t, query] <= key) & (key < hi_GmN[group, t, query])
                inside = inside | more
            return inside

        mask = BlockMask(
            (q_BHND.shape[2], k_BKMD.shape[2]),
            *lists,
            BLOCK_SIZE=(shape.tile, shape.tile),
            mask_mod=visible,
        )
        out_BHND, aux = flex_attention(
            q_BHND,
            k_BKMD,
            v_BKMD,
            block_mask=mask,
            scale=shape.scale,
            enable_gqa=True,
            kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        return out_BHND, aux.lse

    # Dynamo keeps at most eight graphs per code object, and all calls of this function share one:
    # each shape class gets its own. With fullgraph, running over that limit is an error and never
    # a silent unfused run.
    attend.__code__ = attend.__code__.replace(co_name=name)
    return torch.compile(attend, backend=_inductor, fullgraph=True)


def _options(shape: _ShapeClass) -> dict[str, str | int]:
    """Tiles, warps and stages of the kernels, where torch does not choose them itself."""
    found: dict[str, str | int] = {"BACKEND": "TRITON"}
    on_gpu = shape.device.type == "cuda"
    hopper = on_gpu and torch.cuda.get_device_capability(shape.device) == (9, 0)
    if hopper and shape.dtype != torch.float32 and shape.widths[0] == shape.widths[1]:
        found.update(_HOPPER.get(shape.widths[0], {}))
    return found


def _inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
    global _compilations
    _compilations += 1
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)
