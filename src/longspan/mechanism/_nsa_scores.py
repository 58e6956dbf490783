"""What NSA's compression tells its selection: how much each block weighs.

The weights that compression gives to its blocks are summed over the query heads of a key head,
then over the compressed blocks that a selectable block overlaps. No gradient passes.

Axes: B batch, H query heads, K key heads, G = H / K, N query rows, S compressed blocks, T blocks
that can be selected, D head width.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from longspan.mechanism._blocks import Lay, slices
from longspan.ops.fused import can_fuse
from longspan.ops.inputs import without_autocast

# A program holds one tile of keys and one of queries for each stage, at most 48 KiB in all for
# heads of up to 256 numbers in float32: what any GPU of the last ten years has.
_TILE_BYTES = 16 * 1024
_STAGES = 2


@torch.no_grad()
@without_autocast
def group_weights(q: Tensor, k: Tensor, lse: Tensor, ended: Tensor, scale: float) -> Tensor:
    """Weights of compressed blocks, summed over the heads of a group [B, K, N, S].

    Args:
        q: queries [B, H, N, D].
        k: keys of compressed blocks [B, K, S, D].
        lse: log-sum-exp of the compressed attention [B, H, N].
        ended: blocks that each row sees [1 or B, N].
        scale: factor on the logits.
    """
    if can_fuse(q, k, lse):
        return _fused(q, k, lse, ended, scale)
    group = q.shape[1] // k.shape[1]
    k = k.to(lse.dtype).mT[:, :, None]
    number = torch.arange(k.shape[-1], device=q.device)
    found = []
    for rows in slices(q.shape[2], q.shape[0] * q.shape[1] * k.shape[-1]):
        logit = q[:, :, rows].to(lse.dtype).unflatten(1, (-1, group)) @ k
        total = lse[:, :, rows].unflatten(1, (-1, group))[..., None]
        weight = (logit * scale - total.masked_fill(total.isneginf(), 0.0)).exp()
        hidden = (number >= ended[:, rows, None])[:, None, None]
        found.append(weight.masked_fill(hidden, 0.0).sum(dim=2))
    return torch.cat(found, dim=2)


def onto_blocks(
    score: Tensor, block: int, stride: int, size: int, count: int
) -> tuple[Tensor, Lay | None]:
    """Scores of compressed blocks [B, K, N, S], as ``best_blocks`` takes them to choose among
    ``count`` blocks of ``size`` tokens, each the sum over those that overlap it.
    """
    if size % stride == 0:
        return score, Lay(size // stride, -(-block // stride) - 1, count)
    begin = torch.arange(count, device=score.device) * size
    first = torch.arange(score.shape[-1], device=score.device)[:, None] * stride
    overlap = (first < begin + size) & (first + block > begin)
    return score @ overlap.to(score.dtype), None


def _fused(q: Tensor, k: Tensor, lse: Tensor, ended: Tensor, scale: float) -> Tensor:
    """``group_weights`` on a GPU, whose programs take as many rows as blocks."""
    kernels: ModuleType = importlib.import_module("longspan.mechanism._nsa_triton")
    q, k, lse = q.contiguous(), k.contiguous(), lse.contiguous()
    ended = ended.to(torch.int32).contiguous()
    (batch, heads, rows, width), (kv_heads, blocks) = q.shape, k.shape[1:3]
    out = lse.new_zeros(batch, kv_heads, rows, blocks)
    sizes = (rows, blocks, kv_heads, rows if len(ended) > 1 else 0)
    wide, side = _tile(width, q.element_size())
    with torch.cuda.device(q.device):
        kernels.sum_weights[(-(-rows // side), batch * kv_heads)](
            q,
            k,
            lse,
            ended,
            out,
            *sizes,
            scale,
            heads // kv_heads,
            width,
            wide,
            side,
            side,
            num_stages=_STAGES,
        )
    return out


def _tile(width: int, size: int) -> tuple[int, int]:
    """Columns and rows of a tile of queries or keys, both powers of two.

    Args:
        width: of a head.
        size: bytes of a number.
    """
    wide = max(16, 1 << (width - 1).bit_length())
    return wide, min(64, max(16, _TILE_BYTES // (wide * size)))
