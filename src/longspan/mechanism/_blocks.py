"""Blocks of keys that content selects for each query: what MoBA and NSA share.

Axes: B batch, H query heads, K key heads, N query rows (the last of M), M key rows, T blocks of
keys, t selected ones, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.mechanism._range_op import over_ranges
from longspan.mechanism._summaries import join_masks
from longspan.mechanism.layer import positions, rows_at, to_front

# Scores that exist at a time: bounds the memory of a selection.
_SCORES = 1 << 25


@dataclass(frozen=True, kw_only=True)
class TokenState:
    """What decoding keeps: every token so far, O(N).

    Attributes:
        kept: keys and values [B, K, M, D].
        valid: False at padding [B, M]; None if there is none.
    """

    kept: tuple[Tensor, ...]
    valid: Tensor | None


def valid_so_far(x: Tensor, mask: Tensor | None, state: TokenState | None) -> Tensor | None:
    """Padding of all tokens up to the end of ``x`` [B, N, d_model]."""
    valid = None if mask is None else mask.to(torch.bool)
    if state is None:
        return valid
    return join_masks(
        state.valid, valid, len(x), (state.kept[0].shape[2], x.shape[1]), device=x.device
    )


def extended(state: TokenState | None, *new: Tensor) -> tuple[Tensor, ...]:
    """Keys and values with those of earlier tokens in front."""
    if state is None:
        return new
    return tuple(torch.cat(pair, dim=2) for pair in zip(state.kept, new, strict=True))


def places(rows: int, valid_BM: Tensor | None, keys: int, device: torch.device) -> Tensor:
    """Position of each query, the last ``rows`` of ``keys`` [1 or B, N]; -1 at padding."""
    if valid_BM is None:
        return torch.arange(keys - rows, keys, device=device)[None]
    place = positions(valid_BM, valid_BM).masked_fill(~valid_BM, -1)
    return place[:, keys - rows :]


def tokens_first(valid_BM: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows [B, K, M, D] in the order of positions, padding behind them as zeros."""
    if valid_BM is None:
        return tensors
    order, _ = to_front(valid_BM)
    hidden = ~valid_BM.gather(1, order)[:, None, :, None]
    return tuple(rows_at(x, order).masked_fill(hidden, 0.0) for x in tensors)


def slices(rows: int, per_row: int) -> list[slice]:
    """Cut query rows so that a bounded number of scores exists at a time."""
    step = max(1, _SCORES // max(1, per_row))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def best_blocks(score: Tensor, own: Tensor, count: int, forced: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks that each row sees: forced ones, then the best scores of earlier ones.

    Args:
        score: [B, K, N, T].
        own: block of each query [1 or B, N]; -1 sees nothing.
        count: most blocks per row, forced ones included.
        forced: blocks that are seen whatever their score [1 or B, N, T].

    Returns:
        Blocks [B, K, N, t], and which of them count.
    """
    number = torch.arange(score.shape[-1], device=score.device)
    later = (number > own[..., None])[:, None]
    score = score.masked_fill(forced[:, None], torch.inf).masked_fill(later, -torch.inf)
    value, block = score.topk(min(count, score.shape[-1]), dim=-1)
    return block, ~value.isneginf()


def over_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: Tensor,
    counts: Tensor,
    place: Tensor,
    size: int,
    scale: float,
    impl: str,
) -> Tensor:
    """Attention of each row to the selected blocks, up to its own position.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, M, D] in the order of positions.
        v: values [B, K, M, Dv].
        block: selected blocks [B, H or K, N, t].
        counts: which of them count.
        place: position of each query [1 or B, N].
        size: tokens of a block.
        scale: factor on the logits.
        impl: kernel name, or ``auto``.
    """
    lo = block * size
    hi = torch.minimum(lo + size, place[:, None, :, None] + 1).masked_fill(~counts, 0)
    lo, hi = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (lo, hi))
    return over_ranges(q, k, v, lo, hi, scale, impl)[0]
