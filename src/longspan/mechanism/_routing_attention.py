"""Routing attention on tensors: attention inside clusters (see ``routing``).

Axes: B batch, H query heads, K key heads, N rows, D head width, c clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.mechanism._routing_selections import (
    nearest,
    over_clusters,
    over_window,
    similarity,
    unit,
)
from longspan.mechanism.layer import at_least_one, check_heads


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    *,
    window: int,
    causal: bool = True,
    selection: str = "clusters",
    shared_key: bool = False,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention inside clusters.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, N, D]; K divides H.
        v: values [B, K, N, Dv].
        centroids: [K, c, D].
        window: rows w of a cluster.
        causal: row i sees keys up to i.
        selection: ``clusters`` or ``window``, see ``routing``.
        shared_key: k is q: keys are scaled to unit length, and a token sees itself only if it
            sees nothing else.
        mask: True at tokens, False at padding [B, N].
        impl: kernel name, or ``auto``.

    Returns:
        out [B, H, N, Dv]; 0 at padding and (clusters) where no cluster takes a row. No gradient
        passes through the selection.

    Raises:
        InputError: if shapes or names do not fit.
    """
    check_heads(q, k, v, mask)
    at_least_one(window=window)
    check_names(selection, causal)
    if centroids.dim() != 3 or centroids.shape[::2] != k.shape[1::2]:
        raise InputError(
            f"expected centroids [{k.shape[1]}, clusters, {k.shape[3]}], "
            f"got {list(centroids.shape)}"
        )
    valid = None
    if mask is not None:
        valid = mask.to(torch.bool)
        q, k, v = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (q, k, v))
    near_q, near_k = similarity(q, centroids), similarity(k, centroids)
    if shared_key:
        k = unit(k).to(k.dtype)
    if selection == "window":
        one = (nearest(near_q, valid), nearest(near_k, valid))
        out = over_window(q, k, v, *one, window, shared_key, impl)
    else:
        out = over_clusters(q, k, v, near_q, near_k, valid, window, causal, shared_key, impl)
    return out if valid is None else out.masked_fill(~valid[:, None, :, None], 0.0)


def check_names(selection: str, causal: bool) -> None:
    """Refuse names and combinations that do not exist.

    Raises:
        InputError: naming them.
    """
    if selection not in ("clusters", "window"):
        raise InputError(f"selection must be clusters or window, got {selection!r}")
    if selection == "window" and not causal:
        raise InputError('selection="window" is causal: it needs causal=True')
