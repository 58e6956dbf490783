"""How many: budgets, and how they are spread over layers and heads so that sums are exact.

A budget says how much of ``n`` things (tokens, columns, blocks) may stay:

    Tokens(c)      c of them, whatever n is
    Ratio(r)       r n of them
    Coverage(m)    the fewest whose share of the attention mass reaches m; depends on the scores

A spread shares a total out: evenly, as a pyramid over layers (PyramidKV, Cai et al. 2024, arXiv
2406.02069), or by content over the heads of a layer (Ada-KV, Feng et al. 2024, arXiv 2407.11550).
Published code rounds each part for itself and misses the total: PyramidKV's integer step spends up
to 10 % too much, Ada-KV drifts by half a token a head. Here every total is met exactly, by largest
remainders or by counting, so that budgets that are called equal are equal.

Axes: B batch, H heads, L layers, N things to choose from. O(N log N) a row for content, O(L) else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.errors import InputError

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """A fixed number.

    Args:
        tokens: how many, at least 0.
    """

    tokens: int

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 0:
            raise InputError(f"Tokens: expected a whole number from 0, got {self.tokens!r}")

    def count(self, n: int) -> int:
        """How many of ``n`` stay."""
        return min(self.tokens, n)

    def each(self, n: Tensor) -> Tensor:
        """``count`` of many numbers at once, on their device: int64."""
        return n.clamp(max=self.tokens)

    def __str__(self) -> str:
        return str(self.tokens)


@dataclass(frozen=True)
class Ratio:
    """A share of the length.

    Args:
        ratio: the share that is *kept*, above 0 and at most 1; kvpress's ``compression_ratio`` is
            ``1 - ratio``.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise InputError(f"Ratio: expected a share above 0 and at most 1, got {self.ratio!r}")

    def count(self, n: int) -> int:
        """How many of ``n`` stay: rounded down, but one at least."""
        # A product such as 0.3 * 10 falls short of the whole number that is meant.
        return min(n, max(1, math.floor(self.ratio * n + 1e-9)))

    def each(self, n: Tensor) -> Tensor:
        """``count`` of many numbers at once, on their device: int64."""
        share = (self.ratio * n.double() + 1e-9).floor().long()
        return torch.minimum(share.clamp(min=1), n)

    def __str__(self) -> str:
        return str(float(self.ratio))


@dataclass(frozen=True)
class Coverage:
    """The fewest whose scores reach a share of their sum.

    Args:
        mass: the share, above 0 and at most 1.
    """

    mass: float

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise InputError(
                f"Coverage: expected a share above 0 and at most 1, got {self.mass!r}"
            )

    def counts(self, score: Tensor) -> Tensor:
        """How many stay in each row.

        Args:
            score: [..., N], not negative; -inf or 0 where there is nothing to choose.

        Returns:
            int64 [...], the smallest k whose k largest scores sum to the share, at least 1 (0 in a
            row without anything above 0).
        """
        # Sums over 100,000 half-precision probabilities lose the tail.
        mass = score.clamp(min=0).double().sort(dim=-1, descending=True).values
        before = mass.cumsum(-1) - mass
        goal = mass.sum(-1, keepdim=True)
        return ((before < self.mass * goal * (1 - 1e-12)) & (mass > 0)).sum(-1)

    def __str__(self) -> str:
        return f"coverage({float(self.mass)})"


Budget = Tokens | Ratio | Coverage


def budget(value: Any) -> Budget:
    """Read a budget: a whole number is tokens, a fraction up to 1 a ratio; budgets stay.

    Raises:
        InputError: for anything else.
    """
    if isinstance(value, Tokens | Ratio | Coverage):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f"expected a budget: a whole number of tokens, a share such as 0.25, or "
            f"coverage(0.95); got {value!r}"
        )
    return Tokens(value) if isinstance(value, int) else Ratio(value)


def apportion(weights: Any, total: int, *, low: Any = 0, high: Any = None) -> Counts:
    """Share a whole number out in proportion to weights; the largest remainders are rounded up.

    Args:
        weights: [P], not negative.
        total: what the parts sum to.
        low: least of each part, one number or [P].
        high: most of each part, one number or [P]; None for no bound.

    Returns:
        int64 [P] with the sum ``total`` (cut to what the bounds leave possible), each part within
        its bounds and less than one away from its proportional share within them. Equal remainders
        go to the earlier part, so falling weights give falling parts.

    Raises:
        InputError: for weights below 0 or bounds that cross.
    """
    weight = np.asarray(weights, np.float64)
    least = np.broadcast_to(np.asarray(low, np.int64), weight.shape)
    most = np.broadcast_to(np.asarray(total if high is None else high, np.int64), weight.shape)
    most = np.maximum(most, least) if high is None else most
    if weight.ndim != 1 or not np.all(np.isfinite(weight) & (weight >= 0)):
        raise InputError(f"apportion: expected finite weights from 0 in one row, got {weights!r}")
    if np.any(least > most):
        raise InputError(f"apportion: the least {low} is above the most {high}")
    total = int(np.clip(total, least.sum(), most.sum()))
    share = _within(weight, total, least, most)
    parts = np.floor(share + 1e-9).astype(np.int64)
    missing = total - int(parts.sum())
    order = np.argsort(-(share - parts), kind="stable")
    parts[[i for i in order if parts[i] < most[i]][:missing]] += 1
    return parts


def _within(
    weight: NDArray[np.float64], total: int, least: Counts, most: Counts
) -> NDArray[np.float64]:
    """Real shares ``clip(factor * weight, least, most)`` whose sum is the total."""
    followed = weight > 0
    if not followed.any():
        weight, followed = np.ones_like(weight), np.ones_like(weight, bool)
    # At this factor every part that has a weight is full.
    high = float(most.max() + 1) / float(weight[followed].min())
    full = np.clip(high * weight, least, most)
    if full.sum() <= total:
        # Parts without weight take what the others cannot.
        room = np.where(followed, 0, most - least)
        return full + room * ((total - full.sum()) / max(1, room.sum()))
    low = 0.0
    for _ in range(200):
        factor = (low + high) / 2
        below = np.clip(factor * weight, least, most).sum() < total
        low, high = (factor, high) if below else (low, factor)
    return np.clip(high * weight, least, most)


def uniform(layers: int, base: int) -> Counts:
    """The same budget in every layer, int64 [L]."""
    return np.full(layers, base, np.int64)


def pyramid(layers: int, base: int, *, beta: float = 20.0, high: int | None = None) -> Counts:
    """Budgets that fall linearly over the layers and average ``base`` exactly (PyramidKV).

    The last layer gets ``base / beta``, the first ``2 base - base / beta``; if that is more than
    there is (``high``), the first gets ``high`` and the last what keeps the mean.

    Args:
        layers: number of layers L.
        base: mean budget.
        beta: how steep; 1 is uniform.
        high: most that a layer can use, usually the number of tokens to choose from.

    Returns:
        int64 [L], falling, with the sum ``L base``; ``high`` everywhere if base is above it.

    Raises:
        InputError: for beta below 1.
    """
    if beta < 1:
        raise InputError(f"pyramid: expected beta of at least 1, got {beta}")
    if high is not None and base >= high:
        return uniform(layers, high)
    last = base / beta
    first = 2 * base - last
    if high is not None and first > high:
        first, last = high, 2 * base - high
    return apportion(np.linspace(first, last, layers), layers * base, high=high)


def adaptive(score: Tensor, total: int | Tensor, *, floor: int | Tensor = 0) -> Tensor:
    """Budgets of the heads of a layer by content: the best scores of all heads together (Ada-KV).

    Every head first takes its ``floor`` best; the rest of the total goes to the highest scores
    left in any head. So the kept set of a head is its best ``count`` entries. Scores must be
    comparable between heads: probabilities, not raw logits.

    Args:
        score: [B, H, N]; -inf for what cannot be chosen, +inf for what must.
        total: entries to keep over all heads, one number or [B].
        floor: least for each head, as far as it has entries; one number or [B].

    Returns:
        int64 [B, H]; each row sums to the total, or to all there is if that is less, or to the
        floors if those are more.
    """
    batch, heads, n = score.shape
    ranked = score.sort(dim=-1, descending=True, stable=True).values
    there = (ranked > -torch.inf).sum(-1)
    floor = torch.as_tensor(floor, device=score.device).expand(batch)[:, None]
    least = torch.minimum(there, floor)
    place = torch.arange(n, device=score.device)
    rest = ranked.masked_fill(place < floor[..., None], -torch.inf)
    more = torch.as_tensor(total, device=score.device).expand(batch) - least.sum(-1)
    order = rest.flatten(1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(heads * n, device=score.device).expand(batch, -1)
    )
    chosen = (rank < more[:, None]).view(batch, heads, n) & (rest > -torch.inf)
    return least + chosen.sum(-1)
