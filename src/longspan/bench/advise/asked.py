"""What advice is asked for: sizes, a budget, and what must hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longspan.bench.setting import WAYS, Setting
from longspan.errors import InputError
from longspan.eval.environment import environment
from longspan.pattern import Pattern, parse

# Stands for all candidates that the budget gives.
GENERATED = "generated"
BUDGETS = {
    "keys": "keys per query",
    "time": "of the time of dense attention",
    "memory": "MiB at the peak of a call",
    "cache": "MiB of keys and values while decoding",
}
PREFER = ("sight", "time")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent.

    Attributes:
        kind: ``keys``: per query, mean over queries and heads; ``time``: share of the time of
            dense attention, 0 to 1; ``memory``: MiB at the peak of a call, above q, k and v;
            ``cache``: MiB of keys and values that decoding keeps, all layers.
        amount: how much.
    """

    kind: str
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in BUDGETS:
            raise InputError(f"a budget is one of {', '.join(BUDGETS)}, got {self.kind!r}")
        least = 1 if self.kind == "keys" else 0
        if not least <= self.amount < float("inf") or not self.amount:
            raise InputError(
                f"a budget ({BUDGETS[self.kind]}) is a number {_above(least)}, got {self.amount}"
            )
        if self.kind == "time" and self.amount > 1:
            raise InputError(
                f"a share of dense attention's time lies between 0 and 1, got {self.amount}"
            )

    def __str__(self) -> str:
        amount = f"{100 * self.amount:.3g}%" if self.kind == "time" else f"{self.amount:,g}"
        return f"at most {amount} {BUDGETS[self.kind]}"


@dataclass(frozen=True, kw_only=True)
class Advise:
    """What is asked.

    Attributes:
        lengths: tokens; each gets an advice of its own.
        setting: all other sizes; its ``n`` is not used.
        layers: of the model.
        train: forward + backward counts, and not forward alone.
        budget: default: an eighth of the length in keys per query, or in both directions a
            quarter.
        within: layers after which every token must have reached all that it may; None: not asked.
        previous: whether some head must see each token's predecessor.
        drop_in: whether every head must see each token's predecessor and the first token.
        prefer: what orders candidates that are equally good: ``sight`` or ``time``.
        candidates: texts of patterns; ``generated`` stands for those that the budget gives.
        rounds: rounds that count.
        memory: whether peak memory is measured.
    """

    lengths: tuple[int, ...]
    setting: Setting
    layers: int = 32
    train: bool = False
    budget: Budget | None = None
    within: int | None = None
    previous: bool = False
    drop_in: bool = False
    prefer: str = "sight"
    candidates: tuple[str, ...] = (GENERATED,)
    rounds: int = 5
    memory: bool = True

    def __post_init__(self) -> None:
        if not self.lengths or not self.candidates:
            raise InputError("expected at least one length and one candidate")
        for n in self.lengths:
            if n < 2:
                raise InputError(f"lengths must be at least 2, got {n}")
            replace(self.setting, n=n)
        for name in ("layers", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.within is not None and not 1 <= self.within <= self.layers:
            raise InputError(
                f"--within is a number of layers from 1 to the model's {self.layers}, "
                f"got {self.within}"
            )
        if self.prefer not in PREFER:
            raise InputError(f"prefer must be one of {', '.join(PREFER)}, got {self.prefer!r}")
        kind = None if self.budget is None else self.budget.kind
        if kind == "memory" and not self.memory:
            raise InputError("a budget of memory needs memory to be measured")
        if kind == "cache" and (self.train or not self.setting.causal):
            raise InputError(
                "a budget of the cache is about decoding, which is causal and trains nothing"
            )
        for text in self.own():
            self._check(text)

    def _check(self, text: str) -> None:
        pattern: Pattern = parse(text)
        pattern.at_layer(0).require(self.setting.heads)
        if pattern.is_causal != self.setting.causal:
            way, other = ("causal", "both") if self.setting.causal else ("two-sided", "causal")
            raise InputError(
                f"{text} is not {way}, and {way} candidates are compared; "
                + (
                    "ask with --bidirectional"
                    if other == "both"
                    else "write causal=false in it, or ask without --bidirectional"
                )
            )

    def own(self) -> list[str]:
        """Candidates that were given."""
        return [text for text in self.candidates if text != GENERATED]

    @property
    def way(self) -> str:
        """A key of ``WAYS``."""
        return tuple(WAYS)[int(self.train)]

    def budget_at(self, n: int) -> Budget:
        """The budget at a length."""
        if self.budget is not None:
            return self.budget
        return Budget(kind="keys", amount=max(1, n // (8 if self.setting.causal else 4)))

    def settings(self) -> dict[str, Any]:
        """What a measurement depends on besides its pattern, length and way."""
        sizes = {key: value for key, value in vars(self.setting).items() if key != "n"}
        return {
            **sizes,
            "rounds": self.rounds,
            "memory": self.memory,
            "environment": environment(),
        }


def _above(least: int) -> str:
    return f"from {least}" if least else "above 0"
