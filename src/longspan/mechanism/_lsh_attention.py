"""LSH attention on tensors: hashing, and attention among tokens of equal hash (see ``lsh``).

Axes: B batch, H heads, R rounds, N rows, D head width, F columns of a rotation and its negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.mechanism._lsh_rounds import over_chunks, over_window
from longspan.mechanism.layer import at_least, at_least_one, check_heads


def hash_buckets(
    x_BHND: Tensor, rotations: Tensor, factors: tuple[int, ...] | None = None
) -> Tensor:
    """Buckets of the rows of x.

    Args:
        x_BHND: rows to hash; no gradient passes.
        rotations: [H, D, R, F / 2], random.
        factors: even numbers that sum to F: the buckets are the product of one hash each.

    Returns:
        whole numbers [B, H, R, N] below F, or below the product of the factors.
    """
    turned = torch.einsum("bhnd,hdrc->bhrnc", x_BHND.detach(), rotations.to(x_BHND.dtype))
    bucket, base = torch.zeros_like(turned[..., 0], dtype=torch.int64), 1
    halves = [f // 2 for f in factors or (2 * turned.shape[-1],)]
    for half, part in zip(halves, turned.split(halves, dim=-1), strict=True):
        top, at = part.max(dim=-1)
        low, below = part.min(dim=-1)
        bucket = bucket + base * torch.where(top >= -low, at, half + below)
        base *= 2 * half
    return bucket


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    bucket: Tensor,
    *,
    chunk: int = 64,
    before: int = 1,
    after: int = 0,
    causal: bool = True,
    selection: str = "chunks",
    counting: str = "multiset",
    padded_ring: bool = False,
    scale: float = 1.0,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention among tokens of equal hash.

    Args:
        qk: shared queries and keys [B, H, M, D]; keys are normalised here.
        v: values [B, H, M, Dv].
        bucket: whole numbers from 0, below 2**31 [B, H, R, M], one row per round, as of
            ``hash_buckets``.
        chunk: rows c of a chunk.
        before: chunks looked at before the own one.
        after: chunks looked at after it; 0 for the window.
        causal: row i sees tokens before it.
        selection: ``chunks`` or ``window``, see ``lsh``.
        counting: ``multiset`` or ``union``.
        padded_ring: chunks of padding are part of the ring, as in published code; the first
            chunk of a round then looks back into padding, so rows change with the padding.
        scale: factor on the logits q . k / |k|; published: 1 (Trax, transformers), or D^-0.5.
        mask: True at tokens, False at padding [B, M].
        impl: kernel name, or ``auto``.

    Returns:
        out [B, H, M, Dv] in the dtype of ``qk``; 0 at padding. No gradient through the buckets.

    Raises:
        InputError: if shapes or names do not fit.
    """
    check_heads(qk, qk, v, mask)
    at_least_one(chunk=chunk)
    at_least(0, before=before, after=after)
    check_names(selection, counting, causal, after, bucket.shape[2] if bucket.dim() == 4 else 1)
    if bucket.dim() != 4 or bucket.shape[:2] != qk.shape[:2] or bucket.shape[3] != qk.shape[2]:
        raise InputError(
            f"expected bucket [{qk.shape[0]}, {qk.shape[1]}, rounds, {qk.shape[2]}], "
            f"got {list(bucket.shape)}"
        )
    hidden = None
    if mask is not None:
        hidden = ~mask.to(torch.bool)[:, None, :, None]
        qk, v = qk.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        bucket = bucket.masked_fill(hidden.mT, -1)
    if selection == "window":
        out = over_window(qk, qk, v, bucket, bucket, chunk * (1 + before), scale, impl)
    else:
        looks = tuple(range(-before, after + 1))
        out = over_chunks(
            qk,
            v,
            bucket,
            chunk=chunk,
            looks=looks,
            causal=causal,
            counting=counting,
            masked=mask is not None,
            padded_ring=padded_ring,
            scale=scale,
            impl=impl,
        )
    return out if hidden is None else out.masked_fill(hidden, 0.0)


def check_names(selection: str, counting: str, causal: bool, after: int, rounds: int = 1) -> None:
    """Refuse names and combinations that do not exist.

    Raises:
        InputError: naming them.
    """
    if selection not in ("chunks", "window") or counting not in ("multiset", "union"):
        raise InputError(
            "selection must be chunks or window and counting multiset or union; "
            f"got {selection!r} and {counting!r}"
        )
    if selection == "window" and (not causal or after):
        raise InputError('selection="window" is causal: it needs causal=True and after=0')
    if selection == "window" and counting == "union" and rounds > 1:
        raise InputError(
            'counting="union" needs the counts of single pairs, which selection="window" does not '
            'make: use counting="multiset", or rounds=1'
        )
