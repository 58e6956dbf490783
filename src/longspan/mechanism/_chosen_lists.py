"""Which rows chose each block, as lists that the programs of a GPU walk.

Entry e of a list names a copy of a row: copy p is choice ``p % t`` of row ``p // t``. Entries of
one block are neighbours, in the order of rows, so that those of a slice of rows are neighbours
too. All sizes are known without looking at the choices, which would wait for the GPU.

Axes: L lists, N rows, t choices of a row, P = N t entries, T blocks, S slices of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_entries(
    block_LNt: Tensor, blocks: int, parts: int, part_rows: int
) -> tuple[Tensor, Tensor]:
    """Copies in the order of their blocks.

    Args:
        block_LNt: chosen blocks; ``blocks`` or more for none.
        blocks: number of blocks T.
        parts: number of slices S.
        part_rows: rows of a slice.

    Returns:
        The copies, int32 [L, P], those without a block last; and where the entries of each block
        and slice begin, int32 [L, T S + 1].
    """
    # Sorting takes time by the bytes of what is sorted.
    narrow = torch.int16 if blocks < 1 << 15 else torch.int32
    key = block_LNt.clamp_max(blocks).flatten(1).to(narrow)
    key, order = key.sort(dim=-1, stable=True)
    order = order.to(torch.int32)
    place = key.to(torch.int32) * parts + order // (block_LNt.shape[2] * part_rows)
    begin = torch.arange(blocks * parts + 1, device=block_LNt.device, dtype=torch.int32)
    begin = begin.expand(len(place), -1).contiguous()
    return order, torch.searchsorted(place, begin, out_int32=True)


def cut(count: Tensor, most: int, entries: int) -> tuple[Tensor, Tensor]:
    """Blocks cut into pieces of at most ``most`` entries.

    Args:
        count: entries of each block, int32 [..., T].
        most: of a piece.
        entries: of all blocks, at most.

    Returns:
        The block of each piece, T where there are no more; and the pieces before each block [...,
        T + 1]; int32.
    """
    ends = (-(-count // most)).cumsum(dim=-1, dtype=torch.int32)
    pieces = min(count.shape[-1], entries) + entries // most
    number = torch.arange(pieces, device=count.device, dtype=torch.int32)
    number = number.expand(*count.shape[:-1], -1).contiguous()
    block = torch.searchsorted(ends, number, right=True, out_int32=True)
    return block, torch.nn.functional.pad(ends, (1, 0))
