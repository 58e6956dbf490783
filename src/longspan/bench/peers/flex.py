"""PyTorch's FlexAttention with a mask written by hand, compiled, as its documentation would do it.

Axes: H query heads, G range groups, N rows, C tiles of keys, Q tiles of queries, m ranges.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from longspan.bench.peers.flex_masks import mask_of
from longspan.bench.setting import Call, Setting
from longspan.errors import Refusal
from longspan.ops.loading import load
from longspan.ops.ranges import KeyRanges
from longspan.pattern import Pattern
from longspan.planning import plan


def flex_over(ranges: KeyRanges, n: int, scale: float, tile: int = 128) -> Call:
    """FlexAttention as it wants to be used: compiled, visiting only the tiles it must.

    For one range per query and lengths of whole tiles; without grouped queries.

    Raises:
        Refusal: for more ranges, or other lengths.
    """
    if ranges.lo_GNm.shape[2] != 1 or n % tile:
        raise Refusal(f"takes one range per query and multiples of {tile} rows")
    lo_HN, hi_HN = (x[ranges.group_BH[0], :, 0] for x in (ranges.lo_GNm, ranges.hi_GNm))
    lo_HQ, hi_HQ = lo_HN.unflatten(1, (-1, tile)), hi_HN.unflatten(1, (-1, tile))
    start_C = torch.arange(0, n, tile, device=lo_HN.device)
    any_HQC = ((lo_HQ[..., None] < start_C + tile) & (start_C < hi_HQ[..., None])).any(2)
    all_HQC = ((lo_HQ[..., None] <= start_C) & (start_C + tile <= hi_HQ[..., None])).all(2)
    lists: list[Tensor] = []
    for tiles_HQC in (any_HQC & ~all_HQC, all_HQC):
        lists.append(tiles_HQC.sum(-1, dtype=torch.int32)[None])
        lists.append(tiles_HQC.int().argsort(stable=True, dim=-1, descending=True).int()[None])

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (lo_HN[head, i] <= j) & (j < hi_HN[head, i])

    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=tile, mask_mod=visible, seq_lengths=(n, n))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, scale=scale)


def flex(pattern: Pattern, setting: Setting) -> Call:
    if setting.device == "cuda":
        return _flex_by_hand(pattern, setting)
    one, *more = plan(pattern, setting.n, setting.heads).passes
    if more or one.key_order is not None:
        raise Refusal("no mask of one range per query")
    if setting.heads != setting.key_heads:
        raise Refusal("compared without grouped queries on a CPU")
    q, k, _ = setting.tensors()
    return flex_over(load(one, q, k).ranges, setting.n, setting.scale)


def _flex_by_hand(pattern: Pattern, setting: Setting) -> Call:
    mask, per_head = mask_of(pattern, setting.heads, setting.n)
    compiled = torch.compile(create_block_mask, dynamic=False)
    heads = setting.heads if per_head else None
    blocks = compiled(mask, None, heads, setting.n, setting.n, device=setting.device)
    fused = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: fused(q, k, v, block_mask=blocks, scale=setting.scale, enable_gqa=True)
