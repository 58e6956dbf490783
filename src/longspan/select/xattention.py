"""XAttention: blocks by the mass of their antidiagonals.

Paper: Xu et al. 2025, arXiv 2503.16428. Mass of a block: see ``pooled.antidiagonal``. Of every
block of queries the first and the own block stay, then the heaviest, as long as those before hold
less than ``threshold`` of the row's mass: the fewest that reach it.

O(N^2 D / stride) to estimate: a stride of 8 costs an eighth of dense scores, 16 a sixteenth and
finds a little less. The published code also marks row 0 where column 0 is meant, and slices away
everything where a prompt has whole blocks; neither is kept.

Axes: B batch, H query heads, Q blocks of queries, T blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longspan.errors import PolicyError
from longspan.select.choose import cover
from longspan.select.method import BLOCK, Term, read_mass
from longspan.select.pooled import antidiagonal
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection
from longspan.select.sums import check_whole


@dataclass(frozen=True)
class XAttention(Term):
    """Blocks that cover a share of the antidiagonal mass.

    Args:
        threshold: share of each row's mass.
        stride: rows and columns of a cell; divides the block.
        norm: divides the logits, as published.
        block: tokens of a block.
    """

    threshold: Any = 0.9
    stride: int = 8
    norm: float = 1.0
    block: int = BLOCK
    name: ClassVar[str] = "xattention"
    depends: ClassVar[str] = "queries of the row's own block"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", read_mass(self.name, self.threshold).mass)
        check_whole(self.name, 1, stride=self.stride, block=self.block)
        if self.block % self.stride:
            raise PolicyError(
                f"{self.name}: the stride must divide the block, got {self.stride} and "
                f"{self.block}"
            )
        if isinstance(self.norm, bool) or not isinstance(self.norm, int | float) or self.norm <= 0:
            raise PolicyError(f"{self.name}: norm must be above 0, got {self.norm!r}")

    def select(self, prompt: Prompt) -> Selection:
        mass = antidiagonal(prompt, self.stride, self.norm)
        number = torch.arange(prompt.blocks, device=mass.device)
        forced = ((prompt.back >= 0) & (number == 0)) | (prompt.back == 0)
        return Selection(blocks=cover(mass, self.threshold, forced[:, None].expand_as(mass)))
