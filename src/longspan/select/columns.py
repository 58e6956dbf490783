"""Attention to single columns: keys that lie side by side once for each head, for all rows.

A row sees a column that lies before its own block and in no chosen one, so that no pair counts
twice. That is the same for all rows of a block: one table of Q C marks instead of a mask.

On CUDA FlexAttention walks the tiles of columns, with the table where a tile is not seen whole.
Its graphs hold the number of columns, which is a power of two of tiles, and know of the prompt
only that it is whole blocks: one graph serves all lengths. Elsewhere, and where gradients are
needed, a block of queries at a time. O(N C D) time.

Axes: B batch, H query heads, K key heads, R rows in Q blocks of S, C columns, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from longspan.ops.capability import needs_grad
from longspan.ops.kernels._flex_tiles import TILE
from longspan.ops.kernels.flex import _dense
from longspan.select.lists import listed, tile_lists
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection

_Attend = Callable[..., tuple[Tensor, Tensor]]

_fused: dict[tuple[Any, ...], _Attend] = {}
# What graphs are handed to.
_backend: Any = "inductor"


def columns(prompt: Prompt, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attend to the columns that no chosen block holds.

    Args:
        prompt: queries and keys.
        v: values [B, K, T S, Dv].
        selection: with columns.

    Returns:
        out [B, H, R, Dv] in the dtype of the queries and lse [B, H, R] in float32 at least; 0 and
        -inf where a row sees none.
    """
    fast = prompt.q.is_cuda and prompt.size == TILE and not needs_grad(prompt.q, prompt.k, v)
    selection = replace(selection, columns=_sorted(prompt, selection, TILE if fast else 1))
    return (_walked if fast else _row_by_row)(prompt, v, selection)


def _sorted(prompt: Prompt, selection: Selection, least: int) -> Tensor:
    """Columns in rising order, -1 behind the last; a power of two times ``least`` of them."""
    assert selection.columns is not None
    nowhere = prompt.k.shape[2]
    column = selection.columns
    if least > 1:
        # Budgets by content then share graphs.
        count = least << max(0, (-(-column.shape[-1] // least) - 1).bit_length())
        column = pad(column, (0, count - column.shape[-1]), value=-1)
    column = column.masked_fill(column < 0, nowhere).sort(-1).values
    return column.masked_fill(column == nowhere, -1)


def _gathered(prompt: Prompt, v: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values at the columns of each query head, [B, H, C, D]."""
    batch, heads, count = column.shape
    groups = prompt.k.shape[1]
    place = column.clamp(min=0).unflatten(1, (groups, -1)).flatten(2)[..., None]
    keys, values = (
        x.gather(2, place.expand(-1, -1, -1, x.shape[3])).view(batch, heads, count, -1)
        for x in (prompt.k, v)
    )
    return keys, values


def _row_by_row(prompt: Prompt, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    assert selection.columns is not None
    column, work = selection.columns, prompt.work
    shown = selection.shown(prompt)
    keys, values = (x.to(work) for x in _gathered(prompt, v, column))
    # Columns rise, so those before a block of queries are the first ones.
    begin = (prompt.own * prompt.size)[:, None, :, None]
    before = ((column >= 0)[:, :, None] & (column[:, :, None] < begin)).sum(-1)
    outs, sums = [], []
    for a, count in enumerate(before.amax((0, 1)).tolist()):
        q = prompt.q[:, :, a * prompt.size : (a + 1) * prompt.size]
        if not count:
            outs.append(q.new_zeros(*q.shape[:3], v.shape[3]))
            sums.append(q.new_full(q.shape[:3], -torch.inf, dtype=work))
            continue
        seen = shown[:, :, a, None, :count]
        empty = ~seen.any(-1, keepdim=True)
        logits = (q.to(work) * prompt.scale) @ keys[:, :, :count].mT
        # A row of -inf alone would be NaN: it is computed unmasked, then emptied.
        logits = logits.masked_fill(~(seen | empty), -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        out = (logits - lse).exp() @ values[:, :, :count]
        outs.append(out.masked_fill(empty, 0.0).to(q.dtype))
        sums.append(lse.masked_fill(empty, -torch.inf)[..., 0])
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _walked(prompt: Prompt, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    assert selection.columns is not None
    keys, values = _gathered(prompt, v, selection.columns)
    shown = selection.shown(prompt)
    tiles = shown.unflatten(-1, (-1, TILE))
    full = tiles.all(-1)
    count = tiles.shape[-2]
    # Graphs hold the width of lists: as wide as they may become.
    lists = tile_lists(count, listed(tiles.any(-1) & ~full), listed(full), width=max(2, count))
    attend = _compiled(prompt, values.shape, values.dtype)
    # Blocks by blocks: that the rows are whole tiles then shows in the shape, for any number.
    rows = _dense(prompt.q).unflatten(2, (-1, TILE))
    # Marks stay on a tensor, so they go on what is made here.
    for x in (rows, shown, *lists[:4]):
        torch._dynamo.maybe_mark_dynamic(x, 2)
    return attend(rows, keys, values, shown, *lists)


def _compiled(prompt: Prompt, values: torch.Size, dtype: torch.dtype) -> _Attend:
    """The function for all prompts like this one, whatever their lengths."""
    q = prompt.q
    batch, heads, rows, width = q.shape
    order = tuple(sorted(range(4), key=q.stride, reverse=True))
    # A dimension of 1 is compiled in.
    one = rows == TILE
    name = (batch, heads, one, width, order, values, dtype, q.device, prompt.scale)
    if name not in _fused:
        _fused[name] = _compile(prompt.scale, f"columns_{len(_fused)}")
    return _fused[name]


def _compile(scale: float, name: str) -> _Attend:
    def attend(
        rows: Tensor, k: Tensor, v: Tensor, shown: Tensor, *lists: Tensor
    ) -> tuple[Tensor, Tensor]:
        q = rows.flatten(2, 3)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return shown[batch, head, query // TILE, key]

        mask = BlockMask(
            (q.shape[2], k.shape[2]), *lists, BLOCK_SIZE=(TILE, TILE), mask_mod=visible
        )
        out, aux = flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            kernel_options={"BACKEND": "TRITON"},
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        return out, aux.lse

    # Dynamo keeps at most eight graphs per code object: each kind of prompt gets its own.
    attend.__code__ = attend.__code__.replace(co_name=name)
    return torch.compile(attend, backend=_backend, fullgraph=True)
