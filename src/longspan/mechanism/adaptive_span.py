"""Adaptive span: each head learns how far back it looks.

Paper: Adaptive Attention Span in Transformers (Sukhbaatar et al. 2019, arXiv 1905.07799).

    m(x) = clamp((R + z - x) / R, 0, 1)              x = i - j >= 0, ramp R, span z = z' max_span
    out_i = sum_j m(i - j) e^s_ij v_j / sum_j m(i - j) e^s_ij
    penalty = mean over heads of z                   added to the loss times a small coefficient

z' in [0, 1] is learned for each head. O(N (z + R) D) time, so a layer gets faster as its spans
shrink; decoding keeps max_span + R tokens. Full weight up to z is a plain window, run by any
kernel; the R keys behind it, where weights fall to 0 and spans get their gradient, are computed in
blocks of rows, and both are merged by log-sum-exp.

How ours differs from the authors' code: the row's own token is attended to (theirs leaves it out),
nothing is added to the denominator, positions are the layer's own (RoPE or none), and the spans of
the window are those of the heads, not of the widest. As there, call ``clip`` after each step of
the optimizer: outside [0, 1] a span gets no gradient.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, T blocks of C
rows, E = C + R - 1 keys that a block reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longspan.errors import InputError
from longspan.mechanism._past import PastLayer, TokenState, in_order
from longspan.mechanism._range_op import over_ranges
from longspan.mechanism.layer import Count, at_least_one, check_heads, rows_at, share, to_front
from longspan.ops import merge
from longspan.ops.inputs import without_autocast


def adaptive_span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    *,
    ramp: int = 32,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention that fades out behind a span.

    Args:
        q: queries [B, H, N, D], rotated if at all.
        k: keys [B, K, N, D]; K divides H.
        v: values [B, K, N, Dv].
        span: z of each query head in tokens [H], at least 0; differentiable.
        ramp: tokens R over which weights fall from 1 to 0.
        mask: True at tokens, False at padding [B, N].
        scale: factor on the logits; default ``D ** -0.5``.
        impl: kernel of ``attend``.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``; 0 at padding.

    Raises:
        InputError: if shapes or sizes do not fit.
    """
    check_heads(q, k, v, mask)
    at_least_one(ramp=ramp)
    if span.shape != (q.shape[1],):
        raise InputError(f"expected one span for each of {q.shape[1]} heads, got {span.shape}")
    q, k, v, place = in_order(q, k, v, mask)
    return _attend(q, k, v, place, span, ramp, scale, impl)


class AdaptiveSpan(PastLayer):
    """Multi-head attention with learned spans, x [B, N, d_model] to the same shape; causal only.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        max_span: largest z, in tokens.
        ramp: tokens R over which weights fall from 1 to 0.
        start: z' of every head at first, from 0 (the paper's) to 1.
        impl: kernel of ``longspan.attend``.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``rope``, ``bias``, ``device``,
            ``dtype``.

    Attributes:
        span: z' of each head [H], a parameter.
    """

    near_dense: ClassVar[Mapping[str, Any]] = {"start": 1.0}

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        max_span: int = 1024,
        ramp: int = 32,
        start: float = 0.0,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        at_least_one(max_span=max_span, ramp=ramp)
        share(start=start)
        self.max_span, self.ramp, self.impl = max_span, ramp, impl
        self.span = nn.Parameter(torch.full((heads,), float(start), **self.place))

    def spans(self) -> Tensor:
        """z of each head in tokens [H], in float32 at least."""
        work = torch.promote_types(self.span.dtype, torch.float32)
        return self.span.to(work).clamp(0, 1) * self.max_span

    def penalty(self) -> Tensor:
        """Mean span in tokens, to be added to the loss times a coefficient."""
        return self.spans().mean()

    @torch.no_grad()
    def clip(self) -> None:
        """Put the spans back into [0, 1]; after each step of the optimizer."""
        self.span.clamp_(0, 1)

    def answer(
        self,
        asked: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        place: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        (q,), (k, v) = asked, kept
        return _attend(q, k, v, place, self.spans(), self.ramp, None, self.impl)

    def remember(
        self, kept: tuple[Tensor, ...], valid: Tensor | None, before: Count
    ) -> TokenState:
        """The last tokens that a later row can see."""
        width = self.max_span + self.ramp - 1
        if valid is None:
            gone = max(0, kept[0].shape[2] - width)
            kept = tuple(x[:, :, gone:] for x in kept)
            return TokenState(kept=kept, valid=None, before=before + gone)
        count = valid.sum(dim=-1)
        width = min(width, kept[0].shape[2])
        row = count[:, None] - width + torch.arange(width, device=count.device)
        order = to_front(valid)[0].gather(1, row.clamp_min(0))
        kept = tuple(rows_at(x, order) for x in kept)
        gone = (count - width).clamp_min(0)
        return TokenState(kept=kept, valid=row >= 0, before=before + gone)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_span={self.max_span}, ramp={self.ramp}"


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor,
    span: Tensor,
    ramp: int,
    scale: float | None,
    impl: str,
) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    # Distances below ``edge`` weigh 1, whatever the span does between two whole numbers.
    edge = span.detach().ceil().to(torch.int64)
    hi = (place + 1)[:, None].expand(len(q), q.shape[1], -1)
    lo = (hi - edge[:, None]).clamp_min(0)
    near = over_ranges(q, k, v, lo[..., None], hi[..., None], factor, impl)
    return merge([near, _fading(q, k, v, place, span, edge, ramp, factor)])[0]


@without_autocast
def _fading(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor,
    span: Tensor,
    edge: Tensor,
    ramp: int,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the ``ramp`` keys behind the edge of each head."""
    rows, keys, device = q.shape[2], k.shape[2], q.device
    # Rows in the order of positions, so that those of a block follow each other.
    order, back = to_front((place >= 0).expand(len(q), -1))
    real = (place >= 0).expand(len(q), -1).gather(1, order)
    first = torch.where(real[:, 0], place.expand(len(q), -1).gather(1, order)[:, 0], 0)
    size = min(max(ramp, 16), rows)
    tail = -rows % size
    q_BHTCD = pad(rows_at(q, order), (0, 0, 0, tail)).unflatten(2, (-1, size))
    real_BTC = pad(real, (0, tail)).unflatten(1, (-1, size))
    read = torch.arange(size + ramp - 1, device=device)
    begin_BHT = (
        first[:, None, None]
        + torch.arange(q_BHTCD.shape[2], device=device) * size
        - (edge + ramp - 1)[:, None]
    )
    key_BHTE = begin_BHT[..., None] + read
    k_BHTED, v_BHTED = (_read(x, key_BHTE.clamp(0, keys - 1)) for x in (k, v))

    # Distance of row c and key e, beyond the edge: the same in every head and block.
    past_CE = torch.arange(size, device=device)[:, None] + ramp - 1 - read
    weight_HCE = ((ramp + span - edge)[:, None, None] - past_CE) / ramp
    weight = weight_HCE.clamp(0, 1)[:, None]
    inside = (past_CE >= 0) & (past_CE < ramp) & (key_BHTE >= 0)[..., None, :]
    visible = inside & real_BTC[:, None, ..., None] & (weight > 0)
    work = torch.promote_types(q.dtype, torch.float32)
    logits = q_BHTCD.to(work) @ k_BHTED.to(work).mT * factor
    empty = ~visible.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~visible, -torch.inf)
    # Not the logarithm of the weight: its gradient at 0 is infinite.
    top = logits.detach().amax(dim=-1, keepdim=True).masked_fill(empty, 0.0)
    mass = (logits - top).exp() * weight
    total = mass.sum(dim=-1, keepdim=True).masked_fill(empty, 1.0)
    out = (mass @ v_BHTED.to(work)) / total
    lse = (top + total.log()).masked_fill(empty, -torch.inf)
    out, lse = (x.flatten(2, 3)[:, :, :rows] for x in (out, lse))
    return rows_at(out, back).to(q.dtype), rows_at(lse, back)[..., 0]


def _read(x: Tensor, key_BHTE: Tensor) -> Tensor:
    """Rows of x [B, K, M, D] for every query head [B, H, T, E, D]."""
    batch, heads, blocks, width = key_BHTE.shape
    index = key_BHTE.reshape(batch, x.shape[1], -1, 1).expand(-1, -1, -1, x.shape[3])
    return x.gather(2, index).view(batch, heads, blocks, width, x.shape[3])
