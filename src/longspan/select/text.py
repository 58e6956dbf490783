"""Text form of prefill methods, for command lines and records: ``parse(str(m)) == m``.

    method    term + term + ...          | means the same
    term      name(argument, key=value, ...)

Budgets are whole numbers, shares with a decimal point, or ``coverage(0.95)``. Some names are also
those of cache policies (``sinks``, ``recent``) and of a pattern: the pattern ``vertical_slash``
lists columns and offsets, here they are budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from longspan.errors import PolicyError
from longspan.pattern.text import Parser
from longspan.select.block_topk import BlockTopK
from longspan.select.budgets import Coverage
from longspan.select.fixed import Every, KeyNorm, Recent, Sinks, Tail
from longspan.select.flex_prefill import FlexPrefill
from longspan.select.method import Method, Term, method
from longspan.select.vertical_slash import VerticalSlash
from longspan.select.xattention import XAttention

TERMS: tuple[type[Term], ...] = (
    BlockTopK,
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
    if not isinstance(text, str):
        raise PolicyError(
            f"expected a prefill method as text, got {text!r} ({type(text).__name__})"
        )
    found = _MethodParser(text).whole()
    if isinstance(found, Coverage):
        raise PolicyError(
            f"{text!r} is a budget, not a method; write for example block_topk({text})"
        )
    return method(found)


class _MethodParser(Parser):
    noun = "prefill method"
    example = "vertical_slash(1000, 6096)"
    raises = PolicyError

    def known(self) -> Mapping[str, Callable[..., Any]]:
        return {**{term.name: term for term in TERMS}, "coverage": Coverage}

    def union(self) -> Any:
        value = self.atom()
        while self.take("+") or self.take("|"):
            start = self.tokens[self.at][2]
            right = self.atom()
            if not all(isinstance(side, Term | Method) for side in (value, right)):
                raise self.error("only terms of a method can be added", start)
            try:
                value = method(value) + right
            except PolicyError as error:
                raise self.error(str(error), start) from None
        return value
