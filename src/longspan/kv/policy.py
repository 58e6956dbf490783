"""Policies: what stays in a cache, as values that add up.

    Sinks(4) + Recent(256) + Heavy(256)        the same as with |

A policy is a sum of parts, and each part says what *it* adds:

    keep = union of what is protected
    for each scoring part:  keep += its best-scored tokens among those not kept yet

so a policy's budget is the sum of its numbers. Taking the first tokens away is what makes real
models collapse, and newest tokens have had no time to be looked at; so four sinks are protected
unless ``Sinks`` is given, and 32 recent tokens where a part scores unless ``Recent`` is given:
``Heavy(256) + Sinks(0) + Recent(0)`` protects nothing.

*When* is said once for the whole sum: ``after_prefill`` (before the first single token that
follows a prompt, so that prompts in chunks give what whole prompts give), ``each_step``, ``every``
so many tokens. Without it parts decide: those that read the end of a prompt, as SnapKV does, act
after it; the others at each step.

Decisions are made for every batch row and key head by itself. Positions count real tokens, so a
padded row is treated as the same row alone.

Axes: B batch, G key heads, C places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longspan.errors import PolicyError
from longspan.kv.view import View
from longspan.select.budgets import Coverage, Tokens
from longspan.select.sums import Language, Summand, read_budget

SINKS, RECENT = 4, 32


@dataclass(frozen=True)
class Part(Summand):
    """One term of a policy.

    Attributes:
        observes: how many of the last queries it needs to see.
        needs_sums: whether it needs the attention that each key received.
        needs_moments: whether it needs mean and covariance of the queries.
        needs_norms: whether it needs the lengths of the tokens' embeddings.
        once: whether it acts after a prompt, unless told when.
        skips: first tokens whose queries are left out of the moments.
    """

    observes: ClassVar[int] = 0
    needs_sums: ClassVar[bool] = False
    needs_moments: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False
    once: ClassVar[bool] = False
    skips: ClassVar[int] = 0

    def alone(self) -> Policy:
        return Policy((self,))

    def check(self, layers: int, heads: int) -> None:
        """Raise ``PolicyError`` if the part does not fit a model's layers and key heads."""


@dataclass(frozen=True)
class Protector(Part):
    """A part that keeps tokens by where they stand."""

    def protected(self, view: View) -> Tensor:
        """bool [B, G, C]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Scorer(Part):
    """A part that keeps the tokens with the highest scores.

    Args:
        budget: how many it adds for each key head: whole number of tokens, share of the tokens
            seen, or ``Coverage`` of the scores' sum where they are attention mass.
    """

    budget: Any
    is_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", read_budget(self.name, self.budget))
        if isinstance(self.budget, Coverage) and not self.is_mass:
            raise PolicyError(
                f"{self.name}: coverage needs scores that are attention mass, which these are "
                "not; give a whole number of tokens or a share such as 0.25"
            )

    def score(self, view: View) -> Tensor:
        """Higher is kept first; float [B, G, C], anything where there is no token."""
        raise NotImplementedError

    def protected(self, view: View) -> Tensor | None:
        """Tokens that the method keeps whatever their score, bool [B, G, C]."""
        return None

    def counts(self, view: View, score: Tensor) -> Tensor:
        """How many to add, int64 [B, G].

        Args:
            view: the layer.
            score: [B, G, C], -inf for tokens that are kept already or do not exist.
        """
        if isinstance(self.budget, Coverage):
            return self.budget.counts(score)
        return per_row(self.budget, view).expand(score.shape[:2])

    def least(self) -> int:
        """A number of tokens that surely fit into the budget, before anything is computed."""
        return self.budget.tokens if isinstance(self.budget, Tokens) else 0


@dataclass(frozen=True)
class Policy:
    """A sum of parts and when it acts; see the module text.

    Attributes:
        parts: in the order in which they choose; none: everything stays.
        interval: 0: after a prompt; n: every n tokens; None: as the parts are meant.
    """

    parts: tuple[Part, ...] = ()
    interval: int | None = None

    def __post_init__(self) -> None:
        for kind in {type(part) for part in self.parts if not isinstance(part, Scorer)}:
            if sum(isinstance(part, kind) for part in self.parts) > 1:
                raise PolicyError(f"{kind.name} is given twice in {self}")

    def __add__(self, other: Any) -> Policy:
        right = policy(other)
        if self.interval is not None or right.interval is not None:
            raise PolicyError(
                f"cannot add to a policy that says when it acts: {self} and {right}; add first, "
                "then say when for the whole: each_step(a + b)"
            )
        return Policy(self.parts + right.parts)

    __or__ = __add__

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """The parts that score."""
        return tuple(part for part in self.parts if isinstance(part, Scorer))

    @property
    def protectors(self) -> tuple[Protector, ...]:
        """The parts that protect, the defaults included."""
        from longspan.kv.protect import Recent, Sinks

        found = [part for part in self.parts if isinstance(part, Protector)]
        kinds = {type(part) for part in found}
        if (found or self.scorers) and Sinks not in kinds:
            found.insert(0, Sinks(SINKS))
        if self.scorers and Recent not in kinds:
            found.append(Recent(RECENT))
        return tuple(found)

    @property
    def evicts(self) -> bool:
        """False if everything stays, as where parts only read less."""
        return bool(self.scorers) or any(isinstance(part, Protector) for part in self.parts)

    @property
    def when(self) -> int:
        """0: after a prompt; n: every n tokens."""
        if self.interval is not None:
            return self.interval
        return 0 if self.scorers and all(part.once for part in self.scorers) else 1

    @property
    def observes(self) -> int:
        """How many of the last queries must be seen."""
        return max((part.observes for part in self.parts), default=0)

    @property
    def least(self) -> int:
        """So many tokens of a head surely stay, before anything is computed."""
        return sum(part.least() for part in self.scorers)

    @property
    def needs_sums(self) -> bool:
        """Whether the attention that keys receive must be summed."""
        return any(part.needs_sums for part in self.parts)

    @property
    def sums_steps(self) -> bool:
        """Whether sums go on while single tokens are decoded."""
        return any(part.needs_sums and getattr(part, "streaming", True) for part in self.parts)

    @property
    def skips(self) -> int:
        """First tokens whose queries are left out of the moments."""
        return max((part.skips for part in self.parts), default=0)

    @property
    def needs_moments(self) -> bool:
        """Whether mean and covariance of the queries are needed."""
        return any(part.needs_moments for part in self.parts)

    @property
    def needs_norms(self) -> bool:
        """Whether the lengths of the tokens' embeddings are needed."""
        return any(part.needs_norms for part in self.parts)

    def check(self, layers: int, heads: int) -> None:
        """Raise ``PolicyError`` if it does not fit a model's layers and key heads."""
        for part in self.parts:
            part.check(layers, heads)

    def keep(self, view: View) -> Tensor:
        """Which tokens stay, bool [B, G, C]."""
        valid = view.valid
        keep = torch.zeros_like(valid)
        for part in (*self.protectors, *self.scorers):
            protected = part.protected(view)
            if protected is not None:
                keep |= protected & valid
        for part in self.scorers:
            score = part.score(view).masked_fill(keep | ~valid, -torch.inf)
            keep |= best(score, part.counts(view, score))
        return keep

    def __str__(self) -> str:
        text = " + ".join(str(part) for part in self.parts) or "everything()"
        if self.interval is None:
            return text
        if self.interval == 0:
            return f"after_prefill({text})"
        return f"each_step({text})" if self.interval == 1 else f"every({self.interval}, {text})"


POLICIES = Language(
    noun="cache policy",
    example="sinks(4) + recent(256) + heavy(256)",
    part=Part,
    whole=Policy,
    home="longspan.kv.text",
    budgeted="heavy",
)


def policy(value: Any) -> Policy:
    """A policy from a part, a policy or text.

    Raises:
        PolicyError: for anything else, or text that does not parse.
    """
    return POLICIES.read(value)


def per_row(amount: Any, view: View) -> Tensor:
    """A budget of tokens or a share, counted in the real tokens seen: int64 [B, 1]."""
    return amount.each(view.seen)[:, None].to(view.keys.device)


def recent(view: View, tokens: int | Tensor) -> Tensor:
    """The last tokens of each row, bool [B, G, C]; ``tokens`` is a number or [B, 1]."""
    first = torch.as_tensor(view.seen, device=view.positions.device)[:, None] - tokens
    return view.positions >= first[..., None].clamp(min=0)


def best(score: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` [B, G] highest scores of each head above -inf; equal ones by place."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    return (rank < counts[..., None]) & (score > -torch.inf)
