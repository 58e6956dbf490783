"""Attention inside buckets that content decides, as key ranges over keys sorted by bucket.

Axes: B batch, H query heads, K key heads, N rows, D head width, L rows of a sorted list, m ranges
of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.mechanism._copies import Copies
from longspan.mechanism._range_op import over_ranges

# Padding sorts behind every token: it carries its row plus this.
PADDING = 1 << 40


def bucket_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bucket_q_BHN: Tensor,
    bucket_k_BKM: Tensor,
    window: int,
    *,
    scale: float,
    include_self: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Each row attends to the last ``window`` earlier keys of its own bucket.

    Strictly causal, selection included: which keys a row sees depends on buckets of earlier rows
    alone. Sorted by bucket, then by row, those keys are one range.

    Args:
        q: queries [B, H, N, D], the last N of M rows.
        k: keys [B, K, M, D].
        v: values [B, K, M, Dv].
        bucket_q_BHN: bucket of each query; negative sees nothing.
        bucket_k_BKM: bucket of each key; negative is seen by nobody.
        window: most keys per row.
        scale: factor on the logits.
        include_self: whether a row's own key counts among the earlier ones.
        impl: kernel name, or ``auto``.

    Returns:
        out [B, H, N, Dv] and lse [B, H, N]; 0 and -inf where a row sees no key.
    """
    rows, keys = q.shape[2], k.shape[2]
    row_M = torch.arange(keys, device=q.device)
    row_N = row_M[keys - rows :]
    asked, code_q = Copies.sorted(bucket_q_BHN * keys + row_N)
    kept, code_k = Copies.sorted(bucket_k_BKM * keys + row_M)
    bucket_q = code_q.div(keys, rounding_mode="floor")
    code_k = code_k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    first, stop = (
        torch.searchsorted(code_k.contiguous(), code.contiguous())
        for code in (bucket_q * keys, code_q + int(include_self))
    )
    lo = torch.maximum(first, stop - window).masked_fill(bucket_q < 0, 0)
    hi = stop.masked_fill(bucket_q < 0, 0)
    given = asked.spread(q), kept.spread(k), kept.spread(v)
    out, lse = over_ranges(*given, lo[..., None], hi[..., None], scale, impl)
    return asked.collect(out, lse)[0]


def take(x_BHND: Tensor, rows_BHL: Tensor) -> Tensor:
    """Rows of each head [B, H, L, D]."""
    return x_BHND.gather(2, rows_BHL[..., None].expand(*rows_BHL.shape, x_BHND.shape[-1]))


def chunks_at(token_BHTC: Tensor, look_BT: Tensor) -> Tensor:
    """The chunk that each chunk looks at."""
    return token_BHTC.gather(2, look_BT[:, None, :, None].expand_as(token_BHTC))


def in_chunk_ranges(
    token_BHTC: Tensor,
    around_BHTU: Tensor,
    around_BT: Tensor,
    causal: bool,
    include_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """Ranges of keys in one chunk for the rows of another, both sorted by token, padding last.

    Args:
        token_BHTC: token of each row, or a number from ``PADDING`` on.
        around_BHTU: tokens of the keys that each chunk looks at.
        around_BT: number of the chunk that each chunk looks at.
        causal: only earlier tokens.
        include_self: whether a token's own key counts.

    Returns:
        lo, hi [B, H, T, C, 1 or 2]; two ranges where a token is cut out of the middle; empty for
        rows of padding.
    """
    width = around_BHTU.shape[-1]
    around_BHTU, token_BHTC = around_BHTU.contiguous(), token_BHTC.contiguous()
    below = torch.searchsorted(around_BHTU, token_BHTC + int(causal and include_self))
    base = (around_BT * width)[:, None, :, None].expand_as(below)
    stop = base + (around_BHTU < PADDING).sum(dim=-1, keepdim=True)
    if causal:
        lo, hi = [base], [base + below]
    elif include_self:
        lo, hi = [base], [stop]
    else:
        found = around_BHTU.gather(-1, below.clamp_max(width - 1)) == token_BHTC
        own = ((below < width) & found).to(below.dtype)
        lo, hi = [base, base + below + own], [base + below, stop]
    padded = (token_BHTC >= PADDING)[..., None]
    return torch.stack(lo, dim=-1), torch.stack(hi, dim=-1).masked_fill(padded, 0)
