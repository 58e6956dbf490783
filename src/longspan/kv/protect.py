"""Tokens that stay because of where they stand: the first, the last, and all of some heads.

    Sinks(s)     position < s                                                          O(C)
    Recent(r)    position >= seen - r                                                  O(C)
    Duo(...)     everything in retrieval heads; sinks and recent in the others         O(C)

StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) is ``Sinks(4) + Recent(512)``; give the cache
``positions="packed"`` for its in-cache positions. Sinks are the first *real* tokens of a row, not
the first places. DuoAttention (Xiao et al. 2024, arXiv 2410.10819) learns a gate for every key
head offline; here the gates are given. Unlike theirs prefill stays dense: only the cache shrinks.

Axes: B batch, G key heads, C places, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from longspan.errors import PolicyError
from longspan.kv.policy import Protector, per_row, recent
from longspan.kv.view import View
from longspan.select.budgets import Coverage
from longspan.select.sums import check_whole, read_budget


@dataclass(frozen=True)
class Sinks(Protector):
    """The first tokens of every row.

    Args:
        tokens: how many, from 0.
    """

    tokens: int = 4
    name: ClassVar[str] = "sinks"

    def __post_init__(self) -> None:
        check_whole(self.name, 0, tokens=self.tokens)

    def protected(self, view: View) -> Tensor:
        return (view.positions >= 0) & (view.positions < self.tokens)

    def __str__(self) -> str:
        return f"sinks({self.tokens})"


@dataclass(frozen=True)
class Recent(Protector):
    """The last tokens of every row.

    Args:
        budget: a whole number from 0, or a share of the tokens seen.
    """

    budget: Any
    name: ClassVar[str] = "recent"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", read_budget(self.name, self.budget))
        if isinstance(self.budget, Coverage):
            raise PolicyError("recent: the last tokens have no scores that coverage could count")

    def protected(self, view: View) -> Tensor:
        return recent(view, per_row(self.budget, view))


@dataclass(frozen=True)
class Duo(Protector):
    """Retrieval heads keep everything, streaming heads their sinks and recent tokens.

    Args:
        gates: for each layer, a number for each key head; higher needs the whole context more.
        sparsity: share of streaming heads over all layers, 0 to 1. Heads are ranked, so that the
            number of retrieval heads is exact where gates are equal.
        sinks: first tokens that streaming heads keep.
        recent: last tokens that streaming heads keep.
    """

    gates: tuple[tuple[float, ...], ...]
    sparsity: float = 0.5
    sinks: int = 128
    recent: int = 256
    name: ClassVar[str] = "duo"

    def __post_init__(self) -> None:
        try:
            rows = tuple(tuple(float(gate) for gate in row) for row in self.gates)
        except (TypeError, ValueError):
            rows = ()
        widths = {len(row) for row in rows}
        if len(widths) != 1 or 0 in widths or not np.isfinite(rows).all():
            raise PolicyError(
                "duo: expected gates as one list of numbers for each layer, one for each key "
                f"head, got {self.gates!r}"
            )
        object.__setattr__(self, "gates", rows)
        if not 0 <= self.sparsity <= 1:
            raise PolicyError(f"duo: expected a sparsity from 0 to 1, got {self.sparsity!r}")
        check_whole(self.name, 0, sinks=self.sinks, recent=self.recent)

    @cached_property
    def full(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which heads keep everything, [L, G]; exactly round((1 - sparsity) L G) of them."""
        gate = np.asarray(self.gates)
        wanted = round((1 - self.sparsity) * gate.size)
        chosen = np.zeros(gate.size, bool)
        chosen[np.argsort(-gate.ravel(), kind="stable")[:wanted]] = True
        return chosen.reshape(gate.shape)

    def check(self, layers: int, heads: int) -> None:
        if self.full.shape != (layers, heads):
            raise PolicyError(
                f"duo: gates are for {self.full.shape[0]} layers of {self.full.shape[1]} key "
                f"heads; this cache has {layers} of {heads}"
            )

    def protected(self, view: View) -> Tensor:
        full = torch.from_numpy(self.full[view.layer]).to(view.positions.device)
        sinks = Sinks(self.sinks).protected(view)
        return full[None, :, None] | sinks | recent(view, self.recent)
