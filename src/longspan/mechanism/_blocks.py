"""Blocks of keys that content selects for each query: what MoBA, NSA and gates share.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, T blocks of keys, t selected
ones, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from longspan.mechanism._range_op import over_ranges

# Scores that exist at a time: bounds the memory of a selection.
_SCORES = 1 << 25


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose products stay in the precision of what it multiplies.

    Choices are made there: rounding to bfloat16 would choose otherwise.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(given.device.type for given in args if isinstance(given, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


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
