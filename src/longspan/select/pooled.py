"""How important blocks of keys are to blocks of queries.

    means         mean(q in a) . mean(k in b) * scale: MInference's and FlexPrefill's estimate
    bounds        sum_c max(q_c low_bc, q_c high_bc), q the mean of block a: no key of block b has
                  a larger product with it (Quest, Tang et al. 2024, arXiv 2406.10774)
    antidiagonal  XAttention (Xu et al. 2025, arXiv 2503.16428): sums over the antidiagonals of
                  stride x stride cells, softmax over cells, summed to blocks

    cell_ij = scale / stride * sum_t q_{i stride + stride - 1 - t} . k_{j stride + t}

Every antidiagonal crosses each vertical line and each diagonal of its cell, so that neither is
missed. O((N / S)^2 D) for means and bounds, O(N^2 D / stride) for antidiagonals, which are exact
block masses at stride 1. Means and bounds leave room out; in a cell it counts as zeros.

Axes: B batch, H query heads, K key heads, Q blocks of queries, T blocks of keys, S tokens of a
block, D width, C cells of queries in a block of them, stride tokens each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.select.estimate import head_slices
from longspan.select.prompt import Prompt


def block_means(x: Tensor, real: Tensor, size: int) -> Tensor:
    """Means over the tokens of each block, in float32 at least.

    Args:
        x: [B, X, R, D], 0 where no token stands.
        real: where one stands, bool [B, R].
        size: tokens of a block.

    Returns:
        [B, X, R / size, D]; 0 for a block without tokens.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    total = x.unflatten(2, (-1, size)).sum(3, dtype=work)
    tokens = real.unflatten(1, (-1, size)).sum(2).clamp(min=1)
    return total / tokens[:, None, :, None]


def query_means(prompt: Prompt) -> Tensor:
    """Mean query of each block [B, H, Q, D]."""
    return block_means(prompt.q, prompt.at >= 0, prompt.size)


def means(prompt: Prompt) -> Tensor:
    """Logits of mean queries on mean keys [B, H, Q, T]; -inf for later blocks."""
    mean = block_means(prompt.k, prompt.real, prompt.size)
    score = query_means(prompt) @ prompt.per_head(mean).mT * prompt.scale
    return score.masked_fill((prompt.back < 0)[:, None], -torch.inf)


def bounds(prompt: Prompt) -> Tensor:
    """Upper bounds of the logits of mean queries [B, H, Q, T]; -inf for later blocks."""
    keys = prompt.k.to(prompt.work)
    void = ~prompt.real[:, None, :, None]
    low = keys.masked_fill(void, torch.inf).unflatten(2, (-1, prompt.size)).amin(3)
    high = keys.masked_fill(void, -torch.inf).unflatten(2, (-1, prompt.size)).amax(3)
    # A block without tokens lies behind every query; 0 * inf would be NaN.
    low, high = (prompt.per_head(x.masked_fill(x.isinf(), 0.0)) for x in (low, high))
    score = product_bounds(query_means(prompt), low, high)
    return (score * prompt.scale).masked_fill((prompt.back < 0)[:, None], -torch.inf)


def product_bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What no key between ``low`` and ``high`` in every channel exceeds in its product with q.

    Args:
        q: [..., Q, D].
        low: [..., T, D].
        high: [..., T, D].

    Returns:
        [..., Q, T], the sum over channels of ``max(q low, q high)``.
    """
    return q.clamp(min=0) @ high.mT - (-q).clamp(min=0) @ low.mT


def antidiagonal(prompt: Prompt, stride: int, norm: float = 1.0) -> Tensor:
    """Estimated mass of each block [B, H, Q, T], 0 for later blocks.

    Args:
        prompt: the prompt; ``stride`` divides its block size.
        stride: rows and columns of a cell.
        norm: divides the logits, as published.

    Returns:
        A full block of queries has a mass of ``S / stride`` in all.
    """
    cells = prompt.k.shape[2] // stride
    per_head = max(cells * prompt.size // stride, prompt.q[0, 0].numel())
    return torch.cat([_masses(part, stride, norm) for part in head_slices(prompt, per_head)], 1)


def _masses(prompt: Prompt, stride: int, norm: float) -> Tensor:
    batch, heads, rows, _ = prompt.q.shape
    groups, size, device = prompt.k.shape[1], prompt.size, prompt.q.device
    k = prompt.k.unflatten(2, (-1, stride)).flatten(3)
    # Cells are many more than their queries: those are scaled.
    q = (prompt.q * (prompt.scale / (stride * norm))).to(k.dtype)
    q = q.unflatten(2, (-1, stride)).flip(3).flatten(3)
    place = prompt.at.unflatten(1, (-1, stride)).amax(2).div(stride, rounding_mode="floor")
    cell = torch.arange(k.shape[2], device=device)
    per_block = size // stride
    own, empties = _known_rows(prompt)
    out = torch.zeros(batch, heads, rows // size, prompt.blocks, dtype=prompt.work, device=device)
    # A few blocks of queries at a time see no further than the last of them.
    step = max(1, (1 << 26) // (batch * heads * per_block * k.shape[2]))
    for start in range(0, rows // size, step):
        stop = min(start + step, rows // size)
        # Cells before the first of these blocks are seen by all of their rows.
        known = max(0, min(first for first, _ in own[start:stop])) * per_block
        seen = min(prompt.blocks, max(last for _, last in own[start:stop]) + 1) * per_block
        part = slice(start * per_block, stop * per_block)
        some = q[:, :, part].reshape(batch, groups, -1, q.shape[3])
        logits = (some @ k[:, :, :seen].mT).view(batch, heads, -1, seen)
        at = place[:, None, part, None]
        empty = at < 0
        logits[..., known:].masked_fill_((cell[known:seen] > at) & ~empty, -torch.inf)
        weight = logits.softmax(-1, dtype=prompt.work)
        if not empties.isdisjoint(range(start, stop)):
            weight.masked_fill_(empty, 0.0)
        weight = weight.unflatten(2, (-1, per_block)).sum(3)
        out[:, :, start:stop, : seen // per_block] = weight.unflatten(3, (-1, per_block)).sum(4)
    return out


def _known_rows(prompt: Prompt) -> tuple[list[tuple[int, int]], set[int]]:
    """First and last block over the batch for each block of queries, and which may hold room.

    Without a question to the device where the prompt knows.
    """
    count = prompt.q.shape[2] // prompt.size
    if prompt.span is None:
        first, last = prompt.own.amin(0).tolist(), prompt.own.amax(0).tolist()
        return list(zip(first, last, strict=True)), set(range(count))
    begin = prompt.span[0] // prompt.size
    return [(begin + a, begin + a) for a in range(count)], {0, count - 1}
