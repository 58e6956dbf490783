"""Scores that need no query: KeyDiff, the norm of the key, and that of the embedding.

    KeyDiff         s_j = -cos(k_j, mean over j of k_j / |k_j|)   the most distinctive keys stay
    KeyNorm         s_j = -|k_j|                                  keys with a small norm stay
    EmbeddingNorm   s_j = |e_j|                                   tokens of long embedding stay

KeyDiff: Park et al. 2025, arXiv 2504.15364; key norm: Devoto et al. 2024, arXiv 2406.11430. No
query is looked at, so they go with any kernel and with prompts in chunks: ``each_step`` bounds the
cache while a long prompt comes in. O(C D).

The embedding's norm is the same in all heads and layers, so these keep the same tokens. No paper
defines it as an importance for a cache; that the longest should stay is inferred from word
vectors, where the norm grows with how much a word narrows its context (Oyama et al. 2023, arXiv
2212.09663). Attention never sees embeddings: hooks note their norms (``longspan.hf.embedded``).
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
from longspan.select.sums import check_bool


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


@dataclass(frozen=True)
class EmbeddingNorm(Scorer):
    """A long embedding, or a short one.

    Args:
        budget: see ``Scorer``.
        large: whether long embeddings stay, or short ones.
    """

    large: bool = True
    name: ClassVar[str] = "embeddingnorm"
    needs_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool(self.name, large=self.large)

    def score(self, view: View) -> Tensor:
        assert view.norms is not None
        return view.norms if self.large else -view.norms


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
