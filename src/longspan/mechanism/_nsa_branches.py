"""The two branches of NSA that go beyond a window: compressed blocks, and blocks chosen by them.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, S compressed
blocks, T blocks that can be selected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longspan.mechanism._blocks import best_blocks, over_blocks, slices
from longspan.mechanism._nsa_scores import group_weights, onto_blocks
from longspan.mechanism._range_op import over_ranges

# Times as many scores exist at a time on a GPU as elsewhere.
_MORE = 4
# How much each compressed block weighs for some rows, summed over a group's heads [B, K, n, S].
Weigh = Callable[[slice], Tensor]
# Blocks [B, K, M, D] to their summaries [B, K, S, D], given the stride.
Phi = Callable[[Tensor, int], Tensor]


def compression(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor,
    block: int,
    stride: int,
    impl: str,
    phi: tuple[Phi, Phi] | None = None,
) -> tuple[Tensor, Weigh]:
    """Attention to summaries of blocks that have ended.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, M, D] in the order of positions.
        v: values [B, K, M, Dv].
        place: position of each query [1 or B, N]; -1 at padding.
        block: tokens of a block.
        stride: tokens between the starts of two blocks.
        impl: kernel name, or ``auto``.
        phi: what summarises keys and values; None for the mean.

    Returns:
        out [B, H, N, Dv], and without gradient how much each block weighs, for rows as they are
        asked for: all of them would take more memory than anything else.
    """
    if k.shape[2] < block:
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        none = q.new_zeros(len(q), k.shape[1], q.shape[2], 1)
        return out, lambda rows: none[:, :, rows]
    if phi is None:
        k, v = (x.unfold(2, block, stride).mean(dim=-1) for x in (k, v))
    else:
        k, v = phi[0](k, stride), phi[1](v, stride)
    # Padding, at -1, comes before any end.
    ended = (place + 1 - block).div(stride, rounding_mode="floor") + 1
    ended = ended.clamp(0, k.shape[2])
    ends, scale = ended[:, None, :, None], q.shape[-1] ** -0.5
    out, lse = over_ranges(q, k, v, torch.zeros_like(ends), ends, scale, impl)
    q, k, lse = q.detach(), k.detach(), lse.detach()

    def weigh(rows: slice) -> Tensor:
        return group_weights(q[:, :, rows], k, lse[:, :, rows], ended[:, rows], scale)

    return out, weigh


def selection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weigh: Weigh,
    place: Tensor,
    block: int,
    stride: int,
    size: int,
    select: int,
    impl: str,
) -> Tensor:
    """Attention to the first, previous and own block, and to those that weigh most.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, M, D] in the order of positions.
        v: values [B, K, M, Dv].
        weigh: what compressed blocks weigh.
        place: position of each query [1 or B, N]; -1 at padding.
        block: tokens of a compressed block.
        stride: tokens between the starts of two of them.
        size: tokens of a selected block.
        select: selected blocks of a row.
        impl: kernel name, or ``auto``.

    Returns:
        out [B, H, N, Dv]; 0 at padding.
    """
    own = place.div(size, rounding_mode="floor")
    begin = ((own - 1) * size).clamp_min(0)
    near = [(torch.zeros_like(own), begin.clamp_max(size)), (begin, place + 1)]
    blocks = -(-k.shape[2] // size)
    # A GPU is busy with more rows at a time.
    numbers = q.shape[0] * q.shape[1] * (k.shape[2] // stride) // (_MORE if q.is_cuda else 1)
    found = []
    for rows in slices(q.shape[2], numbers):
        score, lay = onto_blocks(weigh(rows), block, stride, size, blocks)
        found.append(best_blocks(score, own[:, rows] - 1, select - 3, first=1, lay=lay))
    chosen = torch.cat(found, dim=2)
    return over_blocks(q, k, v, near, chosen, size, q.shape[-1] ** -0.5, impl)
