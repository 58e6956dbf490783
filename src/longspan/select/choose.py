"""From scores to what is kept: the best by count, or the fewest that cover a share of the mass.

Axes: ... rows of any shape, N things to choose from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.select.budgets import Budget, Coverage, Ratio, Tokens


def counts(budget: Budget, score: Tensor, there: Tensor) -> Tensor:
    """How many a budget takes in each row.

    Args:
        budget: of tokens, columns or blocks.
        score: [..., N]; for ``Coverage`` not negative.
        there: how many there are in each row, int64, broadcastable to [...].

    Returns:
        int64 [...].
    """
    if isinstance(budget, Coverage):
        return budget.counts(score)
    return budget.each(there).expand(score.shape[:-1])


def amount(budget: Budget, score: Tensor, there: Tensor, known: int | None = None) -> Tensor | int:
    """``counts``, or one number for all rows where it is known without asking the device.

    Args:
        budget: of tokens, columns or blocks.
        score: [..., N]; for ``Coverage`` not negative.
        there: how many there are in each row, int64, broadcastable to [...].
        known: the same as a number, if all rows have as many.

    Returns:
        int64 [...]; or a number, of which a row takes what it has.
    """
    if isinstance(budget, Tokens):
        return budget.tokens
    if isinstance(budget, Ratio) and known is not None:
        return budget.count(known)
    return counts(budget, score, there)


def best(score: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row: places [..., C], and which of them count.

    Args:
        score: [..., N]; -inf is never taken.
        count: int64 [...], or one number for all rows, which spares ranking what is taken.
    """
    if isinstance(count, int):
        value, place = score.topk(min(max(count, 1), score.shape[-1]), dim=-1, sorted=False)
        return place, ~value.isneginf() if count else torch.zeros_like(place, dtype=torch.bool)
    most = int(count.max()) if count.numel() else 0
    value, place = score.topk(min(max(most, 1), score.shape[-1]), dim=-1)
    rank = torch.arange(place.shape[-1], device=score.device)
    return place, (rank < count[..., None]) & ~value.isneginf()


def best_mask(score: Tensor, count: Tensor | int) -> Tensor:
    """Which are the ``count`` highest of each row, bool [..., N]."""
    place, taken = best(score, count)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, place, taken)


def cover(mass: Tensor, share: float, forced: Tensor) -> Tensor:
    """The fewest that hold a share of each row's mass, forced ones first: bool [..., N].

    A thing is taken as long as those before it hold less than the share.

    Args:
        mass: [..., N], not negative.
        share: of the row's sum.
        forced: bool [..., N], taken whatever they hold; their mass counts.
    """
    order = mass.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True)
    own = mass.gather(-1, order)
    before = own.cumsum(-1) - own
    taken = (before < share * mass.sum(-1, keepdim=True)) & (own > 0)
    return torch.zeros_like(forced).scatter(-1, order, taken) | forced
