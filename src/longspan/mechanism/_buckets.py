"""Attention inside buckets that content decides, as key ranges over keys sorted by bucket.

Axes: B batch, H query heads, K key heads, R rounds, N rows, D head width, L rows of a sorted list,
m ranges of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.mechanism._copies import Copies
from longspan.mechanism._range_op import over_ranges
from longspan.ops import merge

# Padding sorts behind every token: it carries its row plus this.
PADDING = 1 << 40


def bucket_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bucket_q_BHRN: Tensor,
    bucket_k_BKRM: Tensor,
    window: int,
    *,
    scale: float,
    include_self: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Each row attends, in every round, to the last ``window`` earlier keys of its own bucket.

    Strictly causal, selection included: which keys a row sees depends on buckets of earlier rows
    alone. Sorted by bucket, then by row, those keys are one range. The rounds stand one behind
    the other in one list, so that a kernel is called once.

    Args:
        q: queries [B, H, N, D], the last N of M rows.
        k: keys [B, K, M, D].
        v: values [B, K, M, Dv].
        bucket_q_BHRN: bucket of each query in each round, below 2**31; negative sees nothing.
        bucket_k_BKRM: bucket of each key; negative is seen by nobody.
        window: most keys per row and round.
        scale: factor on the logits.
        include_self: whether a row's own key counts among the earlier ones.
        impl: kernel name, or ``auto``.

    Returns:
        out [B, H, N, Dv] and lse [B, H, N]; a key that several rounds show counts in each of them;
        0 and -inf where a row sees no key.
    """
    rows, keys, rounds = q.shape[2], k.shape[2], bucket_q_BHRN.shape[2]
    kept, code_k = _by_bucket(bucket_k_BKRM, 0)
    asked, code_q = kept, code_k
    if bucket_q_BHRN is not bucket_k_BKRM:
        asked, code_q = _by_bucket(bucket_q_BHRN, keys - rows)
    begin_q = code_q - code_q % keys
    code_k = code_k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    first, stop = (
        torch.searchsorted(code_k, code.contiguous())
        for code in (begin_q, code_q + int(include_self))
    )
    # Nobody sees the keys before the first bucket, which are those of padding.
    unseen, base = code_q < 0, torch.arange(0, rounds * keys, keys, device=q.device)[:, None]
    lo, hi = (
        (end + base).masked_fill(unseen, 0).flatten(2)[..., None]
        for end in (torch.maximum(first, stop - window), stop)
    )
    given = asked.spread(q), kept.spread(k), kept.spread(v)
    parts = asked.collect(*over_ranges(*given, lo, hi, scale, impl))
    return parts[0] if rounds == 1 else merge(parts)


def _by_bucket(bucket_BHRN: Tensor, first: int) -> tuple[Copies, Tensor]:
    """Rows of every round in the order of their buckets.

    Args:
        bucket_BHRN: buckets of each round.
        first: number of the first row.

    Returns:
        The list of all rounds, and bucket times ``first + N`` plus row of each place [B, H, R, N].
    """
    rounds, rows = bucket_BHRN.shape[2:]
    # Sorting takes time by the bytes of what is sorted.
    bucket, row = bucket_BHRN.to(torch.int32).sort(dim=-1, stable=True)
    turn = torch.arange(rounds, device=row.device)[:, None]
    code = bucket.to(torch.int64) * (first + rows) + first + row
    return Copies((row * rounds + turn).flatten(2), rounds), code


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
    below = _below(around_BHTU, token_BHTC + int(causal and include_self))
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


def _below(sorted_BHTU: Tensor, x_BHTC: Tensor) -> Tensor:
    """How many numbers of each sorted row lie below each one of ``x``."""
    if torch.compiler.is_compiling():
        # The compiler of torch 2.11 fails to search a view. It counts without writing pairs down.
        return (sorted_BHTU[..., None, :] < x_BHTC[..., None]).sum(-1)
    return torch.searchsorted(sorted_BHTU, x_BHTC)
