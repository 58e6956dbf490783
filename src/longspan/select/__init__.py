"""Content decides: how important keys are, how many may stay, and which those are.

estimators    ``estimate`` (tokens), ``pooled`` (blocks)        scores
budgets       ``budgets``, ``choose``                           how many, and which
methods       one file each, added up by ``method``             what a prompt's rows see
``prefill``   attention over it; ``recall`` and ``break_even``  what it is worth
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan._lazy import lazy

_HOME = {
    "BlockTopK": "block_topk",
    "Coverage": "budgets",
    "EmbeddingNorm": "fixed",
    "Every": "fixed",
    "FlexPrefill": "flex_prefill",
    "KeyNorm": "fixed",
    "Method": "method",
    "Ratio": "budgets",
    "Recent": "fixed",
    "Selected": "attention",
    "Sinks": "fixed",
    "Tail": "fixed",
    "Term": "method",
    "Tokens": "budgets",
    "VerticalSlash": "vertical_slash",
    "XAttention": "xattention",
    "break_even": "measure",
    "parse": "text",
    "prefill": "attention",
    "recall": "measure",
    "sample": "measure",
    "select": "attention",
}

__all__ = [
    "BlockTopK",
    "Coverage",
    "EmbeddingNorm",
    "Every",
    "FlexPrefill",
    "KeyNorm",
    "Method",
    "Ratio",
    "Recent",
    "Selected",
    "Sinks",
    "Tail",
    "Term",
    "Tokens",
    "VerticalSlash",
    "XAttention",
    "break_even",
    "parse",
    "prefill",
    "recall",
    "sample",
    "select",
]

if TYPE_CHECKING:
    from longspan.select.attention import Selected, prefill, select
    from longspan.select.block_topk import BlockTopK
    from longspan.select.budgets import Coverage, Ratio, Tokens
    from longspan.select.fixed import EmbeddingNorm, Every, KeyNorm, Recent, Sinks, Tail
    from longspan.select.flex_prefill import FlexPrefill
    from longspan.select.measure import break_even, recall, sample
    from longspan.select.method import Method, Term
    from longspan.select.text import parse
    from longspan.select.vertical_slash import VerticalSlash
    from longspan.select.xattention import XAttention
else:
    __getattr__, __dir__ = lazy(__name__, _HOME)
