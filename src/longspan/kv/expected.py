"""Expected attention: keep what the queries to come will probably look at.

Queries before rotation are taken for normal with mean mu and covariance S of the queries so far.
With R the mean rotation of the next ``future`` positions, m = R mu and V = R S R^T,

    z_j = scale k_j . m + scale^2 k_j^T V k_j / 2            log of the mean of exp(scale q . k_j)
    s_j = mean over the group of softmax_j(z_j), + epsilon, times |v_j|

Devoto et al. 2025, arXiv 2510.00636, as kvpress defines it: the first ``sinks`` tokens are left
out of mean, covariance and softmax. Queries are turned back by the model's own rotation; sums of q
and q q^T are kept instead of the queries, O(H D^2) memory. O(C D^2 H) to score.

Axes: B batch, H query heads, G key heads, C places, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longspan.errors import PolicyError
from longspan.kv.policy import Scorer
from longspan.kv.view import View, over_group


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Attention expected from the next queries, times the norm of the value.

    Args:
        budget: see ``Scorer``.
        future: next positions over which is averaged.
        epsilon: added to the attention before it weighs the norm.
        sinks: first tokens that are left out of the statistics.
    """

    future: int = 512
    epsilon: float = 0.0
    sinks: int = 4
    name: ClassVar[str] = "expected_attention"
    needs_moments: ClassVar[bool] = True
    once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1 or self.sinks < 0 or self.epsilon < 0:
            raise PolicyError(
                "expected_attention: expected future from 1, sinks and epsilon from 0, got "
                f"{self.future}, {self.sinks} and {self.epsilon}"
            )
        object.__setattr__(self, "skips", self.sinks)

    def score(self, view: View) -> Tensor:
        mean_BHD, spread_BHDD = self.queries_to_come(view)
        groups, kind = view.keys.shape[1], mean_BHD.dtype
        keys = view.keys.to(kind)
        mean = over_group(mean_BHD, groups)
        spread = spread_BHDD.view(*mean.shape, -1)
        logit = view.scale * torch.einsum("bgsd,bgcd->bgsc", mean, keys)
        for head in range(mean.shape[2]):
            turned = keys @ spread[:, :, head]
            logit[:, :, head] += view.scale**2 / 2 * (turned * keys).sum(-1)
        counted = (view.positions >= self.sinks)[:, :, None]
        share = logit.masked_fill(~counted, -torch.inf).softmax(-1).masked_fill(~counted, 0.0)
        return (share.mean(2) + self.epsilon) * view.values.to(kind).norm(dim=-1)

    def queries_to_come(self, view: View) -> tuple[Tensor, Tensor]:
        """Mean [B, H, D] and covariance [B, H, D, D] of the queries at the next positions."""
        assert view.moments is not None
        assert view.turn is not None
        count = view.moments.count.clamp(min=1).to(view.moments.first)[:, None, None]
        mean = view.moments.first / count
        spread = view.moments.second / count[..., None] - mean[..., :, None] * mean[..., None, :]
        batch, _, width = mean.shape
        basis = torch.eye(width, dtype=mean.dtype, device=mean.device)
        steps = torch.arange(self.future, device=mean.device)
        at = view.seen.to(mean.device)[:, None] + steps
        # Row i is where the i-th unit vector goes on average, so x R^T is x @ rows.
        rows = view.turn(basis[None, :, None].expand(batch, -1, self.future, -1), at).mean(2)
        mean = mean @ rows
        return mean, rows[:, None].mT @ spread @ rows[:, None]
