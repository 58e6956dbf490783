"""Attention over a selection on CUDA: FlexAttention walks the chosen blocks, then the columns.

Two passes that share no pair, joined by log-sum-exp. The first is the ``flex`` kernel over causal
ranges with the chosen tiles in place of all tiles: no new graph for a new selection. The second
gathers each head's columns side by side and hides those that a chosen block holds; its graphs hold
the lengths. Forward only: lists from keys to queries, which gradients need, are left empty.

Axes: B batch, H query heads, K key heads, R rows in Q blocks of S, M keys in T blocks, C columns,
W longest list, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from longspan.ops.capability import needs_grad
from longspan.ops.kernels import flex
from longspan.ops.kernels._flex_tiles import TILE, TileLists, count_tiles
from longspan.ops.merge import merge
from longspan.ops.ranges import KeyRanges
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection

_Attend = Callable[..., tuple[Tensor, Tensor]]

_fused: dict[tuple[Any, ...], _Attend] = {}
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
    """Attend; as ``gathered`` in what goes in and comes out."""
    ranges = _causal_of(prompt)
    flex.walk(ranges, block_lists(prompt, selection.blocks))
    # What the decorator of the kernel returns has no useful type.
    run: Any = flex.flex
    parts = [run(prompt.q, prompt.k, v, ranges, prompt.scale)]
    if selection.columns is not None:
        parts.append(_columns(prompt, v, selection))
    return merge(parts)


def causal(prompt: Prompt) -> KeyRanges:
    """Each row up to its position; room for queries sees nothing."""
    at = prompt.at[:1] if bool((prompt.at == prompt.at[:1]).all()) else prompt.at
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
    own, earlier = prompt.own, prompt.back > 0
    # Head by head: places take eight bytes for each of Q T blocks.
    numbers, rows = zip(*(_side_by_side(one & earlier) for one in blocks.unbind(1)), strict=True)
    width = max(2, int(torch.stack(numbers).max()))
    whole = torch.stack([_fit(row, width) for row in rows], 1)
    first = torch.zeros_like(whole)
    first[..., 0] = own.clamp(max=prompt.blocks - 1).int()[:, None]
    some = (own < prompt.blocks).int()[:, None].expand(-1, blocks.shape[1], -1)
    return _lists(prompt.blocks, some, first, torch.stack(numbers, 1), whole)


def _side_by_side(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of what is chosen in each row of bool [B, Q, T]: counts [B, Q] and lists, int32."""
    number = chosen.sum(-1, dtype=torch.int32)
    count = chosen.shape[-1]
    # What is not chosen meets in one place too many.
    place = (chosen.cumsum(-1) - 1).masked_fill_(~chosen, count)
    block = torch.arange(count, dtype=torch.int32, device=chosen.device)
    row = block.new_zeros(*chosen.shape[:2], count + 1).scatter_(-1, place, block.expand_as(place))
    return number, _fit(row[..., :-1], max(2, int(number.max())))


def _fit(row: Tensor, width: int) -> Tensor:
    """Lists cut or filled up to a width."""
    return pad(row[..., :width], (0, max(0, width - row.shape[-1])))


def _lists(keys: int, some: Tensor, first: Tensor, number: Tensor, whole: Tensor) -> TileLists:
    """Lists from query to key tiles; a side of one tile is filled up, as ``flex`` fills it up."""
    batch, heads, rows = some.shape
    short = max(0, 2 - rows)
    back = some.new_zeros(batch, heads, max(2, keys))
    forth = (
        pad(some, (0, short)),
        pad(first, (0, 0, 0, short)),
        pad(number, (0, short)),
        pad(whole, (0, 0, 0, short)),
    )
    none = back[..., None].expand(-1, -1, -1, 2)
    every = (*forth, back, none, back.clone(), none)
    return TileLists(*(x.int().clone(memory_format=torch.contiguous_format) for x in every))


def _columns(prompt: Prompt, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attention to the gathered columns that no chosen block holds."""
    assert selection.columns is not None
    nowhere = prompt.k.shape[2]
    column = selection.columns
    # A power of two of tiles, so that budgets by content share graphs.
    count = TILE << max(0, (-(-column.shape[-1] // TILE) - 1).bit_length())
    column = pad(column, (0, count - column.shape[-1]), value=-1)
    column = column.masked_fill(column < 0, nowhere).sort(-1).values
    begins = column[..., ::TILE]
    column = column.masked_fill(column == nowhere, -1)
    shown = replace(selection, columns=column).shown(prompt.size)

    heads, groups = prompt.q.shape[1], prompt.k.shape[1]
    place = column.clamp(min=0).unflatten(1, (groups, -1)).flatten(2)[..., None]
    keys, values = (
        x.gather(2, place.expand(-1, -1, -1, x.shape[3])).view(len(x), heads, count, -1)
        for x in (prompt.k, v)
    )
    # Columns rise, so the tiles that a block of queries reaches are the first ones.
    last = prompt.at.unflatten(1, (-1, TILE)).amax(2)
    some = (begins[:, :, None] <= last[:, None, :, None]).sum(-1)
    tile = torch.arange(count // TILE, device=column.device)
    reached = _fit(tile.expand(*some.shape, -1), max(2, len(tile)))
    none = torch.zeros_like(some), torch.zeros_like(reached)
    lists = _lists(len(tile), some, reached, *none)
    attend = _compiled(prompt, values.shape, values.dtype)
    return attend(prompt.q, keys, values, prompt.at.int(), column.int(), shown, *lists)


def _compiled(prompt: Prompt, values: torch.Size, dtype: torch.dtype) -> _Attend:
    name = (prompt.q.shape, values, dtype, prompt.q.device, prompt.scale, prompt.q.stride())
    if name not in _fused:
        _fused[name] = _compile(prompt.scale, f"columns_{len(_fused)}")
    return _fused[name]


def _compile(scale: float, name: str) -> _Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, at: Tensor, column: Tensor, shown: Tensor, *lists: Tensor
    ) -> tuple[Tensor, Tensor]:
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            here = shown[batch, head, query // TILE, key]
            return here & (column[batch, head, key] <= at[batch, query])

        mask = BlockMask(
            (q.shape[2], k.shape[2]), *lists, BLOCK_SIZE=(TILE, TILE), mask_mod=visible
        )
        out, aux = flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        return out, aux.lse

    # Dynamo keeps at most eight graphs per code object: each shape gets its own.
    attend.__code__ = attend.__code__.replace(co_name=name)
    return torch.compile(attend, backend="inductor", fullgraph=True, dynamic=False)
