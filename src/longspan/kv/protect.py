"""Tokens that stay because of where they stand: the first, the last, and all of some heads.

    Sinks(s)     position < s                                                          O(C)
    Recent(r)    position >= seen - r                                                  O(C)
    Duo(...)     everything in retrieval heads; sinks and recent in the others         O(C)

StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) is ``Sinks(4) + Recent(512)``; give the cache
``positions="packed"`` for its in-cache positions. Sinks are the first *real* tokens of a row, not
the first places. DuoAttention (Xiao et al. 2024, arXiv 2410.10819) learns a gate for every key
head offline; here the gates are given, as numbers or as a file that they publish. Unlike theirs
prefill stays dense: only the cache shrinks.

Axes: B batch, G key heads, C places, L layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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
        gates: for each layer, a number for each key head; higher needs the whole context more. Or
            a file of them, a line for each layer and tabs between its heads, as DuoAttention
            publishes (``full_attention_heads.tsv``), or the folder that it lies in.
        sparsity: share of streaming heads over all layers, 0 to 1. Heads are ranked, so that the
            number of retrieval heads is exact where gates are equal.
        sinks: first tokens that streaming heads keep; None: the ``sink_size`` in ``config.json``
            beside the file, or 128.
        recent: last tokens that streaming heads keep; None: ``recent_size`` there, or 256.
    """

    gates: Any
    sparsity: float = 0.5
    sinks: int | None = None
    recent: int | None = None
    name: ClassVar[str] = "duo"

    def __post_init__(self) -> None:
        if isinstance(self.gates, Path):
            object.__setattr__(self, "gates", str(self.gates))
        if not isinstance(self.gates, str):
            object.__setattr__(self, "gates", _gates(self.gates))
        if not 0 <= self.sparsity <= 1:
            raise PolicyError(f"duo: expected a sparsity from 0 to 1, got {self.sparsity!r}")
        first, last = self._window
        check_whole(self.name, 0, sinks=first, recent=last)
        # What cannot be read is said now, not in the middle of a prompt.
        _ = self.full

    @cached_property
    def full(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which heads keep everything, [L, G]; exactly round((1 - sparsity) L G) of them."""
        gate = np.asarray(_read_gates(self.gates) if isinstance(self.gates, str) else self.gates)
        wanted = round((1 - self.sparsity) * gate.size)
        chosen = np.zeros(gate.size, bool)
        chosen[np.argsort(-gate.ravel(), kind="stable")[:wanted]] = True
        return chosen.reshape(gate.shape)

    @cached_property
    def _window(self) -> tuple[int, int]:
        """First and last tokens that streaming heads keep."""
        known = _config_beside(self.gates) if isinstance(self.gates, str) else {}
        sinks = known.get("sink_size", 128) if self.sinks is None else self.sinks
        return sinks, known.get("recent_size", 256) if self.recent is None else self.recent

    def check(self, layers: int, heads: int) -> None:
        if self.full.shape != (layers, heads):
            raise PolicyError(
                f"duo: gates are for {self.full.shape[0]} layers of {self.full.shape[1]} key "
                f"heads; this cache has {layers} of {heads}"
            )

    def protected(self, view: View) -> Tensor:
        full = torch.from_numpy(self.full[view.layer]).to(view.positions.device)
        first, last = self._window
        return full[None, :, None] | Sinks(first).protected(view) | recent(view, last)


def _gates(value: Any) -> tuple[tuple[float, ...], ...]:
    try:
        rows = tuple(tuple(float(gate) for gate in row) for row in value)
    except (TypeError, ValueError):
        rows = ()
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths or not np.isfinite(rows).all():
        raise PolicyError(
            "duo: expected gates as one list of numbers for each layer, one for each key head, or "
            f"the file that holds them, got {value!r}"
        )
    return rows


def _file_of(path: str) -> Path:
    return Path(path) / "full_attention_heads.tsv" if Path(path).is_dir() else Path(path)


def _read_gates(path: str) -> tuple[tuple[float, ...], ...]:
    file = _file_of(path)
    try:
        lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"duo: cannot read gates from {str(file)!r}: {error}") from None
    try:
        # Training leaves gates a little outside 0 and 1; they are compared within.
        return tuple(
            tuple(min(1.0, max(0.0, gate)) for gate in row)
            for row in _gates([row for row in lines if row != [""]])
        )
    except PolicyError:
        raise PolicyError(
            f"duo: {str(file)!r} does not hold gates: expected a line for each layer, with a "
            "number for each key head and tabs between them"
        ) from None


def _config_beside(path: str) -> dict[str, Any]:
    """``config.json`` in the folder of a file of gates; empty if there is none."""
    file = _file_of(path).with_name("config.json")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise PolicyError(f"duo: cannot read {str(file)!r}: {error}") from None
    return found if isinstance(found, dict) else {}
