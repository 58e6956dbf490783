"""What a layer sees, from its gradients: which tokens move which rows; and what it remembers.

A row sees a token if the row's output has a gradient with respect to it. That follows the values
and weights that are really read; a hard choice (the best blocks, a bucket) carries no gradient,
so what it lets out of the future is looked for by changing later tokens.

Axes: B rows that are followed, N tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.analysis.reach import period
from longspan.errors import Refusal
from longspan.mechanism.layer import MechanismLayer
from longspan.pattern import Pattern
from longspan.pattern.algebra import Mask

# Relative change of earlier rows that is more than rounding.
LEAK = 1e-4


def walk(layers: Sequence[MechanismLayer], inputs: Sequence[Tensor], rows: Mask) -> list[Mask]:
    """Tokens that rows read through the last layer, the last two, and so on; [B, N] each.

    Each of B copies of the sequence follows a row of its own. Through a layer go the gradients of
    random sums over the rows reached so far, so a walk takes one backward pass per layer.

    Args:
        layers: of a model, first to last.
        inputs: what they read, [1, N, d_model] each.
        rows: where the walks start [B, N].
    """
    draw = torch.Generator().manual_seed(0)
    found = []
    reached = torch.from_numpy(rows)
    for layer, x in zip(reversed(layers), reversed(inputs), strict=True):
        copies = x.detach().expand(len(reached), -1, -1).clone().requires_grad_()
        weights = torch.randn(x.shape[1:], generator=draw, device="cpu").to(x)
        total = ((layer(copies) * weights).sum(dim=-1) * reached).sum()
        (slope,) = torch.autograd.grad(total, copies)
        seen = (slope != 0).any(dim=-1)
        reached = reached | seen
        # The first step leaves out the row itself where the layer does; later ones stand in
        # for residual connections.
        found.append((seen if not found else reached).numpy())
    return found


def starts(n: int, count: int) -> Mask:
    """``count`` rows in the middles of equal parts of ``n`` tokens, one in each row [B, N]."""
    at = (2 * np.arange(min(count, n)) + 1) * n // (2 * min(count, n))
    return np.arange(n) == at[:, None]


def follow(layers: Sequence[Mask], rows: Mask) -> list[Mask]:
    """As ``walk``, over the pairs [N, N] that layers see."""
    found: list[Mask] = []
    reached = rows
    for one in reversed(layers):
        seen: Mask = np.matmul(reached, one)
        reached = reached | seen
        found.append(seen if not found else reached)
    return found


def shares(found: Sequence[Mask], rows: Mask, near: int, causal: bool) -> dict[str, Any]:
    """Shares of near keys in one layer, and of legal keys after 1, 2, ... layers.

    Args:
        found: what ``walk`` or ``follow`` gave.
        rows: where it started [B, N].
        near: keys that count as near: the row's own and those before it (and, two-sided, after).
        causal: whether legal keys are those up to the row, or all.
    """
    n = rows.shape[1]
    apart = rows.argmax(axis=1)[:, None] - np.arange(n)
    legal = (apart >= 0) | (not causal)
    close = (np.abs(apart) < near) & legal
    return {
        "near": float(found[0][close].mean()),
        "reach": [float(one[legal].mean()) for one in found],
    }


@torch.no_grad()
def leak(layer: MechanismLayer, x: Tensor, cuts: int = 4) -> float:
    """Largest relative change of rows when tokens after them become others; x [1, N, d_model]."""
    n = x.shape[1]
    # New tokens and not old ones moved or scaled, which some choices would not notice.
    draw = torch.Generator().manual_seed(0)
    other = torch.randn(x.shape, generator=draw, device="cpu").to(x) * x.std()
    cut = torch.arange(1, cuts + 1, device="cpu")[:, None] * n // (cuts + 1)
    before = torch.arange(n, device="cpu") < cut
    # Side by side: batch rows do not know of each other.
    plain, *changed = layer(torch.cat([x, x.where(before[..., None], other)]))
    apart = (torch.stack(changed) - plain).norm(dim=-1) / plain.norm(dim=-1).clamp_min(1e-12)
    return float(apart[before].max())


def pattern_layers(pattern: Pattern, n: int, heads: int, layers: int) -> list[Mask]:
    """Pairs [n, n] that some head of each layer sees."""
    masks = (pattern.mask(n, heads, at % period(pattern)) for at in range(layers))
    return [np.logical_or.reduce(mask) for mask in masks]


@torch.no_grad()
def mechanism_state(layer: MechanismLayer, x: Tensor) -> float | None:
    """Decoding state after x [1, N, d_model], in keys and values of so many tokens.

    None where the layer cannot decode.
    """
    if "return_state" not in inspect.signature(layer.forward).parameters:
        return None
    try:
        _, state = layer(x, return_state=True)
    except Refusal:
        return None
    total = sum(one.numel() * one.element_size() for one in _tensors(state))
    return total / (2 * layer.kv_heads * layer.head_dim * x.element_size())


def growth(sizes: list[tuple[int, float]]) -> float | None:
    """Exponent e of size ~ N^e, least squares of logarithms; None for a single length."""
    if len(sizes) < 2 or any(size <= 0 for _, size in sizes):
        return None
    x, y = (np.array([math.log(pair[at]) for pair in sizes]) for at in (0, 1))
    return float(np.polyfit(x, y, 1)[0])


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple | list):
        for one in state:
            yield from _tensors(one)
    elif is_dataclass(state):
        for one in fields(state):
            yield from _tensors(getattr(state, one.name))
