"""Chosen blocks as key ranges, for the kernels of ``attend``: any device, with gradients.

    rows of block a:  runs of chosen blocks [first S, last S + S), the last one cut at each row

Neighbouring blocks are one range, so that a window costs one. Which kernel computes them is
decided as for every pattern (``ops.capability.choose``): cuDNN's interval attention or
FlexAttention on a GPU, tiles on a CPU. Ranges are made on the device where the blocks are. O(R m)
memory for each head, m the most runs of a row.

Axes: B batch, H query heads, R rows in Q blocks of S, T blocks of keys, m ranges of a row.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.capability import choose
from longspan.ops.merge import merge
from longspan.ops.ranges import KeyRanges
from longspan.select.columns import columns
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection


def reasons(prompt: Prompt, v: Tensor) -> list[str]:
    """Why this cannot take the given tensors: it can always."""
    return []


def ranges(prompt: Prompt, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        prompt: queries and keys.
        v: values [B, K, T S, Dv].
        selection: what each row sees.

    Returns:
        out [B, H, R, Dv] in the dtype of the queries and lse [B, H, R] in float32 at least; 0 and
        -inf in rows where no query stands.
    """
    parts = [over(prompt, v, runs(prompt, selection.blocks))]
    if selection.columns is not None:
        parts.append(columns(prompt, v, selection))
    return merge(parts)


def over(prompt: Prompt, v: Tensor, seen: KeyRanges) -> tuple[Tensor, Tensor]:
    """Attention of a prompt over ranges, by the kernel that ``attend`` would take."""
    tensors = (prompt.q, prompt.k, v)
    return choose("auto", *tensors, seen).load()(*tensors, seen, prompt.scale)


def runs(prompt: Prompt, blocks: Tensor) -> KeyRanges:
    """Ranges of chosen blocks; a row sees its own block up to itself.

    Args:
        prompt: the prompt.
        blocks: bool [B, H, Q, T], none later than the queries; own blocks are among them.
    """
    batch, heads, _, count = blocks.shape
    first = blocks & ~pad(blocks[..., :-1], (1, 0))
    last = blocks & ~pad(blocks[..., 1:], (0, 1))
    place = first.cumsum(-1) - 1
    most = max(1, int(place.amax()) + 1)
    number = torch.arange(count, dtype=torch.int32, device=blocks.device)

    def put(edge: Tensor, value: Tensor) -> Tensor:
        # What is no edge meets in one place too many.
        row = value.new_zeros(*blocks.shape[:3], most + 1)
        row.scatter_(-1, place.masked_fill(~edge, most), value.expand_as(place))
        return row[..., :most].repeat_interleave(prompt.size, 2)

    stop = (prompt.at + 1).int()[:, None, :, None]
    hi = torch.minimum(put(last, (number + 1) * prompt.size), stop)
    lo = torch.minimum(put(first, number * prompt.size), hi)
    group = torch.arange(batch * heads, device=blocks.device).view(batch, heads)
    return KeyRanges(lo.flatten(0, 1), hi.flatten(0, 1), group, prompt.k.shape[2])


def own_block(prompt: Prompt) -> KeyRanges:
    """Each row from the beginning of its block to itself; the same object for equal prompts.

    What kernels derive from ranges is kept with them, so all layers of a model share it.
    """
    if prompt.span is not None:
        rows, keys = prompt.q.shape[2], prompt.k.shape[2]
        return _own_block(
            *prompt.span, rows, keys, prompt.size, prompt.q.shape[1], str(prompt.q.device)
        )
    return _of_rows(prompt.at, prompt.size, prompt.q.shape[1], prompt.k.shape[2])


@lru_cache(maxsize=8)
def _own_block(
    start: int, stop: int, rows: int, keys: int, size: int, heads: int, device: str
) -> KeyRanges:
    at = start // size * size + torch.arange(rows, device=device)
    at = at.masked_fill((at < start) | (at >= stop), -1)
    return _of_rows(at[None], size, heads, keys)


def _of_rows(at: Tensor, size: int, heads: int, keys: int) -> KeyRanges:
    hi = (at + 1).int()[..., None]
    lo = at.clamp(min=0).div(size, rounding_mode="floor").int()[..., None] * size
    group = torch.arange(len(at), device=at.device)[:, None].expand(-1, heads)
    return KeyRanges(torch.minimum(lo, hi), hi, group, keys)
