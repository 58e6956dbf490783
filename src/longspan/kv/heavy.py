"""H2O: keep the tokens that have received most attention so far ("heavy hitters").

    a_j = sum over queries i so far, and over the query heads of a key head, of p_ij

Paper: H2O (Zhang et al. 2023, arXiv 2306.14048); sums run on through decoding. What is evicted
loses its sum for good. Prefill sums are streamed over tiles of rows with the kernel's log-sum-exp:
O(N^2 D) time once more, but no N x N tensor. Decoding costs one product of the query with the kept
keys.

Sums favour tokens that have been there for long. ``age=True`` divides by the number of queries
that could have looked, ``seen - j`` (as kvpress's ObservedAttention does). ``streaming=False``
sums the prompt alone, which some libraries also call H2O. Unlike the paper's, heads of a group
share their tokens, as the memory they read is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longspan.kv.policy import Scorer
from longspan.kv.view import View


@dataclass(frozen=True)
class Heavy(Scorer):
    """Attention received so far.

    Args:
        budget: see ``Scorer``.
        age: divide by the number of queries that came since.
        streaming: keep summing while single tokens are decoded.
    """

    age: bool = False
    streaming: bool = True
    name: ClassVar[str] = "heavy"
    needs_sums: ClassVar[bool] = True
    is_mass: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        assert view.sums is not None
        if not self.age:
            return view.sums
        looked = view.seen[:, None, None].to(view.positions.device) - view.positions
        return view.sums / looked.clamp(min=1)
