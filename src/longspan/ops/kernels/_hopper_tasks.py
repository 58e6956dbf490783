"""Tasks of ``hopper``'s forward: whose they are, and in which order programs fetch them.

Tasks go in sections of key heads that stay in the L2 cache together; in a section the longest come
first, and what is as long in the order of key heads and rows, so that programs that run at the
same time read the same keys. But far longer ones that would end behind all others come before all.
Batch rows that share keys count as more query heads of them.

Axes: B batch, H query heads, A batch rows of keys, K key heads, S query heads of a key head in all
batch rows that share it, Q tiles of query rows, X tasks of a key head, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.kernels._hopper_pairs import HALF
from longspan.ops.kernels._hopper_parts import PROGRAMS

TILE = 128


def by_key_head(x_BH: Tensor, key_heads: tuple[int, ...]) -> Tensor:
    """What belongs to query heads as [A, K, S]: by key head, one batch row after another.

    Args:
        x_BH: anything.
        key_heads: batch rows of the keys, and key heads.
    """
    batch, heads = key_heads
    return x_BH.unflatten(1, (heads, -1)).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)


def heads_of(group_BH: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each query head, and of its batch row [B, H], int32."""
    row_B, head_H = (
        torch.arange(count, dtype=torch.int32, device=group_BH.device) for count in group_BH.shape
    )
    return head_H.expand_as(group_BH), row_B[:, None].expand_as(group_BH)


def tasks_of(
    about_GQ3: Tensor, entries: Tensor, group_BH: Tensor, key_heads: tuple[int, ...], halves: int
) -> Tensor:
    """All tasks, int32 [A, K, Q S, 8]; of halves for so many heads [A, K, Q S / halves, 16].

    Args:
        about_GQ3: the first entry of each tile of rows, how many come before those that are whole,
            and all.
        entries: of all tasks.
        group_BH: range group of each query head.
        key_heads: batch rows of the keys, and key heads.
        halves: query heads of a task where tiles are those of ``_hopper_pairs``, else 0.
    """
    about_GQc = torch.cat([about_GQ3.int(), entries[about_GQ3[..., 0]]], -1)
    group_AKS, head_AKS, row_AKS = (
        by_key_head(x_BH, key_heads)[..., :: max(halves, 1)]
        for x_BH in (group_BH, *heads_of(group_BH))
    )
    rows, size, numbers = about_GQ3.shape[1], *((HALF, 16) if halves else (TILE, 8))
    grid = about_GQc.new_zeros(*group_AKS.shape[:2], rows, group_AKS.shape[2], numbers)
    first_Q = torch.arange(0, rows * size, size, dtype=torch.int32, device=grid.device)
    grid[..., 0] = first_Q[:, None]
    grid[..., 1] = head_AKS[:, :, None]
    grid[..., 2] = row_AKS[:, :, None]
    grid[..., 3 : 3 + about_GQc.shape[2]] = about_GQc[group_AKS].transpose(2, 3)
    return grid.flatten(2, 3)


def in_order(tasks_AKX: Tensor, section: int) -> Tensor:
    """The tasks one after another, [T, 8 or 16].

    Args:
        tasks_AKX: all of them, as ``tasks_of`` gives them.
        section: key heads that go together.
    """
    batch, key_heads = tasks_AKX.shape[:2]
    count_AKX = tasks_AKX[..., 5].long()
    most = count_AKX.max()
    part = torch.arange(batch * key_heads, device=tasks_AKX.device) // section
    rank = part.view(batch, key_heads, 1) * (most + 1) + most - count_AKX
    order_T = rank.flatten().argsort(stable=True)
    count_T = count_AKX.flatten()[order_T]
    left_T = count_T.flip(0).cumsum(0).flip(0)
    # What all programs would wait for at the end: as global rows of the last section.
    late_T = (count_T * PROGRAMS > left_T) & (count_T * len(count_T) > 2 * left_T[0])
    return tasks_AKX.flatten(0, 2)[order_T[(~late_T).int().argsort(stable=True)]]
