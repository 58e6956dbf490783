"""Ada-KV: the heads of a layer share their budget by content.

Every head keeps its ``floor`` share of the budget; the rest goes to the highest scores left in any
head, so that heads with scattered attention hold more than heads that look at few tokens.

Paper: Feng et al. 2024, arXiv 2407.11550, over SnapKV with a kernel of 7 and maximum pooling. The
published rounding misses the total by up to half a token a head; here it is exact. The memory of a
short head is really free (see ``store``), where kvpress masks. O(G C log(G C)) a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from longspan.errors import PolicyError
from longspan.kv.policy import Scorer
from longspan.kv.snapkv import SnapKV
from longspan.kv.view import View
from longspan.select.budgets import Coverage, adaptive


@dataclass(frozen=True)
class AdaKV(Scorer):
    """A scorer whose budget moves between the heads of a layer.

    Args:
        budget: the scorer, or a budget (mean over the heads) for the paper's SnapKV. Its scores
            must be comparable between heads, as attention mass is.
        floor: share of the budget that every head keeps, 0 to 1; 1 is uniform.
    """

    floor: float = 0.2
    name: ClassVar[str] = "adakv"

    def __post_init__(self) -> None:
        inner: Any = self.budget
        if not isinstance(inner, Scorer):
            inner = SnapKV(inner, kernel=7, pool="max")
        if isinstance(inner, AdaKV) or isinstance(inner.budget, Coverage):
            raise PolicyError(f"adakv: expected a scorer with tokens or a share, got {inner}")
        object.__setattr__(self, "budget", inner)
        if not 0 <= self.floor <= 1:
            raise PolicyError(f"adakv: expected a floor from 0 to 1, got {self.floor!r}")
        for need in (
            "observes",
            "needs_sums",
            "needs_moments",
            "needs_norms",
            "once",
            "skips",
            "streaming",
        ):
            object.__setattr__(self, need, getattr(inner, need, True))

    def score(self, view: View) -> Tensor:
        return self.budget.score(view)

    def protected(self, view: View) -> Tensor | None:
        return self.budget.protected(view)

    def counts(self, view: View, score: Tensor) -> Tensor:
        base_BG = self.budget.counts(view, score)
        least_B = (self.floor * base_BG[:, 0].double() + 1e-9).long()
        return adaptive(score, base_BG.sum(1), floor=least_B)

    def least(self) -> int:
        return 0
