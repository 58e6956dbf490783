"""Chosen blocks on Hopper: cuDNN's block-sparse attention, which walks lists of whole blocks.

Three passes that share no pair, joined by log-sum-exp:

    earlier blocks   the kernel ``ops.kernels.cudnn_blocks`` over their lists: no mask, no plan,
                     and nothing is compiled for a new selection or a new length
    own block        its causal triangle, as key ranges that all heads and layers share
    columns          see ``columns``

Rows are blocks of 64 or 128, forward only.

Axes: B batch, H query heads, K key heads, R rows in Q blocks of S, W longest list, D head width.
"""

from __future__ import annotations

from torch import Tensor

from longspan.ops.capability import needs_grad
from longspan.ops.kernels.cudnn_blocks import over_lists, tensor_reasons
from longspan.ops.merge import merge
from longspan.select.columns import columns
from longspan.select.lists import listed
from longspan.select.prompt import Prompt
from longspan.select.ranges import over, own_block
from longspan.select.selection import Selection

BLOCKS = (64, 128)


def reasons(prompt: Prompt, v: Tensor) -> list[str]:
    """Why this cannot take the given tensors; empty where it can."""
    found = tensor_reasons(prompt.q, v)
    if prompt.size not in BLOCKS:
        found.append(f"blocks must be of 64 or 128 tokens, got {prompt.size}")
    if needs_grad(prompt.q, prompt.k, v):
        found.append("computes no gradients")
    return found


def cudnn_blocks(prompt: Prompt, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attend; as ``ranges`` in what goes in and comes out."""
    own = over(prompt, v, own_block(prompt))
    parts = [earlier(prompt, v, earlier_lists(prompt, selection.blocks)), own]
    if selection.columns is not None:
        parts.append(columns(prompt, v, selection))
    return merge(parts)


def earlier_lists(prompt: Prompt, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, H, Q] and numbers [B, H, Q, W] of the chosen blocks before the own one."""
    return listed(blocks & (prompt.back > 0)[:, None])


def earlier(prompt: Prompt, v: Tensor, lists: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to whole blocks: out [B, H, R, Dv] and lse [B, H, R]; 0 and -inf without any."""
    return over_lists(prompt.q, prompt.k, v, lists, prompt.size, prompt.scale)
