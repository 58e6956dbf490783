"""How important keys are: scores of single tokens, columns and diagonals.

    norm          |x_j|, of keys or of embeddings; small norms of keys mark what is attended to
    probe         attention of the last queries (64 in MInference, Jiang et al. 2024, arXiv
                  2407.02490), summed down each column and along each diagonal

The probe is exact attention of a few rows: O(64 M D) time, a few heads at a time. Its weights are
64 times as large as what comes of them, so time is how often they are read and written: once by
the product, twice by the softmax, and once for each of the two sums. It belongs to later tokens
than most rows it speaks for.

Axes: B batch, H query heads, M keys, P probed rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.select.prompt import Prompt

# Weights that exist at a time.
_WEIGHTS = 1 << 27


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe:
    """Attention mass that the last queries give.

    Attributes:
        columns: to each key [B, H, M].
        offsets: to each distance back [B, H, M].
        rows: queries probed, int64 [B]; each gave a mass of 1.
    """

    columns: Tensor
    offsets: Tensor
    rows: Tensor


def norm(x: Tensor) -> Tensor:
    """Euclidean norms of the rows [..., M, D], in float32 at least: [..., M]."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1)


def probe(prompt: Prompt, rows: int = 64) -> Probe:
    """Mass of the attention of the last ``rows`` queries; fewer where there are fewer."""
    found = [_masses(part, rows) for part in head_slices(prompt, rows * prompt.k.shape[2])]
    columns, offsets, seen = zip(*found, strict=True)
    return Probe(columns=torch.cat(columns, 1), offsets=torch.cat(offsets, 1), rows=seen[0])


def last_rows(prompt: Prompt, rows: int) -> tuple[Tensor, Tensor]:
    """The last queries [B, H, P, D] and their positions [B, P]; -1 and 0 where there are fewer."""
    rows = min(rows, prompt.q.shape[2])
    at = prompt.length[:, None] - rows + torch.arange(rows, device=prompt.q.device)
    row = at - prompt.first[:, None] * prompt.size
    inside = row.clamp(0, prompt.q.shape[2] - 1)
    at = prompt.at.gather(1, inside).masked_fill(row < 0, -1)
    index = inside[:, None, :, None].expand(-1, prompt.q.shape[1], -1, prompt.q.shape[3])
    return prompt.q.gather(2, index), at


def weights(
    q: Tensor, at: Tensor, prompt: Prompt, *, seen: int = 0, stands: bool = False
) -> Tensor:
    """Causal attention weights of some rows over all keys.

    Args:
        q: [B, H, P, D].
        at: their positions, int64 [B, P]; rows at -1 get no weights.
        prompt: whose keys.
        seen: keys that all rows see, if that is known; they are not masked again.
        stands: whether no row is at -1, if that is known.

    Returns:
        [B, H, P, M] in float32 at least.
    """
    batch, heads, rows, width = q.shape
    groups = prompt.k.shape[1]
    scaled = q.to(prompt.work).reshape(batch, groups, -1, width) * prompt.scale
    logits = (scaled @ prompt.k.to(prompt.work).mT).view(batch, heads, rows, -1)
    key = torch.arange(seen, prompt.k.shape[2], device=q.device)
    hidden, empty = (key > at[..., None])[:, None], (at < 0)[:, None, :, None]
    logits[..., seen:].masked_fill_(hidden & ~empty, -torch.inf)
    weight = logits.softmax(-1)
    return weight if stands else weight.masked_fill_(empty, 0.0)


def head_slices(prompt: Prompt, per_head: int) -> Iterator[Prompt]:
    """The prompt a few whole groups of heads at a time, so that memory stays bounded.

    Args:
        prompt: the prompt.
        per_head: numbers that one query head needs in each row of the batch.
    """
    heads = prompt.q.shape[1]
    group = heads // prompt.k.shape[1]
    step = max(1, _WEIGHTS // max(1, len(prompt.q) * per_head * group)) * group
    for start in range(0, heads, step):
        yield prompt.heads(slice(start, min(start + step, heads)))


def _masses(prompt: Prompt, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    q, at = last_rows(prompt, rows)
    rows = q.shape[2]
    all_stand = prompt.span is not None and prompt.span[1] - prompt.span[0] >= rows
    seen = prompt.span[1] - rows if prompt.span is not None and all_stand else 0
    weight = weights(q, at, prompt, seen=seen, stands=all_stand)
    return weight.sum(2), _along(weight, prompt), (at >= 0).sum(1)


def _along(weight: Tensor, prompt: Prompt) -> Tensor:
    """Sums of the weights of the last rows [B, H, P, M] along diagonals, by distance [B, H, M]."""
    batch, heads, rows, keys = weight.shape
    # By the key that the last row has at the same distance. Read with one step more for each row,
    # a diagonal lies in a column; what comes before the first key is the end of the row above,
    # which causality leaves 0, but in the first row.
    total = weight.new_zeros(batch, heads, keys)
    total[..., rows - 1 :] += weight[:, :, 0, : keys - rows + 1]
    step = (heads * rows * keys, rows * keys, keys + 1, 1)
    below = weight.as_strided((batch, heads, rows - 1, keys), step, keys + 2 - rows)
    total += below.sum(2)
    last = prompt.length - 1
    distance = torch.arange(keys, device=weight.device)
    key = (last[:, None] - distance)[:, None].expand_as(total)
    return total.gather(-1, key.clamp(min=0)).masked_fill_(key < 0, 0.0)
