"""Mixture: a sum of patterns, in which pairs may count more than once.

    out_i = softmax_j(q_i . k_j scale + log c_ij) v_j,   c_ij = parts that allow ij

The same as joining the outputs of the parts by their softmax denominators, as LongNet does with
its branches. ``LongNet((2048, 4096), (1, 2))`` is a mixture; ``Mixture(LongNet(...), Window(w))``
gives it the neighbours that its segment borders hide.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from longspan.errors import PatternError
from longspan.pattern.algebra import At, Mask, Pattern, Positions


@dataclass(frozen=True, repr=False, init=False)
class Mixture(Pattern):
    """Parts side by side; inside ``&``, ``|`` and ``-`` each pair counts once.

    Args:
        parts: patterns; a mixture among them adds its own parts.
    """

    parts: tuple[Pattern, ...]
    name: ClassVar[str] = "mixture"

    def __init__(self, *parts: Pattern) -> None:
        for part in parts:
            if not isinstance(part, Pattern):
                raise PatternError(f"Mixture: expected patterns, got {part!r}")
        if not parts:
            raise PatternError("Mixture: expected at least one pattern, got none")
        object.__setattr__(self, "parts", tuple(parts))

    @property
    def is_causal(self) -> bool:
        return all(part.is_causal for part in self.parts)

    @property
    def needs_length(self) -> bool:
        return any(part.needs_length for part in self.parts)

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return self.counts(query, key, at) > 0

    def counts(self, query: Positions, key: Positions, at: At) -> NDArray[np.int64]:
        return np.add.reduce([part.counts(query, key, at) for part in self.parts])

    def branches(self) -> tuple[Pattern, ...]:
        return tuple(branch for part in self.parts for branch in part.branches())

    def head_class(self, at: At) -> Hashable:
        return tuple(part.head_class(at) for part in self.parts)

    def at_layer(self, layer: int) -> Pattern:
        return Mixture(*(part.at_layer(layer) for part in self.parts))

    def check(self, heads: int) -> None:
        for part in self.parts:
            part.check(heads)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.parts))})"

    __repr__ = __str__
