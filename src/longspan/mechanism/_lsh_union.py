"""LSH attention over the union of what all rounds show, each key counted once.

A key that N copies show to a row carries the logit - log N, so that the sum over the copies is
one weight (Reformer, arXiv 2001.04451, appendix A: m_ij = ln N_ij). The counts belong to single
pairs, which ranges cannot say: chunks are computed explicitly, O(R N c W c) memory for W chunks
looked at.

Axes: B batch, H heads, R rounds, N rows, T chunks of C rows over all rounds, D head width, U = W C
keys looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.mechanism._buckets import PADDING, chunks_at, take


def union(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    token_BHTC: Tensor,
    look_WBT: Tensor,
    rounds: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One entry for each row of the ring; the rounds are still to be merged.

    Args:
        q_BHND: queries.
        k_BHND: keys.
        v_BHND: values.
        token_BHTC: token of each row of the ring; padding carries ``PADDING`` more.
        look_WBT: chunks that each chunk looks at.
        rounds: R.
        causal: only earlier tokens.
        scale: factor on the logits.

    Returns:
        out [B, H, T C, D] and lse [B, H, T C]; 0 and -inf where a row sees no key.
    """
    heads, chunks, width = token_BHTC.shape[1:]
    around_BHTU = torch.cat([chunks_at(token_BHTC, look) for look in look_WBT], dim=-1)
    row_BHTC, key_BHTU = token_BHTC % PADDING, around_BHTU % PADDING
    q_BHTCD, k_BHTUD, v_BHTUD = (
        take(x, rows.flatten(2)).unflatten(2, (chunks, -1))
        for x, rows in ((q_BHND, row_BHTC), (k_BHND, key_BHTU), (v_BHND, key_BHTU))
    )
    i, j = token_BHTC[..., :, None], around_BHTU[..., None, :]
    visible = (j < i if causal else j != i) & (j < PADDING) & (i < PADDING)

    # Chunk of every token in every round: a chunk belongs to one round, so its number says both.
    place = row_BHTC.unflatten(2, (rounds, -1)).flatten(3).argsort(dim=-1) // width
    place_BHRN = place + torch.arange(rounds, device=place.device)[:, None] * (chunks // rounds)
    count = torch.zeros(visible.shape, dtype=q_BHND.dtype, device=place.device)
    for mine in place_BHRN.unbind(dim=2):
        own_BHTC = mine.gather(2, row_BHTC.flatten(2)).view_as(row_BHTC)
        for look_BT in look_WBT:
            look_BHT = look_BT[:, None].expand(own_BHTC.shape[0], heads, -1)
            wanted = look_BHT.gather(2, own_BHTC.flatten(2)).view_as(own_BHTC)[..., None]
            for theirs in place_BHRN.unbind(dim=2):
                at_BHTU = theirs.gather(2, key_BHTU.flatten(2)).view_as(key_BHTU)
                count += wanted == at_BHTU[..., None, :]

    work = torch.promote_types(q_BHND.dtype, torch.float32)
    logits = (q_BHTCD.to(work) @ k_BHTUD.to(work).mT) * scale - count.clamp_min(1).log()
    empty = ~visible.any(dim=-1, keepdim=True)
    # A row of -inf alone would be NaN in the gradient too: it is computed unmasked, then zeroed.
    logits = logits.masked_fill(~visible & ~empty, -torch.inf)
    lse = logits.logsumexp(dim=-1, keepdim=True)
    out = ((logits - lse).exp() @ v_BHTUD.to(work)).masked_fill(empty, 0.0).to(v_BHND.dtype)
    return out.flatten(2, 3), lse.masked_fill(empty, -torch.inf).flatten(2)
