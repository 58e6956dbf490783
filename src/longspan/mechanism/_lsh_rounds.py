"""The two selections of LSH attention: chunks of the sorted rows, and windows inside buckets.

Axes: B batch, H heads, R rounds, N rows, D head width, T chunks of C rows over all rounds, L = T C
rows of the ring, W chunks looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.mechanism._buckets import PADDING, bucket_window, chunks_at, in_chunk_ranges
from longspan.mechanism._copies import Copies
from longspan.mechanism._lsh_union import union
from longspan.mechanism._range_op import over_ranges
from longspan.ops.merge import merge


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; the published norm, its epsilon included.

    In float32 at least: float16 does not hold the slope of a short row, nor the square of a long
    one.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = (wide.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * x.shape[-1] ** -0.5
    return (wide * factor).to(x.dtype)


def over_window(
    q: Tensor,
    qk: Tensor,
    v: Tensor,
    bucket_q: Tensor,
    bucket_k: Tensor,
    window: int,
    scale: float,
    impl: str,
) -> Tensor:
    """Attention to the last ``window`` earlier tokens of the own bucket, merged over rounds.

    Args:
        q: queries [B, H, N, D], the last N of M rows.
        qk: shared queries and keys [B, H, M, D].
        v: values [B, H, M, Dv].
        bucket_q: [B, H, R, N]; negative at padding.
        bucket_k: [B, H, R, M].
        window: most keys per row and round.
        scale: factor on the logits.
        impl: kernel name, or ``auto``.
    """
    k = unit(qk)
    out, lse = bucket_window(
        q, k, v, bucket_q, bucket_k, window, scale=scale, include_self=False, impl=impl
    )
    return _or_self(out, lse, v[:, :, v.shape[2] - q.shape[2] :])


def over_chunks(
    qk: Tensor,
    v: Tensor,
    bucket: Tensor,
    *,
    chunk: int,
    looks: tuple[int, ...],
    causal: bool,
    counting: str,
    masked: bool,
    padded_ring: bool,
    scale: float,
    impl: str,
) -> Tensor:
    """Attention in chunks of the sorted rows; see ``lsh_attention``.

    Args:
        qk: shared queries and keys [B, H, N, D].
        v: values [B, H, N, Dv].
        bucket: [B, H, R, N]; negative at padding.
        chunk: rows of a chunk.
        looks: offsets in the ring of the chunks looked at.
        causal: only earlier tokens.
        counting: ``multiset`` or ``union``.
        masked: whether there may be padding.
        padded_ring: chunks of padding are part of the ring.
        scale: factor on the logits.
        impl: kernel name, or ``auto``.
    """
    rows, rounds = qk.shape[2], bucket.shape[2]
    extra = -rows % chunk
    qk, v = pad(qk, (0, 0, 0, extra)), pad(v, (0, 0, 0, extra))
    bucket = pad(bucket, (0, extra), value=-1)
    absent = bucket < 0
    # Padding sorts behind every bucket.
    bucket = torch.where(absent, bucket.amax() + 1, bucket)
    # Sorting takes time by the bytes of what is sorted.
    order = bucket.to(torch.int32).sort(dim=-1, stable=True).indices
    token = order + PADDING * absent.gather(-1, order)
    token_BHTC = token.unflatten(-1, (-1, chunk)).sort(dim=-1).values.flatten(2, 3)
    k, row_BHL = unit(qk), token_BHTC.flatten(2) % PADDING
    of_round = torch.arange(rounds, device=qk.device).repeat_interleave(rows + extra)
    copies = Copies(row_BHL * rounds + of_round, rounds)
    look_WBT = _ring(absent[:, 0, 0], chunk, rounds, looks, padded_ring)
    # With padding a ring may have as few as one chunk per round.
    shortest = rounds if masked and not padded_ring else token_BHTC.shape[2]
    if counting == "union":
        found = [union(qk, k, v, token_BHTC, look_WBT, rounds, causal, scale)]
    else:
        sorted_q, sorted_k, sorted_v = (copies.spread(x) for x in (qk, k, v))
        found = []
        # In a ring too short, chunks looked at coincide, and ranges of one call must not.
        for group in (look_WBT,) if shortest >= len(looks) else look_WBT[:, None]:
            pairs = [
                in_chunk_ranges(token_BHTC, chunks_at(token_BHTC, look), look, causal)
                for look in group
            ]
            lo, hi = (torch.cat(ends, dim=-1).flatten(2, 3) for ends in zip(*pairs, strict=True))
            found.append(over_ranges(sorted_q, sorted_k, sorted_v, lo, hi, scale, impl))
    parts = [part for out, lse in found for part in copies.collect(out, lse)]
    return _or_self(*merge(parts), v)[:, :, :rows]


def _ring(
    absent_BN: Tensor, chunk: int, rounds: int, looks: tuple[int, ...], padded: bool
) -> Tensor:
    """Chunks that each chunk looks at [W, B, T]."""
    per_round = absent_BN.shape[1] // chunk
    used_B1 = torch.full_like(absent_BN[:, :1], per_round, dtype=torch.int64)
    if not padded:
        used_B1 = (-(-(~absent_BN).sum(dim=1, keepdim=True) // chunk)).clamp_min(1)
    at = torch.arange(rounds * per_round, device=absent_BN.device)
    place_BT = at // per_round * used_B1 + (at % per_round).minimum(used_B1 - 1)
    to_WBT = torch.stack([(place_BT + o) % (rounds * used_B1) for o in looks])
    return to_WBT // used_B1 * per_round + to_WBT % used_B1


def _or_self(out: Tensor, lse: Tensor, v: Tensor) -> Tensor:
    """A token that sees nothing else sees itself."""
    return torch.where(lse.isneginf()[..., None], v.to(out.dtype), out)
