"""Join attention over disjoint sets of keys by their log-sum-exp.

    lse = log sum_p exp(lse_p)            out = sum_p exp(lse_p - lse) out_p

Exact: the result is the attention over the union of the keys, gradients included (FlashAttention,
Dao et al. 2022, arXiv 2205.14135, splits its own softmax the same way). Keys that several parts
share count once in each of them.

Axes: B batch, H heads, N query rows, D value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.ops.fused import can_fuse, merge_fused


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join ``(out, lse)`` pairs.

    Args:
        parts: at least one pair of out [B, H, N, D] and lse [B, H, N]; -inf where a row saw no
            key.

    Returns:
        out in the dtype of the first part and lse; rows without keys in every part give 0 and
        -inf. Differentiable in both inputs and both outputs.

    Raises:
        InputError: if there is no part.
    """
    if not parts:
        raise InputError("merge needs at least one (out, lse) pair, got none")
    if len(parts) == 1:
        return parts[0]
    if can_fuse(*(x for part in parts for x in part)):
        return merge_fused(parts)
    lse_PBHN = torch.stack([lse for _, lse in parts])
    empty_BHN = torch.isneginf(lse_PBHN).all(dim=0)
    # Rows that are empty everywhere would be 0 / 0 in the gradient: they are joined with weights
    # of 1, and zeroed.
    safe_PBHN = lse_PBHN.masked_fill(empty_BHN, 0.0)
    total_BHN = safe_PBHN.logsumexp(dim=0)
    weight_PBHN = (safe_PBHN - total_BHN).exp()
    out = sum(w[..., None] * out for w, (out, _) in zip(weight_PBHN, parts, strict=True))
    assert isinstance(out, Tensor)
    out = out.masked_fill(empty_BHN[..., None], 0.0).to(parts[0][0].dtype)
    return out, total_BHN.masked_fill(empty_BHN, -torch.inf)
