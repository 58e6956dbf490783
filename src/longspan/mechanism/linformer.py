"""Linformer: keys and values projected along the sequence to a fixed number of rows.

Paper: Linformer, Self-Attention with Linear Complexity (Wang et al. 2020, arXiv 2006.04768).

    out = softmax(q (E^T k)^T / sqrt(D)) F^T v,    E, F [n, r]

O(N r D) time. E and F belong to positions: a sequence is at most ``max_length`` long, a shorter
one uses their first rows. There is no causal form: every projected row mixes all positions.

On top of the paper: padding on either side changes nothing (tokens are moved to the front and
padding is removed from the sums); grouped key and value heads.

Axes: B batch, H query heads, K key heads, N rows, D head width, L longest sequence, r projected
rows, S = K, or 1 where heads share a projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from longspan.errors import InputError
from longspan.mechanism.layer import (
    MechanismLayer,
    at_least_one,
    check_heads,
    cleared,
    to_front,
)

SHARING = ("none", "heads", "key_value")


def linformer_attention(
    q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Attention over projected keys and values.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, N, D]; K divides H.
        v: values [B, K, N, Dv].
        e: projection of keys [S, L, r] with S = 1 or K and L >= N.
        f: projection of values, same shape.
        mask: True at tokens, False at padding [B, N].

    Returns:
        out [B, H, N, Dv]; 0 at padding.

    Raises:
        InputError: if shapes do not fit, or the sequence is longer than the projections.
    """
    check_heads(q, k, v, mask)
    rows = k.shape[2]
    if e.dim() != 3 or f.shape != e.shape or e.shape[0] not in (1, k.shape[1]):
        raise InputError(
            f"expected e and f [1 or {k.shape[1]}, L, r]; got {list(e.shape)} and {list(f.shape)}"
        )
    if rows > e.shape[1]:
        raise InputError(f"the projections were made for {e.shape[1]} rows, got {rows}")
    hidden = None
    if mask is not None:
        valid = mask.to(torch.bool)
        hidden = ~valid[:, None, :, None]
        order = to_front(valid)[0][:, None, :, None]
        q, k, v = cleared(valid, q, k, v)
        k, v = (x.gather(2, order.expand_as(x)) for x in (k, v))
    k_BKrD, v_BKrD = e[:, :rows].mT.to(k.dtype) @ k, f[:, :rows].mT.to(v.dtype) @ v
    out = scaled_dot_product_attention(q, k_BKrD, v_BKrD, enable_gqa=q.shape[1] != k.shape[1])
    return out if hidden is None else out.masked_fill(hidden, 0.0)


class Linformer(MechanismLayer):
    """Multi-head Linformer attention, x [B, N, d_model] to the same shape.

    To share projections between layers as well, assign one layer's ``project_key`` and
    ``project_value`` to the others.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        max_length: longest sequence L.
        rank: projected rows r.
        sharing: ``none`` (own E and F per key head), ``heads`` (one E and one F), or
            ``key_value`` (one matrix for both).
        causal: only False is possible.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``rope``, ``bias``, ``device``,
            ``dtype``.

    Raises:
        Refusal: for ``causal=True``.
    """

    no_causal_form = "each projected key and value mixes all positions"

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        max_length: int = 512,
        rank: int = 256,
        sharing: str = "heads",
        causal: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        if causal:
            self.refuse_causal()
        at_least_one(max_length=max_length, rank=rank)
        if sharing not in SHARING:
            raise InputError(f"sharing must be one of {', '.join(SHARING)}; got {sharing!r}")
        shape = (self.kv_heads if sharing == "none" else 1, max_length, rank)
        self.project_key = nn.Parameter(torch.empty(shape, **self.place))
        self.project_value = (
            self.project_key
            if sharing == "key_value"
            else nn.Parameter(torch.empty(shape, **self.place))
        )
        for parameter in (self.project_key, self.project_value):
            nn.init.uniform_(parameter, -(rank**-0.5), rank**-0.5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        return linformer_attention(q, k, v, self.project_key, self.project_value, mask=valid)
