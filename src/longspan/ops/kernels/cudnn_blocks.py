"""Blocks of 64 tokens on Hopper: cuDNN's block-sparse attention over lists of whole blocks.

The other kernels work in tiles of 128, of which scattered blocks of 64 touch two to four times
their own area. Here the ranges are taken apart (``ops.whole_blocks``):

    whole blocks   cudnn.block_sparse_attention over their lists: no mask, no plan
    the rest       rows' own blocks cut at the diagonal: ``cudnn`` over ranges, joined by lse

Backward: with P_ij = exp(s_ij - lse_i), where lse belongs to all keys, the gradient of a score is
P_ij (dO_i . v_j - dO_i . O_i) in either part, so the blocks' own backward (FlashAttention-2, Dao
2023, arXiv 2307.08691) runs on the joined output and log-sum-exp as it is. It takes no grouped
queries; but the kernel knows no positions, so the query heads of a group are laid behind one
another as more rows of one head: nothing is repeated, and no gradients are added up.

Forward 4 D flops per visited pair, backward 10 D; memory O(N D) and the lists. Forward bfloat16
and float16, widths 64, 96 and 128; backward bfloat16 and width 128, without gradients of the
log-sum-exp.

Axes: B batch, H query heads, K key heads, N query rows in Q blocks, M key rows, D head width, W
longest list.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.capability import needs_grad
from longspan.ops.kernels.cudnn import DTYPES, cudnn
from longspan.ops.kernels.cudnn import reasons as reasons_over_ranges
from longspan.ops.libraries import NO_CUDNN, aligned, why_missing
from longspan.ops.merge import merge
from longspan.ops.once import once
from longspan.ops.ranges import KeyRanges
from longspan.ops.whole_blocks import SIZE, whole_blocks

WIDTHS = (64, 96, 128)
_MODULE = "cudnn.block_sparse_attention"
# Entries of the lists, which the library counts in int32.
_MOST_ENTRIES = 1 << 31


def reasons(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges) -> list[str]:
    """Why this kernel cannot take the given tensors, one sentence each; empty where it can."""
    found = tensor_reasons(q_BHND, v_BKMD)
    if needs_grad(q_BHND, k_BKMD, v_BKMD):
        if q_BHND.dtype != torch.bfloat16 or {q_BHND.shape[-1], v_BKMD.shape[-1]} != {128}:
            found.append("has gradients in bfloat16 at head width 128 only")
        if torch.are_deterministic_algorithms_enabled():
            found.append("its gradients are not deterministic")
    if found:
        return found
    batch, heads = q_BHND.shape[:2]
    whole = whole_blocks(ranges)
    if whole is None:
        return [f"less than half of the pairs lie in whole blocks of {SIZE}"]
    if batch * heads * whole.index_GQW[0].numel() >= _MOST_ENTRIES:
        return ["the lists of blocks have more than 2**31 entries"]
    if whole.edges is not None:
        found += reasons_over_ranges(q_BHND, k_BKMD, v_BKMD, whole.edges)
    return found


def tensor_reasons(q_BHND: Tensor, v_BKMD: Tensor) -> list[str]:
    """Why the forward cannot take queries and values, whatever the blocks are."""
    if q_BHND.device.type != "cuda":
        return [f"needs CUDA tensors, got {q_BHND.device}"]
    found = []
    if torch.cuda.get_device_capability(q_BHND.device) != (9, 0):
        found.append("needs compute capability 9.0 (Hopper)")
    if q_BHND.dtype not in DTYPES:
        found.append(f"computes bfloat16 and float16, got {q_BHND.dtype}")
    widths = (q_BHND.shape[-1], v_BKMD.shape[-1])
    if not set(widths) <= set(WIDTHS):
        found.append(f"head widths must be among {WIDTHS}, got {widths[0]} and {widths[1]}")
    if not found and (missing := missing_stack()):
        found.append(missing)
    return found


@functools.cache
def missing_stack() -> str | None:
    """What has to be installed, None if nothing."""

    def load() -> object:
        # The name is loaded when it is asked for, with the compiler below it.
        _ = importlib.import_module(_MODULE).block_sparse_attention_forward
        return importlib.import_module(f"{_MODULE}._interface")

    return why_missing(
        "cudnn", load, NO_CUDNN, f"{_MODULE} does not load: pip install 'longspan[cuda]'"
    )


def over_lists(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    lists: tuple[Tensor, Tensor],
    size: int,
    scale: float,
    *,
    has_empty: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention to whole blocks, without gradients.

    Args:
        q_BHND: queries; N a multiple of the block size.
        k_BKMD: keys; K divides H.
        v_BKMD: values.
        lists: of each block of rows, counts int32 [B, H, Q] and block numbers int32 [B, H, Q, W].
        size: tokens of a block, 64 or 128.
        scale: factor on the logits.
        has_empty: whether some counts may be 0.

    Returns:
        out [B, H, N, Dv] and lse [B, H, N], 0 and -inf in rows without blocks.
    """
    count, index = lists
    found = importlib.import_module(_MODULE).block_sparse_attention_forward(
        *(aligned(x, 128) for x in (q_BHND, k_BKMD, v_BKMD)),
        index,
        q2k_block_nums=count,
        sparse_block_size=size,
        allow_empty_block_nums=has_empty,
        softmax_scale=scale,
    )
    return found["o_tensor"], found["lse_tensor"]


@torch.compiler.disable
def cudnn_blocks(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D], on Hopper; N and M are multiples of 64.
        k_BKMD: keys [B, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
        v_BKMD: values [B, K, M, Dv].
        ranges: visible keys, on the device of ``q``, most of them in whole blocks of 64.
        scale: factor on the logits.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, differentiable once, and natural-log lse
        [B, H, N], which passes no gradient on.

    Raises:
        Refusal: ``reasons`` has one.
    """
    if found := reasons(q_BHND, k_BKMD, v_BKMD, ranges):
        raise Refusal("cudnn_blocks cannot run here: " + "; ".join(found))
    whole = whole_blocks(ranges)
    assert whole is not None
    rest = ()
    if whole.edges is not None:
        # What the decorator of the kernel returns has no useful type.
        run: Any = cudnn
        rest = run(q_BHND, k_BKMD, v_BKMD, whole.edges, scale)
    lists = whole.lists(len(q_BHND))
    return _Joined.apply(q_BHND, k_BKMD, v_BKMD, lists, scale, whole.has_empty, *rest)


class _Joined(torch.autograd.Function):
    """Blocks, joined with what another kernel gave for the other keys."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKMD: Tensor,
        lists: tuple[Tensor, Tensor],
        scale: float,
        has_empty: bool,
        *rest: Tensor,
    ) -> tuple[Tensor, Tensor]:
        own = over_lists(q_BHND, k_BKMD, v_BKMD, lists, SIZE, scale, has_empty=has_empty)
        out, lse = merge([own, (rest[0], rest[1])]) if rest else own
        ctx.save_for_backward(q_BHND, k_BKMD, v_BKMD, out, lse, *lists, *rest)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout: Tensor, _: Tensor
    ) -> tuple[Any, ...]:
        q, k, v, out, lse, count, index, *rest = ctx.saved_tensors
        grads = _gradients(dout, q, k, v, out, lse, (count, index), ctx.scale)
        if not rest:
            return *grads, None, None, None
        rest_out, rest_lse = rest
        # Rows without any key have no share, whatever their incoming gradient is.
        empty = lse == -torch.inf
        share = (rest_lse - lse).exp().masked_fill(empty, 0.0)
        d_out = (share[..., None].to(dout.dtype) * dout).masked_fill(empty[..., None], 0.0)
        slope = ((rest_out - out) * dout).sum(-1, dtype=lse.dtype)
        d_lse = (share * slope).masked_fill(empty, 0.0)
        return *grads, None, None, None, d_out, d_lse


def _gradients(
    dout_BHND: Tensor,
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    out_BHND: Tensor,
    lse_BHN: Tensor,
    lists: tuple[Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the whole blocks, given output and log-sum-exp over all keys."""
    batch, key_heads = k_BKMD.shape[:2]

    def behind(x: Tensor) -> Tensor:
        """[B, H, rows, ...] as [B, K, H / K rows, ...]."""
        return x.contiguous().view(batch, key_heads, -1, *x.shape[3:])

    rows = (behind(x) for x in (dout_BHND, q_BHND))
    count, index = (behind(x) for x in lists)
    found = importlib.import_module(_MODULE).block_sparse_attention_backward(
        *rows,
        *(aligned(x.contiguous(), 128) for x in (k_BKMD, v_BKMD)),
        behind(out_BHND),
        behind(lse_BHN),
        index,
        q2k_block_nums=count,
        sparse_block_size=SIZE,
        softmax_scale=scale,
    )
    dq = found["dq_tensor"].view(q_BHND.shape)
    return dq, found["dk_tensor"], found["dv_tensor"]
