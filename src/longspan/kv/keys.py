"""Scores that need keys alone: KeyDiff and the norm of the key.

    KeyDiff    s_j = -cos(k_j, mean over j of k_j / |k_j|)      the most distinctive keys stay
    KeyNorm    s_j = -|k_j|                                     keys with a small norm stay

KeyDiff: Park et al. 2025, arXiv 2504.15364; key norm: Devoto et al. 2024, arXiv 2406.11430. No
query is looked at, so they go with any kernel and with prompts in chunks: ``each_step`` bounds the
cache while a long prompt comes in. O(C D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kv.policy import Scorer
from longspan.kv.view import View
from longspan.select.estimate import norm


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Unlike the other keys.

    Args:
        budget: see ``Scorer``.
    """

    name: ClassVar[str] = "keydiff"

    def score(self, view: View) -> Tensor:
        unit = F.normalize(_wide(view.keys), dim=-1)
        there = view.valid[..., None]
        anchor = (unit * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)
        return -(unit @ F.normalize(anchor, dim=-1).mT)[..., 0]


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """A small norm.

    Args:
        budget: see ``Scorer``.
    """

    name: ClassVar[str] = "keynorm"

    def score(self, view: View) -> Tensor:
        return -norm(view.keys)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
