"""MoBA: each query attends to its own block and to the past blocks whose mean key fits it best.

Paper: MoBA, Mixture of Block Attention for Long-Context LLMs (Lu et al. 2025, arXiv 2502.13189).

    score_ib = q_i . mean(k_j : j in block b)        b < i // S
    out_i    = softmax(q_i . k_j / sqrt(D)) v_j      j <= i in the own block and the best top - 1

O(N^2 / S D + N top S D) time. No parameters beyond the projections; no gradient passes through
the selection, which trains through the attention to what was selected. Only blocks that have ended
are scored, so nothing leaks. Blocks of 512 with top 3 for small models, 4096 with top 12 for large
ones in the paper.

``share_blocks`` lets the query heads that share a key head choose together, by the sum of their
scores, as those of NSA do: keys of a block are then read once for the whole group.

On top of the paper: grouped queries, padding (blocks count tokens), odd lengths, decoding with the
tokens so far as its state, and selected blocks go to any kernel as key ranges. Of equal scores the
earlier block is taken.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, S block size,
T blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.mechanism._blocks import best_blocks, over_blocks, slices
from longspan.mechanism._past import PastLayer, in_order
from longspan.mechanism.layer import at_least_one, check_heads
from longspan.ops.inputs import without_autocast


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    top: int,
    share_blocks: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention to the own block and the best past ones.

    Args:
        q: queries [B, H, N, D], rotated if at all.
        k: keys [B, K, N, D]; K divides H.
        v: values [B, K, N, Dv].
        block: tokens of a block S.
        top: blocks a row sees, its own included.
        share_blocks: query heads of a key head select together; False: each for itself.
        mask: True at tokens, False at padding [B, N].
        scale: factor on the logits; default ``D ** -0.5``.
        impl: kernel of ``attend``.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``; 0 at padding.

    Raises:
        InputError: if shapes or sizes do not fit.
    """
    check_heads(q, k, v, mask)
    at_least_one(block=block, top=top)
    q, k, v, place = in_order(q, k, v, mask)
    return _attend(q, k, v, place, block, top, share_blocks, scale, impl)


class MoBA(PastLayer):
    """Multi-head mixture of block attention, x [B, N, d_model] to the same shape; causal only.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        block: tokens of a block S.
        top: blocks a row sees, its own included.
        share_blocks: query heads of a key head select together; False: each for itself.
        impl: kernel of ``longspan.attend``.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``rope``, ``bias``, ``device``,
            ``dtype``. As in the paper's code, scores compare rotated queries with means of rotated
            keys.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        block: int = 512,
        top: int = 3,
        share_blocks: bool = False,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        at_least_one(block=block, top=top)
        self.block, self.top, self.impl = block, top, impl
        self.share_blocks = share_blocks

    def answer(
        self,
        asked: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        place: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        (q,), (k, v) = asked, kept
        sizes = self.block, self.top, self.share_blocks
        return _attend(q, k, v, place, *sizes, None, self.impl)

    def extra_repr(self) -> str:
        shared = ", share_blocks=True" if self.share_blocks else ""
        return f"{super().extra_repr()}, block={self.block}, top={self.top}{shared}"


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor,
    size: int,
    top: int,
    share_blocks: bool,
    scale: float | None,
    impl: str,
) -> Tensor:
    own = place.div(size, rounding_mode="floor")
    chosen = _select(q.detach(), k.detach(), own, size, top - 1, share_blocks)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    near = ((own * size).clamp_min(0), place + 1)
    return over_blocks(q, k, v, [near], chosen, size, factor, impl)


@without_autocast
def _select(
    q: Tensor, k: Tensor, own: Tensor, size: int, count: int, share_blocks: bool
) -> Tensor:
    """Best past blocks of each row [B, H, N, t], or [B, K, N, t] where heads share them."""
    work = torch.promote_types(q.dtype, torch.float32)
    # A block that has not ended is never scored: it may be left short.
    mean = torch.nn.functional.pad(k.to(work), (0, 0, 0, -k.shape[2] % size))
    mean = mean.unflatten(2, (-1, size)).mean(dim=3)
    if share_blocks:
        # Scores are linear in the query: their sum is that of the summed queries.
        q = q.to(work).unflatten(1, (k.shape[1], -1)).sum(dim=2)
    else:
        mean = mean.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    found = []
    for rows in slices(q.shape[2], q.shape[0] * q.shape[1] * mean.shape[2]):
        score = q[:, :, rows].to(work) @ mean.mT
        found.append(best_blocks(score, own[:, rows], count))
    return torch.cat(found, dim=2)
