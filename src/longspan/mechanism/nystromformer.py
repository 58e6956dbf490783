"""Nystromformer: softmax attention approximated through the means of segments.

Paper: Nystromformer (Xiong et al. 2021, arXiv 2102.03902).

    out = softmax(q kl^T) Z (softmax(ql k^T) v) + conv(v),     A = softmax(ql kl^T),  Z ~ A^+
    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4,           Z_0 = A^T / (|A|_1 |A|_inf)

ql, kl are the means of m consecutive segments; logits are divided by sqrt(D). O(N m D + m^3)
time. There is no causal form: every landmark mixes later tokens into earlier rows.

On top of the paper: Z_0 is scaled per head, so a row does not depend on the rest of its batch
(published code takes one maximum over batch and heads: ``shared_start=True``); segments need not
divide the length; padding is left out of landmarks, keys and convolution; N m memory is avoided
by fused attention on both sides of Z.

Axes: B batch, H query heads, K key heads, N rows, m landmarks, D head width.
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
    rows_at,
    to_front,
)
from longspan.ops.inputs import without_autocast


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: int | None = 64,
    *,
    iterations: int = 6,
    shared_start: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention through landmarks.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, N, D]; K divides H.
        v: values [B, K, N, Dv].
        landmarks: segments m; None for exact softmax attention.
        iterations: of the pseudo-inverse; 6 as published leave an error of up to a percent.
        shared_start: scale Z_0 by one maximum over batch and heads, as published code does.
        mask: True at tokens, False at padding [B, N].

    Returns:
        out [B, H, N, Dv]; 0 at padding.
    """
    check_heads(q, k, v, mask)
    repeat = q.shape[1] // k.shape[1]
    gqa = repeat > 1
    valid = hidden = seen_key = None
    if mask is not None:
        valid = mask.to(torch.bool)
        hidden = ~valid[:, None, :, None]
        q, k, v = (x.masked_fill(hidden, 0.0) for x in (q, k, v))
        # A row of padding alone is computed as if it were tokens, then zeroed.
        valid = valid | ~valid.any(dim=-1, keepdim=True)
        seen_key = valid[:, None, None]
    if landmarks is None:
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen_key, enable_gqa=gqa)
    else:
        at_least_one(landmarks=landmarks, iterations=iterations)
        segment_BN, size_Bm = _segments(q, valid, landmarks)
        ql, kl = _means(q, segment_BN, size_Bm), _means(k, segment_BN, size_Bm)
        kl = kl.repeat_interleave(repeat, dim=1)
        used = size_Bm[:, None] > 0
        right = scaled_dot_product_attention(ql, k, v, attn_mask=seen_key, enable_gqa=gqa)
        middle = _middle(ql, kl, right, used, iterations, shared_start)
        out = scaled_dot_product_attention(q, kl, middle, attn_mask=used[:, :, None])
    return out if hidden is None else out.masked_fill(hidden, 0.0)


class Nystromformer(MechanismLayer):
    """Multi-head Nystrom attention, x [B, N, d_model] to the same shape.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        landmarks: segments m; None for exact softmax attention.
        conv_kernel: width of the depthwise convolution over values, odd; None for none.
        iterations: of the pseudo-inverse.
        shared_start: as published code; rows then depend on their batch.
        causal: only False is possible.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``rope``, ``bias``,
            ``project_output``, ``device``, ``dtype``.

    Raises:
        Refusal: for ``causal=True``.
    """

    no_causal_form = "landmarks mix later tokens into earlier rows"

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        landmarks: int | None = 64,
        conv_kernel: int | None = 65,
        iterations: int = 6,
        shared_start: bool = False,
        causal: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        if causal:
            self.refuse_causal()
        given = {"landmarks": landmarks, "conv_kernel": conv_kernel}
        at_least_one(iterations=iterations, **{k: v for k, v in given.items() if v is not None})
        if conv_kernel is not None and conv_kernel % 2 == 0:
            raise InputError(f"conv_kernel must be odd, got {conv_kernel}")
        self.landmarks, self.iterations, self.shared_start = landmarks, iterations, shared_start
        self.conv = (
            None
            if conv_kernel is None
            else nn.Conv2d(
                self.kv_heads,
                self.kv_heads,
                (conv_kernel, 1),
                padding=(conv_kernel // 2, 0),
                bias=False,
                groups=self.kv_heads,
                **self.place,
            )
        )

    @classmethod
    def from_hf(cls, layer: Any) -> Nystromformer:
        """Copy a ``NystromformerSelfAttention`` of transformers: same weights, same outputs.

        Without padding the outputs are equal; with it, ours leave padding out of the landmarks.
        A layer whose ``segment_means_seq_len`` equals ``num_landmarks`` (the default) is exact
        softmax attention there and here.
        """
        conv = layer.conv_kernel_size
        own = cls(
            layer.query.in_features,
            layer.num_attention_heads,
            head_dim=layer.attention_head_size,
            landmarks=None if layer.num_landmarks == layer.seq_len else layer.num_landmarks,
            conv_kernel=conv,
            shared_start=layer.init_option == "original",
            bias=True,
            project_output=False,
            device=layer.query.weight.device,
            dtype=layer.query.weight.dtype,
        )
        own.load_state_dict(layer.state_dict(), strict=conv is not None)
        return own

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        out = nystrom_attention(
            q,
            k,
            v,
            self.landmarks,
            iterations=self.iterations,
            shared_start=self.shared_start,
            mask=valid,
        )
        if self.conv is None:
            return out
        if valid is None:
            near = self.conv(v)
        else:
            # Tokens are neighbours across the padding between them.
            (v,) = cleared(valid, v)
            order, back = to_front(valid)
            near = rows_at(self.conv(rows_at(v, order)), back)
        (out,) = cleared(valid, out + near.repeat_interleave(self.heads // self.kv_heads, dim=1))
        return out


def _segments(x: Tensor, valid: Tensor | None, landmarks: int) -> tuple[Tensor, Tensor]:
    """Segment of each row [B or 1, N] (padding: segment ``landmarks``), and their sizes."""
    if valid is None:
        valid = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    place = valid.cumsum(dim=-1) - 1
    segment = place * landmarks // valid.sum(dim=-1, keepdim=True)
    segment = segment.masked_fill(~valid, landmarks)
    size = torch.zeros(len(valid), landmarks + 1, dtype=torch.int64, device=x.device)
    size = size.scatter_add(1, segment, torch.ones_like(segment))
    return segment, size[:, :-1]


def _means(x: Tensor, segment_BN: Tensor, size_Bm: Tensor) -> Tensor:
    # Sums of many rows leave the range of float16, and a GPU rounds after each of them.
    work = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(*x.shape[:2], size_Bm.shape[1] + 1, x.shape[3], dtype=work)
    total = total.scatter_add(2, segment_BN[:, None, :, None].expand_as(x), x.to(work))
    return (total[:, :, :-1] / size_Bm.clamp_min(1)[:, None, :, None]).to(x.dtype)


@without_autocast
def _middle(
    ql: Tensor, kl: Tensor, right: Tensor, used: Tensor, iterations: int, shared_start: bool
) -> Tensor:
    """Z times what landmarks read [B, H, m, Dv], in the dtype of ``ql``.

    The iteration runs in float32 at least, under autocast too: it squares what is rounded.
    """
    work = torch.promote_types(ql.dtype, torch.float32)
    logits = ql.to(work) @ kl.to(work).mT * ql.shape[-1] ** -0.5
    a = logits.masked_fill(~used[:, :, None], -torch.inf).softmax(dim=-1)
    z = _pseudo_inverse(a * used[..., None], iterations, shared_start)
    return (z @ right.to(work)).to(ql.dtype)


def _pseudo_inverse(a: Tensor, iterations: int, shared_start: bool) -> Tensor:
    columns = a.sum(dim=-2).amax(dim=-1)
    largest = columns.amax() if shared_start else columns[..., None, None]
    # Rows sum to 1, so |A|_inf is 1.
    z = a.mT / largest
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z
