"""Chunks of keys and values as one key and one value each.

Axes: B batch, H query heads, K key heads, N rows, T chunks of C rows, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.mechanism.layer import rows_at, to_front


def summarise(
    k: Tensor, pooled: Tensor, valid: Tensor | None, size: int, pool: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of every chunk, and its tokens [B, T] where there is padding.

    Args:
        k: keys, not rotated [B, K, N, D].
        pooled: what values are made of [B, K or H, N, Dv].
        valid: False at padding [B, N], where numbers are finite.
        size: tokens of a chunk.
        pool: learned queries [K, D]; None: means.
    """
    rows = k.shape[2]
    if valid is None:
        inside = torch.ones(1, rows, dtype=torch.bool, device=k.device)
    else:
        order, _ = to_front(valid)
        k, pooled = rows_at(k, order), rows_at(pooled, order)
        inside = valid.gather(1, order)
    tail = -rows % size
    k_BKTCD, p_BHTCD = (pad(x, (0, 0, 0, tail)).unflatten(2, (-1, size)) for x in (k, pooled))
    inside_BTC = pad(inside, (0, tail)).unflatten(1, (-1, size))
    count = inside_BTC.sum(dim=-1)
    if pool is None:
        # The division would be in float32 whatever the dtype of the keys.
        share = inside_BTC.to(k.dtype) / count.clamp_min(1)[..., None]
        weight = share[:, None]
    else:
        logit = torch.einsum("bktcd,kd->bktc", k_BKTCD, pool.to(k.dtype))
        logit = logit * k.shape[-1] ** -0.5
        # A chunk without any token is weighed unmasked, and never seen.
        hidden = ~inside_BTC & inside_BTC.any(dim=-1, keepdim=True)
        weight = logit.masked_fill(hidden[:, None], -math.inf).softmax(dim=-1)
    keys = (weight[..., None, :] @ k_BKTCD)[..., 0, :]
    if p_BHTCD.shape[1] != k.shape[1]:
        repeat = p_BHTCD.shape[1] // k.shape[1]
        keys = keys.repeat_interleave(repeat, dim=1)
        weight = weight if weight.shape[1] == 1 else weight.repeat_interleave(repeat, dim=1)
    values = (weight[..., None, :] @ p_BHTCD)[..., 0, :]
    return keys, values, None if valid is None else count
