"""Attention over a selection on CUDA: FlexAttention walks the chosen blocks, then the columns.

The ``flex`` kernel over causal ranges with the chosen tiles in place of all tiles, so no new graph
for a new selection; columns are a pass of their own. Forward only: lists from keys to queries,
which gradients need, are left empty.

Axes: B batch, H query heads, K key heads, R rows in Q blocks of S, T blocks of keys, W longest
list, D head width.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.capability import needs_grad
from longspan.ops.kernels import flex
from longspan.ops.kernels._flex_tiles import TILE, TileLists, count_tiles
from longspan.ops.merge import merge
from longspan.ops.ranges import KeyRanges
from longspan.select.columns import columns
from longspan.select.lists import listed, tile_lists
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection

_causal: WeakKeyDictionary[Prompt, KeyRanges] = WeakKeyDictionary()


def reasons(prompt: Prompt, v: Tensor) -> list[str]:
    """Why this cannot take the given tensors; empty where it can."""
    if prompt.q.device.type != "cuda":
        return [f"needs CUDA tensors, got {prompt.q.device}"]
    if prompt.size != TILE:
        return [f"blocks must be of {TILE} tokens, got {prompt.size}"]
    if needs_grad(prompt.q, prompt.k, v):
        return ["computes no gradients"]
    ranges = _causal_of(prompt)
    found = flex.reasons(prompt.q, prompt.k, v, ranges)
    if not found and count_tiles(ranges).tile != TILE:
        found.append(f"the prompt is too long for tiles of {TILE}")
    return found


def tiles(prompt: Prompt, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attend; as ``ranges`` in what goes in and comes out."""
    ranges = _causal_of(prompt)
    flex.walk(ranges, block_lists(prompt, selection.blocks))
    # What the decorator of the kernel returns has no useful type.
    run: Any = flex.flex
    parts = [run(prompt.q, prompt.k, v, ranges, prompt.scale)]
    if selection.columns is not None:
        parts.append(columns(prompt, v, selection))
    return merge(parts)


def causal(prompt: Prompt) -> KeyRanges:
    """Each row up to its position; room for queries sees nothing."""
    at = prompt.at if prompt.span is None else prompt.at[:1]
    hi = (at + 1).int()[..., None]
    group = torch.arange(len(at), device=at.device)[:, None].expand(-1, prompt.q.shape[1])
    return KeyRanges(torch.zeros_like(hi), hi, group, prompt.k.shape[2])


def _causal_of(prompt: Prompt) -> KeyRanges:
    """The same ranges whenever they are asked for: what is derived from them is kept with them."""
    if prompt not in _causal:
        _causal[prompt] = causal(prompt)
    return _causal[prompt]


def block_lists(prompt: Prompt, blocks: Tensor) -> TileLists:
    """Chosen tiles of every block of queries: earlier ones whole, its own one with the mask.

    Args:
        prompt: the prompt.
        blocks: bool [B, H, Q, T].
    """
    own = prompt.own[:, None].expand(-1, blocks.shape[1], -1)
    first = own.clamp(max=prompt.blocks - 1)[..., None]
    partial = (own < prompt.blocks).int(), first.int()
    return tile_lists(prompt.blocks, partial, listed(blocks & (prompt.back > 0)[:, None]))
