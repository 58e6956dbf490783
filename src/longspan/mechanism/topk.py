"""Top-k attention: each row keeps its k largest logits.

Paper: Explicit Sparse Transformer (Zhao et al. 2019, arXiv 1912.11637).

    z_ij = q_i . k_j / sqrt(D)
    out_i = softmax(z_ij) v_j       over the j whose z_ij is at least the k-th largest of row i

O(N^2 D) time: finding the k largest takes all logits. O(N) memory: logits exist for a slice of the
rows at a time, in the backward pass too, which computes them again. What it saves is noise, not
work; it is the bound that cheaper selections (``BlockGate``, ``MoBA``) can be held against.

Logits equal to the k-th largest are all kept. Gradients reach the kept pairs only. On top of the
paper: a strictly causal form that decodes, grouped queries, padding.

Axes: B batch, H query heads, K key heads, G = H / K, N query rows, M key rows, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.errors import InputError
from longspan.mechanism._blocks import slices
from longspan.mechanism._past import PastLayer, TokenState, in_order
from longspan.mechanism.layer import at_least_one, check_heads
from longspan.ops.inputs import without_autocast


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: int,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention to the keys of the largest logits.

    Args:
        q: queries [B, H, N, D], rotated if at all.
        k: keys [B, K, N, D]; K divides H; each query head selects for itself.
        v: values [B, K, N, Dv].
        keep: keys of a row, k.
        causal: row i sees keys up to i.
        mask: True at tokens, False at padding [B, N].
        scale: factor on the logits; default ``D ** -0.5``.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``; 0 at padding. Computed in float32 at least.

    Raises:
        InputError: if shapes or sizes do not fit.
    """
    check_heads(q, k, v, mask)
    at_least_one(keep=keep)
    q, k, v, place = in_order(q, k, v, mask)
    return _attend(q, k, v, place, keep, causal, scale)


class TopK(PastLayer):
    """Multi-head top-k attention, x [B, N, d_model] to the same shape.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        keep: keys of a row, k.
        causal: row i sees tokens up to i.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``rope``, ``bias``, ``device``,
            ``dtype``.
    """

    def __init__(
        self, d_model: int, heads: int, *, keep: int = 64, causal: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        at_least_one(keep=keep)
        self.keep, self.causal = keep, causal

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        state: TokenState | None = None,
        return_state: bool = False,
    ) -> Any:
        if not self.causal and (state is not None or return_state):
            raise InputError("a state exists only for causal=True")
        return super().forward(x, mask, state=state, return_state=return_state)

    def answer(
        self,
        asked: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        place: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        (q,), (k, v) = asked, kept
        return _attend(q, k, v, place, self.keep, self.causal, None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}"


def _attend(
    q: Tensor, k: Tensor, v: Tensor, place: Tensor, keep: int, causal: bool, scale: float | None
) -> Tensor:
    rows, keys = q.shape[2], k.shape[2]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    # Keys that each row sees; padding sees none.
    seen = place + 1
    if not causal:
        seen = seen.amax(dim=-1, keepdim=True).where(place >= 0, 0)
    out = []
    # Cut finely: a causal slice computes the keys up to its last row.
    for part in slices(rows, q.shape[0] * q.shape[1] * keys, most=max(64, rows // 16)):
        # A row stands no later than its number says.
        end = keys - rows + part.stop if causal else keys
        own = (q[:, :, part], k[:, :, :end], v[:, :, :end], seen[:, part], keep, factor)
        out.append(
            checkpoint(_slice, *own, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else _slice(*own)
        )
    return torch.cat(out, dim=2)


@without_autocast
def _slice(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, keep: int, factor: float) -> Tensor:
    work = torch.promote_types(q.dtype, torch.float32)
    q_BKGND = (q.to(work) * factor).unflatten(1, (k.shape[1], -1))
    logits = q_BKGND @ k.to(work).mT[:, :, None]
    hidden = torch.arange(k.shape[2], device=k.device) >= seen[:, None, None, :, None]
    empty = (seen == 0)[:, None, None, :, None]
    # A row of -inf alone would be NaN in the gradient too: it is computed unmasked, then zeroed.
    logits.masked_fill_(hidden & ~empty, -torch.inf)
    if keep < k.shape[2]:
        logits.masked_fill_(logits < _kth_largest(logits.detach(), keep), -torch.inf)
    out = (logits.softmax(dim=-1) @ v.to(work)[:, :, None]).masked_fill(empty, 0.0)
    return out.flatten(1, 2).to(q.dtype)


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """The k-th largest number of each row [..., 1].

    The k largest lie in the k groups of the largest maxima: with groups of sqrt(M / k), two
    selections among sqrt(M k) numbers each take the place of one among M.
    """
    size = math.isqrt(x.shape[-1] // k)
    if size > 1:
        groups = x.shape[-1] // size
        whole = x[..., : groups * size].unflatten(-1, (size, groups))
        best = whole.amax(dim=-2).topk(k, dim=-1, sorted=False).indices
        members = whole.gather(-1, best[..., None, :].expand(*whole.shape[:-1], k))
        x = torch.cat([members.flatten(-2), x[..., groups * size :]], dim=-1)
    return x.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
