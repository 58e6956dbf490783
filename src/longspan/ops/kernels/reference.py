"""Dense masked softmax attention: the specification that every other kernel is tested against.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j
    lse_i = log sum_j exp(scale * q_i . k_j)          j over the keys visible to i

O(N M) time and memory, any device, any dtype (float64 for oracles; half precision is computed in
float32), gradients by autograd. A query row that sees no key gives out = 0 and lse = -inf.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, G range groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.inputs import without_autocast
from longspan.ops.ranges import KeyRanges


@without_autocast
def reference(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D].
        k_BKMD: keys [B, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
        v_BKMD: values [B, K, M, Dv].
        ranges: visible keys.
        scale: factor on the logits.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, and lse [B, H, N] in float32 (float64 for float64
        inputs).
    """
    work = torch.promote_types(q_BHND.dtype, torch.float32)
    repeat = q_BHND.shape[1] // k_BKMD.shape[1]
    visible_BHNM = ranges.mask_GNM()[ranges.group_BH]
    empty_BHN1 = ~visible_BHNM.any(dim=-1, keepdim=True)
    # Rows that take no part may hold NaN, and 0 times NaN is NaN.
    unseen_BHM1 = ~visible_BHNM.any(dim=-2)[..., None]
    k_BHMD, v_BHMD = (
        x.to(work).repeat_interleave(repeat, dim=1).masked_fill(unseen_BHM1, 0.0)
        for x in (k_BKMD, v_BKMD)
    )
    logits_BHNM = (q_BHND.to(work).masked_fill(empty_BHN1, 0.0) @ k_BHMD.mT) * scale
    visible_BHNM = visible_BHNM.expand_as(logits_BHNM)
    # A row of -inf only would make softmax NaN, in its gradient too: such rows are computed
    # unmasked, then zeroed.
    logits_BHNM = logits_BHNM.masked_fill(~visible_BHNM & ~empty_BHN1, -torch.inf)
    lse_BHN = logits_BHNM.logsumexp(dim=-1)
    weight_BHNM = (logits_BHNM - lse_BHN[..., None]).exp()
    out_BHND = (weight_BHNM @ v_BHMD).masked_fill(empty_BHN1, 0.0)
    return out_BHND.to(q_BHND.dtype), lse_BHN.masked_fill(empty_BHN1[..., 0], -torch.inf)
