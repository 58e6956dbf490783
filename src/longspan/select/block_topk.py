"""Block top-k: every block of queries sees its best blocks of keys.

    score_ab = mean(q in a) . mean(k in b) / sqrt(D),  b <= a;  the best stay

Papers: MInference's block-sparse heads (Jiang et al. 2024, arXiv 2407.02490: blocks of 64, best
100) and their variant in Nawrot et al. 2025 (arXiv 2504.17768: first, own and previous block
forced). O((N / S)^2 D) to estimate. Here too those three stay: without its own block a row could
see nothing. Other estimates than means: upper bounds of Quest, antidiagonals of XAttention.

A coverage counts the softmax of the scores over blocks. Budgets can be shared out unevenly with
the same sum: ``over=heads`` gives the blocks of a row to the heads that score highest (by softmax,
as heads must be comparable; Ada-KV, arXiv 2407.11550), ``over=layers`` falls linearly from the
first layer to the last (PyramidKV, arXiv 2406.02069).

Axes: B batch, H query heads, Q blocks of queries, T blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longspan.errors import PolicyError
from longspan.select.budgets import Coverage, adaptive, pyramid
from longspan.select.choose import amount, best_mask, counts
from longspan.select.method import BLOCK, Term
from longspan.select.pooled import antidiagonal, bounds, means
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection
from longspan.select.sums import check_whole, read_budget

SCORES = ("means", "bounds", "antidiagonal")
SPREADS = ("rows", "heads", "layers")
# The first block, the own one and the one before it.
FORCED = 3


@dataclass(frozen=True)
class BlockTopK(Term):
    """The best blocks of every block of queries.

    Args:
        budget: blocks of a row, forced ones included; or a share of its blocks, or a coverage.
        score: ``means``, ``bounds`` or ``antidiagonal``.
        over: how the budget is shared out: the same for all ``rows``, or over ``heads`` or
            ``layers``.
        block: tokens of a block.
    """

    budget: Any = 64
    score: str = "means"
    over: str = "rows"
    block: int = BLOCK
    name: ClassVar[str] = "block_topk"
    depends: ClassVar[str] = "queries of the row's own block"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", read_budget(f"{self.name}: budget", self.budget))
        check_whole(self.name, 1, block=self.block)
        for field, known in (("score", SCORES), ("over", SPREADS)):
            if getattr(self, field) not in known:
                raise PolicyError(
                    f"{self.name}: {field} must be one of {', '.join(known)}, got "
                    f"{getattr(self, field)!r}"
                )
        if isinstance(self.budget, Coverage) and self.over != "rows":
            raise PolicyError(f"{self.name}: a coverage already differs between heads and layers")
        if self.score == "antidiagonal" and self.block % 8:
            raise PolicyError(f"{self.name}: antidiagonals need blocks of 8 n, got {self.block}")

    def select(self, prompt: Prompt) -> Selection:
        score = self._scores(prompt)
        back = prompt.back[:, None]
        number = torch.arange(prompt.blocks, device=score.device)
        forced = (back >= 0) & ((number == 0) | (back <= 1))
        there = (prompt.own + 1).clamp(max=prompt.blocks)[:, None]
        mass = score.softmax(-1) if self.over == "heads" or self._covers else score
        known = mass.masked_fill(back < 0, 0.0) if self._covers else mass
        score = mass.masked_fill(back < 0, -torch.inf).masked_fill_(forced, torch.inf)
        if self.over == "layers":
            count = self._pyramid(prompt, there).expand(score.shape[:-1])
        elif self.over == "heads":
            count = _over_heads(score, counts(self.budget, known, there))
        else:
            count = amount(self.budget, known, there)
        if isinstance(count, int):
            return Selection(blocks=best_mask(score, max(count, FORCED)))
        return Selection(blocks=best_mask(score, torch.maximum(count, forced.sum(-1))))

    @property
    def _covers(self) -> bool:
        return isinstance(self.budget, Coverage)

    def _scores(self, prompt: Prompt) -> Tensor:
        if self.score == "antidiagonal":
            return antidiagonal(prompt, 8).clamp(min=1e-30).log()
        return means(prompt) if self.score == "means" else bounds(prompt)

    def _pyramid(self, prompt: Prompt, there: Tensor) -> Tensor:
        kinds, place = there.unique(return_inverse=True)
        each = [
            pyramid(prompt.layers, self.budget.count(n), high=n)[prompt.layer]
            for n in kinds.tolist()
        ]
        return torch.tensor(each, device=there.device, dtype=torch.int64)[place]


def _over_heads(score: Tensor, count: Tensor) -> Tensor:
    """The counts [B, H, Q] of each block of queries, shared out over its heads by content."""
    batch, heads, rows, blocks = score.shape
    by_row = score.transpose(1, 2).reshape(-1, heads, blocks)
    # -inf marks what is later, +inf what is forced.
    total = count.sum(1).flatten()
    return adaptive(by_row, total).view(batch, rows, heads).transpose(1, 2)
