"""How a block gate scores blocks and chooses among them.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, W gate width, S
block size, T blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.mechanism._blocks import best_blocks, slices
from longspan.ops.inputs import without_autocast


def own_block(place: Tensor, block: int, batch: int) -> Tensor:
    """Block of each row [B, N]; 0 at padding."""
    return place.clamp_min(0).div(block, rounding_mode="floor").expand(batch, -1)


def pooled_keys(k_BKMD: Tensor, block: int) -> Tensor:
    """Largest, least and mean key of each block side by side [B, K, T, 3 D].

    Blocks that have not ended are never scored: the last may be left short.
    """
    k_BKTSD = pad(k_BKMD, (0, 0, 0, -k_BKMD.shape[2] % block)).unflatten(2, (-1, block))
    return torch.cat([k_BKTSD.amax(3), k_BKTSD.amin(3), k_BKTSD.mean(3)], dim=-1)


def mean_queries(q_BHND: Tensor, place: Tensor, block: int, blocks: int) -> Tensor:
    """Mean query of the rows of each block [B, H, T, D]; padding does not count.

    Args:
        q_BHND: queries.
        place: of each row [1 or B, N]; -1 at padding.
        block: tokens of a block.
        blocks: number of blocks T.
    """
    index = own_block(place, block, len(q_BHND))[:, None, :, None]
    q_BHND = q_BHND.masked_fill((place < 0)[:, None, :, None], 0.0)
    total = q_BHND.new_zeros(*q_BHND.shape[:2], blocks, q_BHND.shape[3])
    real = (place >= 0).to(q_BHND.dtype)[:, None, :, None].expand(len(q_BHND), -1, -1, -1)
    count = total[:, :1, :, :1].scatter_add(2, index, real)
    return total.scatter_add(2, index.expand_as(q_BHND), q_BHND) / count.clamp_min(1)


@without_autocast
def chosen_blocks(
    asking: Tensor, told: Tensor | None, place: Tensor, block: int, count: int
) -> Tensor:
    """Best past blocks of each row [B, K, N, t]; T where there are no more.

    Args:
        asking: what rows ask with [B, K, N, W]; or scores [B, K, N, T], without ``told``.
        told: what blocks answer [B, K, T, W].
        place: of each row [1 or B, N].
        block: tokens of a block.
        count: most blocks of a row.
    """
    own = place.div(block, rounding_mode="floor")
    blocks = asking.shape[3] if told is None else told.shape[2]
    found = []
    for rows in slices(asking.shape[2], asking.shape[0] * asking.shape[1] * blocks):
        score = asking[:, :, rows] if told is None else asking[:, :, rows] @ told.mT
        found.append(best_blocks(score, own[:, rows], count))
    return torch.cat(found, dim=2)
