"""``kept_tokens``: how much of the past decoding has to keep, because later queries may see it."""

from __future__ import annotations

import numpy as np

from longspan.analysis.reach import period
from longspan.analysis.relation import Relation
from longspan.pattern.algebra import Pattern
from longspan.planning import plan


def kept_tokens(pattern: Pattern, n: int, heads: int, kv_heads: int) -> float:
    """Tokens of ``n`` that some of the next ``n`` queries see, mean over key heads and layers.

    O(N m) memory for m ranges per query.

    Args:
        pattern: a causal one.
        n: tokens so far.
        heads: query heads.
        kv_heads: key heads, which divide them.

    Raises:
        PatternError: if the pattern does not fit the number of heads.
    """
    later, group, kept = np.ones(n, bool), heads // kv_heads, []
    for layer in range(period(pattern)):
        laid = plan(pattern, n, heads, keys=2 * n, layer=layer)
        for first in range(0, heads, group):
            seen = Relation(laid, range(first, first + group)).keys(later)
            kept.append(int(seen[:n].sum()))
    return float(np.mean(kept))
