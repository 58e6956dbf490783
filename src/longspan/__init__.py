"""Sparse, chunked and linear attention for long contexts.

Say where each token may look as a value, run it fast on CPU and GPU, put it into a Hugging Face
model::

    import longspan as ls

    p = ls.Window(4096) | ls.Sink(4)
    out = ls.attend(q, k, v, p)

Importing this package loads nothing heavy: every name below is looked up on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan._lazy import lazy

__version__ = "0.1.0"

_HOME = {
    "SCCA": "pattern",
    "SDA": "pattern",
    "SSA": "pattern",
    "BandBlocks": "pattern",
    "Blocks": "pattern",
    "Causal": "pattern",
    "Chunk": "pattern",
    "Dense": "pattern",
    "Diagonals": "pattern",
    "Dilated": "pattern",
    "Document": "pattern",
    "DualChunk": "mechanism",
    "EdgeBlocks": "pattern",
    "Global": "pattern",
    "LongNet": "pattern",
    "LongNetSet": "pattern",
    "LongspanError": "errors",
    "Mixture": "pattern",
    "Neighborhood": "pattern",
    "Pattern": "pattern",
    "PerHead": "pattern",
    "PerLayer": "pattern",
    "Plan": "planning",
    "Prefix": "pattern",
    "Random": "pattern",
    "RandomBlocks": "pattern",
    "ShiftedChunk": "pattern",
    "Sink": "pattern",
    "Strided": "pattern",
    "Summaries": "pattern",
    "VerticalSlash": "pattern",
    "Window": "pattern",
    "attend": "ops",
    "bigbird": "pattern",
    "coverage": "analysis",
    "etc": "pattern",
    "explain": "ops",
    "hf": "",
    "kv": "",
    "longformer": "pattern",
    "longmixed": "pattern",
    "mechanism": "",
    "merge": "ops",
    "nn": "",
    "parallel": "",
    "parse": "pattern",
    "plan": "planning",
    "select": "",
    "sparse_transformer": "pattern",
    "swin": "pattern",
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
else:
    __getattr__, __dir__ = lazy(__name__, _HOME)
