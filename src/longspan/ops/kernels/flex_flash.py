"""FlexAttention with the FlashAttention-4 kernels over key ranges, on Hopper and newer.

Dong et al., arXiv 2412.05496, with ``BACKEND="FLASH"``: PyTorch translates the mask function to
CuTe and hands the tile lists of ``flex`` to ``flash_attn.cute``. What differs from ``flex``:

* Graphs hold all sizes. Tile lists are as wide as a power of two, so that patterns share graphs,
  but each length is compiled anew; only whole tiles are taken.
* The mask function reads one tensor per bound, indexed by nothing but the batch row, the head and
  the query: constants do not compile as indices, and neither do int64 tensors.
* No gradient flows through the log-sum-exp. It is returned detached, and ``auto`` takes this
  kernel only where nobody asks for that gradient.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, G range groups,
m ranges per query; Z and Y are the batch rows and heads that differ in what they see, else 1.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from longspan.errors import Refusal
from longspan.ops.capability import needs_grad
from longspan.ops.kernels._flex_tiles import TILE, TileLists, count_tiles, tile_lists
from longspan.ops.libraries import missing_flash_attention, why_no_flash_attention
from longspan.ops.ranges import KeyRanges

# Each range is two loads and two comparisons for every score of a partly visible tile.
MOST_RANGES = 8
LIST_BYTES = 2 << 30

_Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class _Schedule:
    lists: TileLists
    # lo and hi of each range in turn: int32 [N], [H, N] or [B, H, N].
    bounds: tuple[Tensor, ...]
    empty_BHN: Tensor | None


class _ShapeClass(NamedTuple):
    """What a graph depends on: everything but which keys are visible."""

    tensors: tuple[tuple[object, ...], ...]
    lists: tuple[torch.Size, ...]
    bounds: tuple[torch.Size, ...]
    scale: float
    grads: tuple[bool, ...]


_schedules: WeakKeyDictionary[KeyRanges, dict[tuple[int, int], _Schedule]] = WeakKeyDictionary()
_fused: dict[_ShapeClass, _Attend] = {}


def reasons(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges) -> list[str]:
    """Why this kernel cannot take the given tensors, one sentence each; empty where it can."""
    found = why_no_flash_attention("flex_flash", q_BHND, v_BKMD)
    if q_BHND.device.type != "cuda":
        return found
    lengths = (ranges.queries, ranges.keys)
    if any(length % TILE or length < 2 * TILE for length in lengths):
        found.append(
            f"queries and keys must be multiples of {TILE} from {2 * TILE}, got {lengths[0]} and "
            f"{lengths[1]}: each length is a compilation of its own"
        )
    if ranges.lo_GNm.shape[2] > MOST_RANGES:
        found.append(
            f"at most {MOST_RANGES} ranges per query, these have up to {ranges.lo_GNm.shape[2]}"
        )
    if torch.are_deterministic_algorithms_enabled() and needs_grad(q_BHND, k_BKMD, v_BKMD):
        found.append("its gradients are not deterministic, which torch is set to require")
    if not found and (missing := missing_stack()):
        found.append(missing)
    if not found:
        counts = count_tiles(ranges)
        needed = _widened(counts.width, lengths[1]) * lengths[0] // TILE
        needed += _widened(counts.height, lengths[0]) * lengths[1] // TILE
        needed *= 2 * counts.group_ZY.numel() * torch.int32.itemsize
        if counts.tile != TILE or needed > LIST_BYTES:
            found.append(f"the tile lists would take {needed / 2**30:.1f} GiB, the limit is 2")
    return found


@functools.cache
def missing_stack() -> str | None:
    """What has to be installed, None if nothing."""
    if importlib.util.find_spec("torch._inductor.kernel.flex.flex_flash_attention") is None:
        return f"torch {torch.__version__} has no FLASH backend, torch 2.11 and newer have one"
    return missing_flash_attention()


# Under an outer torch.compile this is a graph break: plans are cached by identity, outside graphs.
@torch.compiler.disable
def flex_flash(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D], bfloat16 or float16; D one of ``FLASH_WIDTHS``, N and M
            multiples of 128 from 256.
        k_BKMD: keys [B, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
        v_BKMD: values [B, K, M, D].
        ranges: visible keys, on the device of ``q``.
        scale: factor on the logits; part of the shape class.

    Returns:
        out [B, H, N, D] in the dtype of ``q``, and natural-log lse [B, H, N] in float32. Only out
        is differentiable.

    Raises:
        Refusal: ``reasons`` has one.
    """
    batch, heads = q_BHND.shape[:2]
    kept = _schedules.setdefault(ranges, {})
    if (batch, heads) not in kept:
        if found := reasons(q_BHND, k_BKMD, v_BKMD, ranges):
            raise Refusal("flex_flash cannot run here: " + "; ".join(found))
        kept[batch, heads] = _schedule(ranges, batch, heads)
    plan = kept[batch, heads]
    tensors = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHND, k_BKMD, v_BKMD))
    shape = _ShapeClass(
        tensors=tuple((x.shape, x.stride(), x.dtype, x.device) for x in tensors),
        lists=tuple(x.shape for x in plan.lists),
        bounds=tuple(x.shape for x in plan.bounds),
        scale=scale,
        grads=(
            torch.is_grad_enabled(),
            q_BHND.is_inference(),
            *(x.requires_grad for x in tensors),
        ),
    )
    if shape not in _fused:
        if found := reasons(q_BHND, k_BKMD, v_BKMD, ranges):
            raise Refusal("flex_flash cannot run here: " + "; ".join(found))
        _fused[shape] = _compile(shape, f"flex_flash_{len(_fused)}")
    out_BHND, lse_BHN = _fused[shape](*tensors, plan.bounds, *plan.lists)
    lse_BHN = lse_BHN * _lse_unit()
    if plan.empty_BHN is not None:
        out_BHND = out_BHND.masked_fill(plan.empty_BHN[..., None], 0.0)
        lse_BHN = lse_BHN.masked_fill(plan.empty_BHN, -torch.inf)
    return out_BHND, lse_BHN


@functools.cache
def _lse_unit() -> float:
    # The kernel gives natural logarithms. Until torch knew that, it took them for binary ones, as
    # its other backends give, and multiplied by log 2.
    known = "stats_are_log2" in inspect.getsource(flex_attention)
    return 1.0 if known else 1 / math.log(2)


def _widened(width: int, length: int) -> int:
    """Columns of a list: a power of two that holds it, but no more than there are tiles."""
    return min(1 << (width - 1).bit_length(), length // TILE)


# A backward saves these, and tensors of inference mode cannot be saved.
@torch.inference_mode(False)
def _schedule(ranges: KeyRanges, batch: int, heads: int) -> _Schedule:
    narrow = tile_lists(ranges)
    lengths = (ranges.keys, ranges.keys, ranges.queries, ranges.queries)
    columns = [_widened(x.shape[-1], n) for x, n in zip(narrow[1::2], lengths, strict=True)]
    lists = [x.clone() for x in narrow]
    for at, (index, width) in enumerate(zip(narrow[1::2], columns, strict=True)):
        lists[2 * at + 1] = pad(index, (0, width - index.shape[-1])).clone()
    group_ZY = count_tiles(ranges).group_ZY
    group = group_ZY.flatten()[0] if group_ZY.numel() == 1 else ranges.group_BH.expand(-1, heads)
    if group.dim() and len(group) == 1:
        group = group[0]
    elif group.dim():
        group = group.expand(batch, -1)
    bounds = [
        x[..., t][group].int().contiguous()
        for t in range(ranges.lo_GNm.shape[2])
        for x in (ranges.lo_GNm, ranges.hi_GNm)
    ]
    empty_GN = ranges.empty_GN()
    return _Schedule(
        TileLists(*lists), tuple(bounds), empty_GN[group_ZY] if bool(empty_GN.any()) else None
    )


def _compile(shape: _ShapeClass, name: str) -> _Attend:
    places = len(shape.bounds[0])
    train = shape.grads[0] and any(shape.grads[2:])

    def attend(
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKMD: Tensor,
        bounds: tuple[Tensor, ...],
        *lists: Tensor,
    ) -> tuple[Tensor, Tensor]:
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            at = (batch, head, query)[3 - places :]
            inside = (bounds[0][at] <= key) & (key < bounds[1][at])
            for t in range(2, len(bounds), 2):
                inside = inside | ((bounds[t][at] <= key) & (key < bounds[t + 1][at]))
            return inside

        mask = BlockMask(
            (q_BHND.shape[2], k_BKMD.shape[2]), *lists, BLOCK_SIZE=(TILE, TILE), mask_mod=visible
        )
        out_BHND, aux = flex_attention(
            q_BHND,
            k_BKMD,
            v_BKMD,
            block_mask=mask,
            scale=shape.scale,
            enable_gqa=True,
            kernel_options={"BACKEND": "FLASH"},
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        # A gradient through it does not compile.
        return out_BHND, aux.lse.detach() if train else aux.lse

    # Dynamo keeps at most eight graphs per code object, and all calls of this function share one:
    # each shape class gets its own. With fullgraph, running over that limit is an error and never
    # a silent unfused run.
    attend.__code__ = attend.__code__.replace(co_name=name)
    return torch.compile(attend, backend="inductor", fullgraph=True, dynamic=False)
