"""Sparse, chunked and linear attention for long contexts.

Say where each token may look as a value, run it fast on CPU and GPU, put it into a Hugging Face
model::

    import longspan as ls

    p = ls.Window(4096) | ls.Sink(4)
    out = ls.attend(q, k, v, p)

Importing this package loads nothing heavy: every name below is looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SCCA": "longspan.pattern",
    "Causal": "longspan.pattern",
    "Chunk": "longspan.pattern",
    "Dense": "longspan.pattern",
    "Document": "longspan.pattern",
    "LongspanError": "longspan.errors",
    "Pattern": "longspan.pattern",
    "PerHead": "longspan.pattern",
    "PerLayer": "longspan.pattern",
    "Plan": "longspan.planning",
    "Prefix": "longspan.pattern",
    "ShiftedChunk": "longspan.pattern",
    "Sink": "longspan.pattern",
    "Window": "longspan.pattern",
    "attend": "longspan.ops",
    "coverage": "longspan.analysis",
    "explain": "longspan.ops",
    "hf": "",
    "merge": "longspan.ops",
    "nn": "",
    "parse": "longspan.pattern",
    "plan": "longspan.planning",
}

__all__ = [
    "SCCA",
    "Causal",
    "Chunk",
    "Dense",
    "Document",
    "LongspanError",
    "Pattern",
    "PerHead",
    "PerLayer",
    "Plan",
    "Prefix",
    "ShiftedChunk",
    "Sink",
    "Window",
    "attend",
    "coverage",
    "explain",
    "hf",
    "merge",
    "nn",
    "parse",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longspan' has no attribute {name!r}")
    home = _HOME[name]
    if not home:
        return importlib.import_module(f"longspan.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from longspan import hf, nn
    from longspan.analysis import coverage
    from longspan.errors import LongspanError
    from longspan.ops import attend, explain, merge
    from longspan.pattern import (
        SCCA,
        Causal,
        Chunk,
        Dense,
        Document,
        Pattern,
        PerHead,
        PerLayer,
        Prefix,
        ShiftedChunk,
        Sink,
        Window,
        parse,
    )
    from longspan.planning import Plan, plan
