"""Attention over a selection in plain PyTorch: gather what a block of queries sees, attend, go on.

    for each block of queries a:  keys = chosen blocks and columns;  out = softmax(q keys^T) values

Columns that a chosen block holds are hidden, so that no pair counts twice. Any device and dtype,
gradients by autograd. O(pairs D) time; memory of one block of queries over what it sees.

Axes: B batch, H query heads, K key heads, Q blocks of queries, T blocks of keys, S tokens of a
block, C columns, L keys gathered, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.select.prompt import Prompt
from longspan.select.selection import Selection


def gathered(prompt: Prompt, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        prompt: queries and keys.
        v: values [B, K, T S, Dv].
        selection: what each row sees.

    Returns:
        out [B, H, Q S, Dv] in the dtype of the queries and lse [B, H, Q S] in float32 at least; 0
        and -inf in rows where no query stands.
    """
    size, columns = prompt.size, selection.columns
    within = torch.arange(size, device=v.device)
    shown = None if columns is None else selection.shown(size)
    outs, sums = [], []
    for a, chosen in enumerate(selection.blocks.unbind(2)):
        rows = slice(a * size, (a + 1) * size)
        block, taken = _listed(chosen)
        key = (block[..., None] * size + within).flatten(2)
        seen = taken.repeat_interleave(size, -1)
        if columns is not None and shown is not None:
            key = torch.cat([key, columns.clamp(min=0)], -1)
            seen = torch.cat([seen, shown[:, :, a]], -1)
        at = prompt.at[:, None, rows, None]
        out, lse = _attend(prompt, v, rows, key, seen[:, :, None] & (key[:, :, None] <= at))
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the chosen blocks [B, H, L] in rising order, and which of them count."""
    most = max(1, int(chosen.sum(-1).max()))
    block = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return block, chosen.gather(-1, block)


def _attend(
    prompt: Prompt, v: Tensor, rows: slice, key: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """One block of queries over keys [B, H, L] of which [B, H, S, L] are visible."""
    q, work = prompt.q[:, :, rows], prompt.work
    keys, values = (_take(x, key, q.shape[1]).to(work) for x in (prompt.k, v))
    empty = ~visible.any(-1, keepdim=True)
    logits = (q.to(work) * prompt.scale) @ keys.mT
    # In place, as nothing is as large as this. A row of -inf alone would be NaN: it is computed
    # unmasked, then emptied.
    logits.masked_fill_(~(visible | empty), -torch.inf)
    largest = logits.detach().amax(-1, keepdim=True)
    weight = logits.sub_(largest).exp_()
    total = weight.sum(-1, keepdim=True)
    out = (weight @ values / total).masked_fill(empty, 0.0)
    lse = total.log() + largest
    return out.to(q.dtype), lse.masked_fill(empty, -torch.inf)[..., 0]


def _take(x: Tensor, key: Tensor, heads: int) -> Tensor:
    """Rows of x [B, K, M, D] for every query head: [B, H, L, D]."""
    batch, groups, places, width = x.shape
    head = torch.arange(heads, device=x.device) // (heads // groups)
    own = torch.arange(batch, device=x.device)[:, None] * groups + head
    flat = own[..., None] * places + key
    return x.reshape(-1, width)[flat.flatten()].view(*key.shape, width)
