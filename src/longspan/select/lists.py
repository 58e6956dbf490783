"""Lists of chosen blocks, in the form that kernels walk.

Made on the device in a fixed number of operations for all heads together, with one wait: how long
the longest list is. Axes: B batch, H heads, Q rows of blocks, T blocks to choose from, W longest
list.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.kernels._flex_tiles import TileLists

# Places that exist at a time, eight bytes each.
_AT_ONCE = 1 << 27


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of what is chosen in each row.

    Args:
        chosen: bool [B, H, Q, T].

    Returns:
        counts int32 [B, H, Q], and the numbers in rising order, int32 [B, H, Q, W] with W from 2;
        0 behind the last one.
    """
    count = chosen.sum(-1, dtype=torch.int32)
    width = max(2, int(count.max()))
    number = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device)
    # What is not chosen meets in one place too many.
    index = number.new_zeros(*chosen.shape[:-1], width + 1)
    step = max(1, _AT_ONCE // max(1, chosen[:, 0].numel()))
    for start in range(0, chosen.shape[1], step):
        part = chosen[:, start : start + step]
        place = part.cumsum(-1).sub_(1).masked_fill_(~part, width)
        index[:, start : start + step].scatter_(-1, place, number.expand_as(place))
    return count, index[..., :width].contiguous()


def tile_lists(
    keys: int, partial: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor], width: int = 2
) -> TileLists:
    """Lists from query to key tiles for FlexAttention, forward only.

    Args:
        keys: tiles of keys.
        partial: counts and numbers of the tiles that need the mask.
        full: counts and numbers of those that do not.
        width: of the lists, at least.

    Returns:
        Lists of equal width; a side of one tile is filled up, as ``flex`` fills it up, and the
        lists from key to query tiles, which gradients need, are empty.
    """
    width = max(width, partial[1].shape[-1], full[1].shape[-1])
    batch, heads, rows = partial[0].shape
    short = max(0, 2 - rows)
    none = partial[0].new_zeros(batch, heads, max(2, keys))
    forth = [
        x
        for count, index in (partial, full)
        for x in (
            pad(count, (0, short)),
            pad(index, (0, width - index.shape[-1], 0, short)),
        )
    ]
    nothing = none[..., None].expand(-1, -1, -1, 2)
    lists = (*forth, none, nothing, none, nothing)
    return TileLists(*(x.int().clone(memory_format=torch.contiguous_format) for x in lists))
