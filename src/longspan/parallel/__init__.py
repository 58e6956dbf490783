"""Context parallel: the rows of one sequence lie on several ranks, attention is over all of them.

``shards`` says which rows lie where, ``needs`` which keys a pattern makes each rank ask for,
``exchange`` moves those and their gradients, ``attention`` is the operation, and ``traffic`` says
beforehand what it moves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Shards": "shards",
    "Traffic": "traffic",
    "attend": "attention",
    "explain": "traffic",
}

__all__ = ["Shards", "Traffic", "attend", "explain"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longspan.parallel' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"longspan.parallel.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from longspan.parallel.attention import attend
    from longspan.parallel.shards import Shards
    from longspan.parallel.traffic import Traffic, explain
