"""Attention of queries over stored tokens, each of which knows its position.

The tokens of two heads may stand at different positions, so a mask is made from positions, tile by
tile of query rows. O(N C) time; O(C) memory beside a bounded tile.

Axes: B batch, H query heads, G key heads, N query rows, C places, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kv.view import rows_in_tile
from longspan.pattern import At, Causal, Pattern


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_at: Tensor,
    k_at: Tensor,
    scale: float,
    pattern: Pattern | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over stored tokens at or before each query.

    Args:
        q: [B, H, N, D].
        k: [B, G, C, D].
        v: [B, G, C, Dv].
        q_at: positions, int64 [B, N].
        k_at: positions, int64 [B, G, C]; -1 where there is no token.
        scale: factor on the logits.
        pattern: where queries may look; a row that it leaves without keys keeps its own position.
            None: everywhere.

    Returns:
        out [B, H, N, Dv] and lse [B, H, N] in float32 at least; 0 and -inf for a row without keys.
    """
    batch, heads, n, width = q.shape
    groups, places = k.shape[1:3]
    kind = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(kind).mT, v.to(kind)
    step = rows_in_tile(batch * heads * places, q.device)
    outs, sums = [], []
    for begin in range(0, n, step):
        rows = q[:, :, begin : begin + step].to(kind)
        at = q_at[:, begin : begin + step]
        logits = rows.reshape(batch, groups, -1, width) @ keys * scale
        logits = logits.view(batch, heads, -1, places)
        allowed = _allowed(at, k_at, heads, pattern)
        logits = logits.masked_fill(~allowed, -torch.inf)
        lse = logits.logsumexp(-1)
        weight = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        out = weight.view(batch, groups, -1, places) @ values
        outs.append(out.view(batch, heads, -1, v.shape[-1]).to(q.dtype))
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def read_one(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Attention of one query [B, H, 1, D] over all tokens that there are: [B, H, 1, Dv].

    Query heads of a group take the place of rows, so that keys are not repeated.

    Args:
        q: [B, H, 1, D].
        k: [B, G, C, D].
        v: [B, G, C, Dv].
        valid: bool [B, G, C], one true at least in each row; None if all are.
        scale: factor on the logits.
    """
    batch, heads, _, width = q.shape
    rows = q.reshape(batch, k.shape[1], -1, width)
    mask = None if valid is None else valid[:, :, None]
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, 1, -1)


def _allowed(q_at: Tensor, k_at: Tensor, heads: int, pattern: Pattern | None) -> Tensor:
    """bool [B, H, N, C]."""
    share = heads // k_at.shape[1]
    key = k_at.repeat_interleave(share, 1)[:, :, None]
    query = q_at[:, None, :, None]
    seen = (key >= 0) & (key <= query)
    if pattern is None or pattern == Causal():
        return seen
    query_, key_ = query.cpu().numpy(), key.cpu().numpy()
    per_head = [
        pattern.allows(query_[:, 0], key_[:, h], At(head=h, heads=heads)) for h in range(heads)
    ]
    shape = (*seen.shape[:1], *seen.shape[2:])
    table = np.stack([np.broadcast_to(head, shape) for head in per_head], axis=1)
    found = seen & torch.from_numpy(table).to(seen.device)
    return found | (~found.any(-1, keepdim=True) & (key == query) & seen)
