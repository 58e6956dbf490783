"""Selections by position, and by the norm of keys or embeddings.

    sinks(n)      the first n tokens                                   A-shape with recent;
    recent(n)     the last n tokens before each row, itself included   tri-shape with tail too
    tail(n)       the last n rows see everything
    every(r)      tokens 0, r, 2 r, ...
    keynorm(c)    the c keys of smallest norm of each head: those that attract attention
                  (Devoto et al. 2024, arXiv 2406.11430)
    embeddingnorm(c)
                  the c tokens of longest embedding, the same for all heads and layers

Sinks, recent and tail are rounded up to whole blocks. MInference's A-shape is ``sinks(128) +
recent(3968)``; its tri-shape adds ``tail(100)``. O(Q T), keynorm O(M D), embeddingnorm
O(M log M).

No paper defines the embedding's norm as an importance for attention. What it says of a token is
measured for word vectors: it grows with how much the word narrows its context (Oyama et al. 2023,
arXiv 2212.09663). That the longest should stay is inferred from there; ``large=false`` keeps the
shortest.

Axes: B batch, H query heads, K key heads, M keys, Q blocks of queries, T blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longspan.errors import InputError, PolicyError
from longspan.select.budgets import Budget, Coverage
from longspan.select.choose import amount, best
from longspan.select.estimate import norm
from longspan.select.method import Term, nothing
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection
from longspan.select.sums import check_bool, check_whole, read_budget


def _number(name: str, value: Any) -> Budget:
    """A budget of tokens or a share: norms are no mass that could be covered."""
    found = read_budget(f"{name}: budget", value)
    if isinstance(found, Coverage):
        raise PolicyError(
            f"{name}: coverage needs scores that are attention mass, which norms are not; give a "
            "whole number of tokens or a share such as 0.25"
        )
    return found


@dataclass(frozen=True)
class _Number(Term):
    tokens: int
    least: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_whole(self.name, self.least, tokens=self.tokens)


@dataclass(frozen=True)
class Sinks(_Number):
    """The first tokens.

    Args:
        tokens: how many.
    """

    name: ClassVar[str] = "sinks"

    def select(self, prompt: Prompt) -> Selection:
        block = torch.arange(prompt.blocks, device=prompt.q.device)
        early = (block * prompt.size < self.tokens) & (prompt.back >= 0)
        return Selection(blocks=early[:, None].expand(-1, prompt.q.shape[1], -1, -1))


@dataclass(frozen=True)
class Recent(_Number):
    """The last tokens before each row.

    Args:
        tokens: how many, the row itself included.
    """

    name: ClassVar[str] = "recent"

    def select(self, prompt: Prompt) -> Selection:
        # The first row of a block looks back the furthest.
        reach = -(-(self.tokens - 1) // prompt.size)
        near = (prompt.back >= 0) & (prompt.back <= reach)
        return Selection(blocks=near[:, None].expand(-1, prompt.q.shape[1], -1, -1))


@dataclass(frozen=True)
class Tail(_Number):
    """The last rows see everything.

    Args:
        tokens: how many rows.
    """

    name: ClassVar[str] = "tail"
    depends: ClassVar[str] = "the length of the prompt"

    def select(self, prompt: Prompt) -> Selection:
        stop = (prompt.own + 1) * prompt.size
        # Without the bound, no tail at all would take a last block that is cut off.
        last = torch.minimum(stop, prompt.length[:, None]) > (prompt.length - self.tokens)[:, None]
        seen = last[..., None] & (prompt.back >= 0)
        return Selection(blocks=seen[:, None].expand(-1, prompt.q.shape[1], -1, -1))


@dataclass(frozen=True)
class Every(_Number):
    """Evenly spaced tokens.

    Args:
        tokens: from one to the next.
    """

    name: ClassVar[str] = "every"
    least: ClassVar[int] = 1

    def select(self, prompt: Prompt) -> Selection:
        column = torch.arange(0, prompt.k.shape[2], self.tokens, device=prompt.q.device)
        column = column.masked_fill(column >= prompt.length[:, None], -1)
        column = column[:, None].expand(-1, prompt.q.shape[1], -1)
        return Selection(blocks=nothing(prompt), columns=column)


@dataclass(frozen=True)
class KeyNorm(Term):
    """Keys of small norm, as columns.

    Args:
        budget: tokens or share of the tokens, for each key head.
    """

    budget: Any
    name: ClassVar[str] = "keynorm"
    depends: ClassVar[str] = "the norms of all keys of the prompt"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", _number(self.name, self.budget))

    def select(self, prompt: Prompt) -> Selection:
        # A small norm is a large score.
        score = norm(prompt.k).neg().masked_fill(~prompt.real[:, None], -torch.inf)
        count = amount(self.budget, score, prompt.length[:, None], prompt.tokens)
        place, taken = best(score, count)
        column = place.masked_fill(~taken, -1)
        return Selection(blocks=nothing(prompt), columns=prompt.per_head(column))


@dataclass(frozen=True)
class EmbeddingNorm(Term):
    """Tokens by the length of their embedding, as columns; see the module text.

    Args:
        budget: tokens or share of the tokens.
        large: whether long embeddings stay, or short ones.
    """

    budget: Any
    large: bool = True
    name: ClassVar[str] = "embeddingnorm"
    depends: ClassVar[str] = "the embeddings of all tokens of the prompt"
    needs_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", _number(self.name, self.budget))
        check_bool(self.name, large=self.large)

    def select(self, prompt: Prompt) -> Selection:
        if prompt.norms is None:
            raise InputError(
                f"{self} needs the norms of the embeddings: prefill(..., "
                "norms=embeddings.norm(dim=-1)), or longspan.hf.prefill(model, ...)"
            )
        norms = prompt.norms if self.large else -prompt.norms
        score = norms.masked_fill(~prompt.real, -torch.inf)
        count = amount(self.budget, score, prompt.length, prompt.tokens)
        place, taken = best(score, count)
        column = place.masked_fill(~taken, -1)[:, None].expand(-1, prompt.q.shape[1], -1)
        return Selection(blocks=nothing(prompt), columns=column)
