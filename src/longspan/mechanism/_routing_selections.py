"""The two selections of routing attention: tokens that clusters take, and windows inside clusters.

Axes: B batch, H query heads, K key heads, N rows, D head width, c clusters, w rows of a cluster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longspan.mechanism._buckets import PADDING, bucket_window, in_chunk_ranges, take
from longspan.mechanism._range_op import over_ranges


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, or 0 where they are 0.

    In float32 at least: float16 does not hold the least length that they are divided by.
    """
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def similarity(x_BHND: Tensor, centroids_KcD: Tensor) -> Tensor:
    """Cosine of rows and centroids, times the length of these [B, H, N, c]; no gradient."""
    repeat = x_BHND.shape[1] // centroids_KcD.shape[0]
    rows = unit(x_BHND.detach()).to(x_BHND.dtype)
    return rows @ centroids_KcD.to(rows.dtype).repeat_interleave(repeat, dim=0).mT


def nearest(near_BHNc: Tensor, valid: Tensor | None) -> Tensor:
    """Nearest centroid of each row [B, H, N]; -1 at padding."""
    found = near_BHNc.argmax(dim=-1)
    return found if valid is None else found.masked_fill(~valid[:, None], -1)


def over_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cluster_q: Tensor,
    cluster_k: Tensor,
    window: int,
    shared_key: bool,
    impl: str,
) -> Tensor:
    """Attention to the last ``window`` keys of the own cluster; a row that finds none sees itself.

    Args:
        q: queries [B, H, N, D], the last N of M rows.
        k: keys [B, K, M, D].
        v: values [B, K, M, Dv].
        cluster_q: of each query [B, H, N]; negative at padding.
        cluster_k: of each key [B, K, M].
        window: most keys of a row.
        shared_key: a row does not count itself among them.
        impl: kernel name, or ``auto``.
    """
    scale = q.shape[-1] ** -0.5
    out, lse = bucket_window(
        q,
        k,
        v,
        cluster_q[:, :, None],
        cluster_k[:, :, None],
        window,
        scale=scale,
        include_self=not shared_key,
        impl=impl,
    )
    own = v[:, :, v.shape[2] - q.shape[2] :].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.where((lse.isneginf() & (cluster_q >= 0))[..., None], own, out)


def over_clusters(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor,
    near_k: Tensor,
    valid: Tensor | None,
    window: int,
    causal: bool,
    shared_key: bool,
    impl: str,
) -> Tensor:
    """Attention among the tokens that each cluster takes, mean over the clusters of a row.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, N, D].
        v: values [B, K, N, Dv].
        near_q: similarity of queries and centroids [B, H, N, c].
        near_k: of keys and centroids [B, K, N, c].
        valid: False at padding [B, N]; None if there is none.
        window: tokens that a cluster takes.
        causal: only keys up to the row.
        shared_key: a token sees itself only if it sees nothing else.
        impl: kernel name, or ``auto``.
    """
    repeat = q.shape[1] // k.shape[1]
    token_q, token_k = (_members(near, valid, window) for near in (near_q, near_k))
    look = torch.arange(token_q.shape[2], device=q.device)[None]
    lo, hi = in_chunk_ranges(
        token_q, token_k.repeat_interleave(repeat, dim=1), look, causal, not shared_key
    )
    row_q, row_k = token_q.flatten(2) % PADDING, token_k.flatten(2) % PADDING
    out, lse = over_ranges(
        take(q, row_q),
        take(k, row_k),
        take(v, row_k),
        lo.flatten(2, 3),
        hi.flatten(2, 3),
        q.shape[-1] ** -0.5,
        impl,
    )
    counts = ~lse.isneginf()
    if shared_key:
        alone = ~counts & (token_q.flatten(2) < PADDING)
        out = torch.where(alone[..., None], take(v, row_q), out)
        counts = counts | alone
    total = out.new_zeros(*q.shape[:3], out.shape[-1])
    total = total.scatter_add(2, row_q[..., None].expand_as(out), out)
    times = out.new_zeros(q.shape[:3]).scatter_add(2, row_q, counts.to(out.dtype))
    return total / times.clamp_min(1)[..., None]


def _members(near_BHNc: Tensor, valid: Tensor | None, window: int) -> Tensor:
    """Tokens that each cluster takes [B, H, c, w], in order; padding carries ``PADDING`` more."""
    if valid is not None:
        near_BHNc = near_BHNc.masked_fill(~valid[:, None, :, None], -torch.inf)
    best, token = near_BHNc.topk(min(window, near_BHNc.shape[2]), dim=2)
    return (token + PADDING * best.isneginf()).mT.sort(dim=-1).values
