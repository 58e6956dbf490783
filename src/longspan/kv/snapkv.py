"""SnapKV: keep what the last queries of the prompt look at; PyramidKV: less in later layers.

    s_j = mean over the group of pool over j of sum over the last w queries of p_ij,  j before them

SnapKV (Li et al. 2024, arXiv 2404.14469): the window of w queries is kept as well. Their capacity
counts it, our budget does not: ``SnapKV(c)`` keeps c tokens before the window. Repeated key heads
are not stored (theirs are). Pooling averages over the tokens that are there: the zeros that
``avg_pool1d`` pads with would lower the first keys, the sinks. PyramidKV (Cai et al. 2024, arXiv
2406.02069) lets the budget fall linearly over the layers; here its sum is exact.

O(w C D H) once for each layer, no attention weights from the kernel.

Axes: B batch, H query heads, G key heads, C places, W observed queries, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.errors import PolicyError
from longspan.kv.policy import Scorer, per_row, recent
from longspan.kv.view import View, over_group
from longspan.select.budgets import Coverage, pyramid


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Attention of the last queries, pooled over neighbours.

    Args:
        budget: see ``Scorer``; tokens before the window.
        window: last queries that are observed and kept.
        kernel: neighbours that are pooled, odd; 1 for none.
        pool: ``"avg"`` or ``"max"``.
    """

    window: int = 32
    kernel: int = 5
    pool: str = "avg"
    name: ClassVar[str] = "snapkv"
    once: ClassVar[bool] = True
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(
                f"{self.name}: expected a window from 1 and an odd kernel, got window "
                f"{self.window} and kernel {self.kernel}"
            )
        if self.pool not in ("avg", "max"):
            raise PolicyError(f"{self.name}: expected pool avg or max, got {self.pool!r}")
        object.__setattr__(self, "observes", self.window)

    def protected(self, view: View) -> Tensor | None:
        return recent(view, self.window)

    def score(self, view: View) -> Tensor:
        weight_BHC, at_BW = view.observed(self.window)
        first_B = at_BW.masked_fill(at_BW < 0, torch.iinfo(at_BW.dtype).max).amin(1)
        before_BGC = view.valid & (view.positions < first_B[:, None, None])
        groups = view.keys.shape[1]
        grouped = over_group(weight_BHC, groups)
        pooled = pool(grouped, before_BGC[:, :, None], self.kernel, self.pool)
        return pooled.mean(2).masked_fill(~before_BGC, 0.0)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a budget that falls over the layers.

    Args:
        budget: see ``Scorer``; the mean over the layers, exactly.
        window: as in ``SnapKV``.
        kernel: as in ``SnapKV``.
        pool: as in ``SnapKV``.
        beta: the last layer gets ``budget / beta``.
    """

    beta: float = 20.0
    name: ClassVar[str] = "pyramidkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.budget, Coverage):
            raise PolicyError("pyramidkv: a pyramid needs tokens or a share, not coverage")
        if not self.beta >= 1:
            raise PolicyError(f"pyramidkv: expected beta from 1, got {self.beta!r}")

    def counts(self, view: View, score: Tensor) -> Tensor:
        # Counted from the tokens seen: what is left differs between layers after a first round.
        kept = (view.valid & (score == -torch.inf)).sum(-1).amin(1)
        counts = [
            int(pyramid(view.layers, int(base), beta=self.beta, high=int(seen - own))[view.layer])
            for base, seen, own in zip(
                per_row(self.budget, view)[:, 0], view.seen, kept.cpu(), strict=True
            )
        ]
        return torch.tensor(counts, device=score.device)[:, None].expand(score.shape[:2])

    def least(self) -> int:
        return 0


def pool(score: Tensor, valid: Tensor, kernel: int, how: str) -> Tensor:
    """Mean or maximum over ``kernel`` neighbours along the last axis, among the valid ones only.

    Args:
        score: [..., C].
        valid: bool, broadcastable to ``score``.
        kernel: odd.
        how: ``"avg"`` or ``"max"``.
    """
    valid = valid.expand_as(score)
    if kernel == 1:
        return score
    rows, there = score.flatten(0, -2)[:, None], valid.flatten(0, -2)[:, None]
    if how == "max":
        pooled = F.max_pool1d(rows.masked_fill(~there, -torch.inf), kernel, 1, kernel // 2)
        return pooled[:, 0].view_as(score)
    total = F.avg_pool1d(rows.masked_fill(~there, 0.0), kernel, 1, kernel // 2)
    share = F.avg_pool1d(there.to(rows.dtype), kernel, 1, kernel // 2)
    return (total / share.clamp(min=1e-9))[:, 0].view_as(score)
