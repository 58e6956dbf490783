"""The last tokens of every block, as Sparse Transformer's fixed pattern has them.

    j <= i,  j mod l >= l - c             O(N^2 c / l)

Paper: Child et al. 2019, arXiv 1904.10509.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import At, Atom, Mask, Positions, Progression, keep_whole
from longspan.pattern.lattice import Listed


@dataclass(frozen=True, repr=False)
class Summaries(Atom):
    """Tokens at the end of each block, visible to every later query; causal.

    Args:
        stride: tokens l in a block.
        count: c, at most ``stride``: the last tokens of the block.
    """

    stride: int
    count: int = 1
    name: ClassVar[str] = "summaries"

    def __post_init__(self) -> None:
        keep_whole(self, "Summaries", "stride", 1)
        if keep_whole(self, "Summaries", "count", 1) > self.stride:
            raise PatternError(
                f"Summaries: count must not exceed stride, got count {self.count} with stride "
                f"{self.stride}"
            )

    @property
    def is_causal(self) -> bool:
        return True

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return (key <= query) & (key % self.stride >= self.stride - self.count)

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        # Gathered side by side the tokens are one range; as remainders they would be c of them.
        end = int(query.max(initial=0)) + 1
        blocks = np.arange((end - 1) // self.stride + 1)
        # Of a block that is longer than the sequence, no more than there is.
        last = np.arange(self.stride - self.count, min(self.stride, end))
        listed = Listed((blocks[:, None] * self.stride + last).ravel())
        return [(listed, [(np.zeros_like(query), query + 1)])]
