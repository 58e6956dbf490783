"""``cudnn.block_sparse_attention`` by its documentation, slowly and on any device.

Axes: B batch, H query heads, K key heads, N rows, Q blocks of rows, W longest list, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def seen(index: Tensor, count: Tensor, size: int, keys: int) -> Tensor:
    """Lists [B, H, Q, W] as a mask of pairs [B, H, N, keys], checking the rules for lists."""
    assert index.dtype == count.dtype == torch.int32
    assert index.is_contiguous()
    used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    blocks = torch.zeros(*index.shape[:3], keys // size, dtype=torch.int32, device=index.device)
    blocks.scatter_add_(-1, index.long(), used.int())
    assert blocks.max() <= 1, "a block is listed twice"
    rising = index.diff(dim=-1) > 0
    assert (rising | ~used[..., 1:]).all(), "lists must rise"
    return blocks.bool().repeat_interleave(size, 2).repeat_interleave(size, 3)


def forward(q, k, v, index, *, q2k_block_nums, sparse_block_size, softmax_scale, **options):
    """Grouped queries may be; rows without blocks give 0 and -inf if that was said."""
    allow_empty = options.pop("allow_empty_block_nums", False)
    assert not options
    assert allow_empty or q2k_block_nums.min() > 0
    assert q.shape[2] % sparse_block_size == 0
    mask = seen(index, q2k_block_nums, sparse_block_size, k.shape[2])
    assert mask.shape[:3] == q.shape[:3]
    each = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(each, 1).mT * softmax_scale
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return {"o_tensor": weights @ v.repeat_interleave(each, 1), "lse_tensor": lse}


def backward(dout, q, k, v, out, lse, index, *, q2k_block_nums, sparse_block_size, softmax_scale):
    """As many key heads as query heads; takes the weights from the given output and lse."""
    assert q.shape[:2] == k.shape[:2]
    assert all(x.is_contiguous() for x in (dout, q, k, v, out, lse))
    mask = seen(index, q2k_block_nums, sparse_block_size, k.shape[2])
    assert mask.shape[:3] == q.shape[:3] == lse.shape
    logits = q @ k.mT * softmax_scale
    shift = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    weights = (logits - shift).masked_fill(~mask, -torch.inf).exp()
    # Rows without blocks are not visited.
    visited = q2k_block_nums.repeat_interleave(sparse_block_size, -1)[..., None] > 0
    dout, out = (torch.where(visited, x, 0.0) for x in (dout, out))
    slope = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * softmax_scale
    return {
        "dq_tensor": slope @ k,
        "dk_tensor": slope.mT @ q,
        "dv_tensor": weights.mT @ dout,
    }
