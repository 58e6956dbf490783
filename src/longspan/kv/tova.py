"""TOVA: keep what the last query looks at, the same tokens in all heads of a layer.

    s_j = mean over all query heads of p_last,j

Paper: Oren et al. 2024, arXiv 2401.06104: no token is protected there, not even the newest; that
is ``TOVA(512) + Sinks(0) + Recent(0)``. One row of weights, O(C D H) a step. Where other parts
have left heads with different tokens, the mean is taken token by token, and a head without it
counts 0.

Axes: B batch, H query heads, G key heads, C places, S tokens seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longspan.kv.policy import Scorer
from longspan.kv.view import View, over_group


@dataclass(frozen=True)
class TOVA(Scorer):
    """Attention of the last query, averaged over all heads.

    Args:
        budget: see ``Scorer``.
    """

    name: ClassVar[str] = "tova"
    observes: ClassVar[int] = 1
    is_mass: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        weight_BHC, _ = view.observed(1)
        heads, groups = weight_BHC.shape[1], view.keys.shape[1]
        sum_BGC = over_group(weight_BHC, groups).sum(2)
        if bool((view.positions == view.positions[:, :1]).all()):
            # Nothing but this part chose: all heads hold the same tokens.
            return (sum_BGC.sum(1, keepdim=True) / heads).expand_as(sum_BGC)
        at = view.positions.clamp(min=0)
        by_token = sum_BGC.new_zeros(len(at), int(at.max()) + 1)
        by_token.scatter_add_(1, at.flatten(1), sum_BGC.masked_fill(~view.valid, 0.0).flatten(1))
        return (by_token.gather(1, at.flatten(1)) / heads).view_as(sum_BGC)
