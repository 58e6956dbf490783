"""Text form of prefill methods, for command lines and records: ``parse(str(m)) == m``.

    method    term + term + ...          | means the same
    term      name(argument, key=value, ...)

Budgets are whole numbers, shares with a decimal point, or ``coverage(0.95)``. Some names are also
those of cache policies (``sinks``, ``recent``) and of a pattern: the pattern ``vertical_slash``
lists columns and offsets, here they are budgets.
"""

from __future__ import annotations

from longspan.select.block_topk import BlockTopK
from longspan.select.fixed import EmbeddingNorm, Every, KeyNorm, Recent, Sinks, Tail
from longspan.select.flex_prefill import FlexPrefill
from longspan.select.method import METHODS, Method, Term
from longspan.select.vertical_slash import VerticalSlash
from longspan.select.xattention import XAttention

TERMS: tuple[type[Term], ...] = (
    BlockTopK,
    EmbeddingNorm,
    Every,
    FlexPrefill,
    KeyNorm,
    Recent,
    Sinks,
    Tail,
    VerticalSlash,
    XAttention,
)


def parse(text: str) -> Method:
    """Read a method from its text form.

    Args:
        text: for example ``"vertical_slash(1000, 6096)"``.

    Raises:
        PolicyError: if the text does not parse; shows the place and the nearest name.
    """
    return METHODS.parse(text, {term.name: term for term in TERMS})
