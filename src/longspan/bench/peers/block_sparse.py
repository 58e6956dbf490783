"""Block-sparse kernels of other libraries, over a map of whole blocks.

Axes: B batch, H query heads, K key heads, N rows, D head width, Q blocks of queries, T blocks of
keys.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from longspan.bench.peers.block_maps import BlockMap
from longspan.bench.setting import Call, by_rows, ungrouped
from longspan.errors import Refusal
from longspan.ops.capability import needs_grad
from longspan.select.lists import listed

# The eight tensors of a BlockMask.
_FLEX_LISTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)
_flex_compiled: dict[tuple[int, int, float], Callable[..., Tensor]] = {}


def flex(given: BlockMap, scale: float, tile: int = 128, *, fused: bool = True) -> Call:
    """FlexAttention with a mask that looks blocks up, over tiles of a size.

    One graph for all maps of a shape: the map is a tensor that the mask reads. Not ``fused``, it
    is dense, for rehearsals.
    """
    if tile % given.size:
        raise Refusal(f"tiles of {tile} are no multiple of blocks of {given.size}")
    each = given.heads // len(given.seen_GQT)
    parts = (x.repeat_interleave(each, 0)[None] for x in given.coarser(tile))
    # As wide as there are tiles: it derives the lists of the backward from that.
    wide = [y for x in parts for y in (x.sum(-1, dtype=torch.int32), _order(x))]
    n = given.seen_GQT.shape[1] * given.size
    made = BlockMask.from_kv_blocks(*wide, BLOCK_SIZE=tile, seq_lengths=(n, n))
    found = [getattr(made, name) for name in _FLEX_LISTS]
    seen_HQT = given.seen_HQT
    attend = _flex_over(given.size, tile, scale, fused)
    return lambda q, k, v: attend(q, k, v, seen_HQT, *found)


def _order(seen: Tensor) -> Tensor:
    return seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def _flex_over(size: int, tile: int, scale: float, fused: bool) -> Callable[..., Tensor]:
    name = (size, tile, scale)
    # Its tiles must not be larger than those of the lists.
    small: Any = None
    if tile < 128:
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        small = dict.fromkeys(names, tile)

    def attend(q: Tensor, k: Tensor, v: Tensor, seen_HQT: Tensor, *found: Tensor) -> Tensor:
        def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return seen_HQT[head, i // size, j // size]

        mask = BlockMask(
            (q.shape[2], k.shape[2]), *found, BLOCK_SIZE=(tile, tile), mask_mod=visible
        )
        out: Any = flex_attention(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=small
        )
        return out

    if not fused:
        return attend
    if name not in _flex_compiled:
        # Dynamo keeps at most eight graphs per code object.
        attend.__code__ = attend.__code__.replace(co_name=f"blocks_{size}_{tile}")
        _flex_compiled[name] = torch.compile(attend, dynamic=False, fullgraph=True)
    return _flex_compiled[name]


def cudnn(given: BlockMap, scale: float) -> Call:
    """``cudnn.block_sparse_attention`` of nvidia-cudnn-frontend; its backward knows no groups."""
    if given.size not in (64, 128):
        raise Refusal("takes blocks of 64 or 128")
    module = importlib.import_module("cudnn.block_sparse_attention")
    count, index = listed(given.seen_HQT[None])
    about = {"q2k_block_nums": count, "sparse_block_size": given.size, "softmax_scale": scale}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Any = _Cudnn.apply(q, k, v, index, about, module)
        return found

    repeated = ungrouped(call)
    return lambda q, k, v: repeated(q, k, v) if needs_grad(q, k, v) else call(q, k, v)


class _Cudnn(torch.autograd.Function):
    """Its two functions, joined."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, about: Any, module: Any):
        found = module.block_sparse_attention_forward(q, k, v, index, **about)
        out, lse = found["o_tensor"], found["lse_tensor"]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = index, about, module
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, slope: Tensor
    ):
        index, about, module = ctx.rest
        found = module.block_sparse_attention_backward(
            slope.contiguous(), *ctx.saved_tensors, index, **about
        )
        return found["dq_tensor"], found["dk_tensor"], found["dv_tensor"], None, None, None


def flash_4(given: BlockMap, scale: float) -> Call:
    """``flash_attn.cute`` with lists of full blocks; its backward walks key blocks of 128."""
    interface = importlib.import_module("flash_attn.cute")
    kind = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    if given.size not in (64, 128):
        raise Refusal("takes blocks of 64 or 128")

    def full(seen_HQT: Tensor) -> Any:
        count, index = listed(seen_HQT[None])
        return kind(
            mask_block_cnt=torch.zeros_like(count),
            mask_block_idx=torch.zeros_like(index[..., :1]),
            full_block_cnt=count,
            full_block_idx=index,
            block_size=(given.size, given.size),
        )

    forth, back = full(given.seen_HQT), full(given.seen_HQT.mT)

    def attend(*tensors: Tensor) -> Any:
        train = needs_grad(*tensors)
        if train and given.size != 128:
            raise Refusal("has gradients of blocks of 128 only")
        return interface.flash_attn_func(
            *tensors,
            softmax_scale=scale,
            block_sparse_tensors=forth,
            block_sparse_tensors_bwd=back if train else None,
        )

    return by_rows(attend)


def mit(given: BlockMap, scale: float) -> Call:
    """``block_sparse_attn`` of MIT HAN Lab: kernels of FlashAttention-2 over blocks of 128."""
    if given.size != 128:
        raise Refusal("takes blocks of 128")
    function = importlib.import_module("block_sparse_attn").block_sparse_attn_func
    seen_HQT = given.seen_HQT
    n = seen_HQT.shape[1] * given.size
    # Every head has a mask of its own, and there is one sequence.
    kind = torch.ones(given.heads, dtype=torch.int32, device=seen_HQT.device)
    begins = torch.tensor([0, n], dtype=torch.int32, device=seen_HQT.device)

    def attend(*tensors: Tensor) -> Tensor:
        packed = (x[0] for x in tensors)
        masks = (kind, None, seen_HQT[None])
        out = function(*packed, begins, begins, *masks, n, n, 0.0, softmax_scale=scale)
        return out[None]

    return by_rows(attend)


def flashinfer(given: BlockMap, scale: float) -> Call:
    """FlashInfer's sparse wrapper: one map for all heads, forward only."""
    if (given.seen_GQT != given.seen_GQT[:1]).any():
        raise Refusal("takes one map for all heads")
    module = importlib.import_module("flashinfer")
    seen_QT = given.seen_GQT[0]
    begins = seen_QT.new_zeros(len(seen_QT) + 1, dtype=torch.int32)
    begins[1:] = seen_QT.sum(-1).cumsum(0)
    index = seen_QT.nonzero()[:, 1].to(torch.int32)
    wrapper = module.BlockSparseAttentionWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=seen_QT.device)
    )
    planned: list[tuple[object, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (q.shape[2], k.shape[2], q.shape[3], q.dtype)
        if planned != [shape]:
            wrapper.plan(
                begins,
                index,
                *(x.shape[1] for x in (q, k)),
                *(given.size, given.size),
                *shape[:3],
                sm_scale=scale,
                q_data_type=q.dtype,
            )
            planned[:] = [shape]
        return wrapper.run(*(x[0].contiguous() for x in (q, k, v)))[None]

    return by_rows(attend)
