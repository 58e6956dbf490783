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
    "SDA": "longspan.pattern",
    "SSA": "longspan.pattern",
    "BandBlocks": "longspan.pattern",
    "Blocks": "longspan.pattern",
    "Causal": "longspan.pattern",
    "Chunk": "longspan.pattern",
    "Dense": "longspan.pattern",
    "Diagonals": "longspan.pattern",
    "Dilated": "longspan.pattern",
    "Document": "longspan.pattern",
    "DualChunk": "longspan.mechanism",
    "EdgeBlocks": "longspan.pattern",
    "Global": "longspan.pattern",
    "LongNet": "longspan.pattern",
    "LongNetSet": "longspan.pattern",
    "LongspanError": "longspan.errors",
    "Mixture": "longspan.pattern",
    "Neighborhood": "longspan.pattern",
    "Pattern": "longspan.pattern",
    "PerHead": "longspan.pattern",
    "PerLayer": "longspan.pattern",
    "Plan": "longspan.planning",
    "Prefix": "longspan.pattern",
    "Random": "longspan.pattern",
    "RandomBlocks": "longspan.pattern",
    "ShiftedChunk": "longspan.pattern",
    "Sink": "longspan.pattern",
    "Strided": "longspan.pattern",
    "Summaries": "longspan.pattern",
    "VerticalSlash": "longspan.pattern",
    "Window": "longspan.pattern",
    "attend": "longspan.ops",
    "bigbird": "longspan.pattern",
    "coverage": "longspan.analysis",
    "etc": "longspan.pattern",
    "explain": "longspan.ops",
    "hf": "",
    "kv": "",
    "longformer": "longspan.pattern",
    "longmixed": "longspan.pattern",
    "mechanism": "",
    "merge": "longspan.ops",
    "nn": "",
    "parallel": "",
    "parse": "longspan.pattern",
    "plan": "longspan.planning",
    "select": "",
    "sparse_transformer": "longspan.pattern",
    "swin": "longspan.pattern",
}

__all__ = [
    "SCCA",
    "SDA",
    "SSA",
    "BandBlocks",
    "Blocks",
    "Causal",
    "Chunk",
    "Dense",
    "Diagonals",
    "Dilated",
    "Document",
    "DualChunk",
    "EdgeBlocks",
    "Global",
    "LongNet",
    "LongNetSet",
    "LongspanError",
    "Mixture",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "PerLayer",
    "Plan",
    "Prefix",
    "Random",
    "RandomBlocks",
    "ShiftedChunk",
    "Sink",
    "Strided",
    "Summaries",
    "VerticalSlash",
    "Window",
    "attend",
    "bigbird",
    "coverage",
    "etc",
    "explain",
    "hf",
    "kv",
    "longformer",
    "longmixed",
    "mechanism",
    "merge",
    "nn",
    "parallel",
    "parse",
    "plan",
    "select",
    "sparse_transformer",
    "swin",
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
    from longspan import hf, kv, mechanism, nn, parallel, select
    from longspan.analysis import coverage
    from longspan.errors import LongspanError
    from longspan.mechanism import DualChunk
    from longspan.ops import attend, explain, merge
    from longspan.pattern import (
        SCCA,
        SDA,
        SSA,
        BandBlocks,
        Blocks,
        Causal,
        Chunk,
        Dense,
        Diagonals,
        Dilated,
        Document,
        EdgeBlocks,
        Global,
        LongNet,
        LongNetSet,
        Mixture,
        Neighborhood,
        Pattern,
        PerHead,
        PerLayer,
        Prefix,
        Random,
        RandomBlocks,
        ShiftedChunk,
        Sink,
        Strided,
        Summaries,
        VerticalSlash,
        Window,
        bigbird,
        etc,
        longformer,
        longmixed,
        parse,
        sparse_transformer,
        swin,
    )
    from longspan.planning import Plan, plan
