"""Tiles of ``hopper`` that are two halves of 64 keys each, for one or two query heads at a time.

    a task    64 queries of head h        a tile    64 keys from key_0 on
              the same of head h + 1                64 keys from key_1 on

Blocks of 64 fill half a tile of 128 keys, for half of 128 queries; so does a global column, or
the edge of a window. Query heads that share a key head and see the same keys stand side by side
instead, and any two halves that their 64 queries see make a tile: nothing is computed that nobody
asked for, but for a half at most in each task. Where neighbours differ, or have key heads of their
own, a task has one head: no tile serves two of them, so that keys are read twice as often.

In a task two whole halves lead, where there are two; halves with a mask follow, and other whole
ones. An odd number of them is made even by a half behind all keys, which is zeros, at the end of
those with a mask.

O(E) time and memory, on the device of the halves, with one wait.

Axes: X tasks, E halves in the order of their tasks, T tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = 64
# Both bounds cut it: ranges that are empty may lie behind all keys.
_HIDDEN = 32 + 1


def paired(
    half_E2: Tensor, count_X: Tensor, edges_X: Tensor, behind: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles of two halves.

    Args:
        half_E2: int32, the first key of each half, and 64 times the row of its bounds with 16 if
            lower bounds cut it, 32 if both kinds do, and any other bit if only upper ones do. In
            each task a whole one leads where there is one, then come those with a mask.
        count_X: halves of each task, at least one.
        edges_X: the first one, and all that have a mask.
        behind: a key behind all others.

    Returns:
        Entries int32 [T + 1, 4] as ``_hopper_forward`` has them; and for each task the first of
        them, how many come before those that are whole (the first one counts), and all, [X].
    """
    first_X = count_X.cumsum(0) - count_X
    bits_E = half_E2[:, 1] & 63
    leads_X = (bits_E[first_X] == 0).long()
    masked_X = edges_X - leads_X
    two_X = count_X - masked_X >= 2
    odd_X = count_X % 2
    tiles_X = (count_X + 1) // 2
    # Behind the last one with a mask, and behind a whole one where that ends a tile.
    missing_X = torch.where(two_X, masked_X + 2 + (masked_X + 1) % 2, count_X)
    edge_tiles_X = torch.where(
        two_X, 1 + (masked_X + 1) // 2 + odd_X * (1 - masked_X % 2), tiles_X
    )
    first_tile_X = tiles_X.cumsum(0) - tiles_X

    # There are many halves: no number takes more room than it needs.
    def each(x_X: Tensor) -> Tensor:
        return x_X.int().repeat_interleave(count_X, output_size=len(half_E2))

    at_E = torch.arange(len(half_E2), dtype=torch.int32, device=half_E2.device) - each(first_X)
    # The second whole one goes in front of those with a mask.
    last_E = each(masked_X.where(two_X, -1))
    second_E = at_E == last_E + 1
    at_E += (at_E >= 1) & (at_E <= last_E)
    at_E.masked_fill_(second_E & (last_E >= 0), 1)
    at_E += at_E >= each(missing_X.where(odd_X > 0, torch.iinfo(torch.int32).max))
    at_E += each(2 * first_tile_X)

    # One more than there are, for who reads ahead.
    half_2T2 = half_E2.new_tensor([behind, _HIDDEN]).repeat(2 * int(tiles_X.sum()) + 2, 1)
    half_2T2[at_E] = half_E2
    entries_T4 = half_2T2.view(-1, 4)
    bits_T = (entries_T4[:, 1] | entries_T4[:, 3]) & 63
    absent_T = entries_T4[:, 2] == behind
    entries_T4[:, 1] = (entries_T4[:, 1] & ~15) + (bits_T > 0) + 2 * absent_T
    entries_T4[:, 3] &= ~15
    return entries_T4, first_tile_X, edge_tiles_X, tiles_X
