"""What a block gate learns from: dense attention, summed over blocks, and how far scores are off.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, T blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.mechanism._blocks import slices
from longspan.ops.inputs import without_autocast


@without_autocast
@torch.no_grad()
def block_mass(
    q: Tensor, k: Tensor, place: Tensor, block: int, *, largest: bool = False
) -> Tensor:
    """Dense causal attention of each row to each block [B, K, N, T]; 0 at padding.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, M, D].
        place: of each row [1 or B, N]; -1 at padding.
        block: tokens of a block.
        largest: the largest weight of any token and head, instead of the sum over tokens, mean
            over the heads of a group.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    group, keys = q.shape[1] // k.shape[1], torch.arange(k.shape[2], device=k.device)
    k = k.to(work).mT[:, :, None] * q.shape[-1] ** -0.5
    found = []
    for rows in slices(q.shape[2], q.shape[0] * q.shape[1] * len(keys)):
        logit = q[:, :, rows].to(work).unflatten(1, (-1, group)) @ k
        hidden = (keys > place[:, rows, None])[:, None, None]
        weight = logit.masked_fill(hidden, torch.finfo(work).min).softmax(dim=-1)
        weight = weight.masked_fill(hidden, 0.0)
        blocks = pad(weight, (0, -len(keys) % block)).unflatten(-1, (-1, block))
        found.append(blocks.amax(dim=(2, 5)) if largest else blocks.sum(dim=5).mean(dim=2))
    return torch.cat(found, dim=2)


def of_block_pairs(wanted: Tensor, own: Tensor, blocks: int, *, largest: bool) -> Tensor:
    """Targets of rows [B, K, N, T] as those of whole blocks of rows [B, K, T, T].

    Args:
        wanted: of each row, what falls on each block.
        own: block of each row [B, N].
        blocks: T.
        largest: take the largest of a block's rows instead of their sum.
    """
    index = own[:, None, :, None].expand_as(wanted)
    found = wanted.new_zeros(*wanted.shape[:2], blocks, blocks)
    return found.scatter_reduce(2, index, wanted, "amax" if largest else "sum")


def divergence(score: Tensor, wanted: Tensor, past: Tensor) -> Tensor:
    """Mean over rows of KL(wanted || softmax of the scores) over past blocks, in nats.

    Args:
        score: [B, K, N, T].
        wanted: mass of each block [B, K, N, T], of any sum; rows without any do not count.
        past: True at blocks that count [1 or B, 1, N, T].
    """
    wanted = wanted.masked_fill(~past, 0.0)
    total = wanted.sum(dim=-1, keepdim=True)
    used = total > 0
    wanted = wanted / total.masked_fill(~used, 1.0)
    # A row without earlier blocks is computed unmasked, then left out.
    score = score.masked_fill(~past & past.any(-1, keepdim=True), -torch.inf)
    log = score.log_softmax(dim=-1).masked_fill(~past, 0.0)
    apart = torch.special.xlogy(wanted, wanted) - wanted * log
    return apart.sum() / used.sum().clamp_min(1)
