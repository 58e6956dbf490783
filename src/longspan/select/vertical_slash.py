"""Vertical-slash: columns and diagonals that the last queries attend to.

Paper: MInference (Jiang et al. 2024, arXiv 2407.02490). Of the attention A of the last 64 queries

    v_j = sum_r A[r, j]        the best columns stay, the first 30 always
    s_o = sum_r A[r, i_r - o]  the best offsets stay, the last 100 always
    row i sees  j <= i  with  j in columns  or  i - j in offsets

O(64 N D) to estimate. As in the paper a diagonal is computed in blocks: here offset o takes the
blocks of keys that a block of queries touches along it, two of 128 where the paper takes an
unaligned one of 64; neighbours share theirs. Columns cost no block: they are gathered. Published
budgets are fixed numbers (1000 and 6096 where nothing was searched); a share or a coverage of the
probed mass grows with the length, and differs between heads.

Axes: B batch, H query heads, M keys, Q blocks of queries, T blocks of keys, S tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longspan.select.choose import amount, best
from longspan.select.estimate import probe
from longspan.select.method import BLOCK, Term
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection
from longspan.select.sums import check_whole, read_budget


@dataclass(frozen=True)
class VerticalSlash(Term):
    """Columns and diagonals by the attention of the last queries.

    Args:
        columns: budget of columns, the first ones included.
        offsets: budget of offsets, the nearest included.
        probe: last queries whose attention is computed.
        first: columns that always stay.
        last: offsets that always stay.
        block: tokens of a block.
    """

    columns: Any = 1000
    offsets: Any = 6096
    probe: int = 64
    first: int = 30
    last: int = 100
    block: int = BLOCK
    name: ClassVar[str] = "vertical_slash"
    depends: ClassVar[str] = "the last queries of the prompt"

    def __post_init__(self) -> None:
        for field in ("columns", "offsets"):
            value = read_budget(f"{self.name}: {field}", getattr(self, field))
            object.__setattr__(self, field, value)
        check_whole(self.name, 0, first=self.first)
        check_whole(self.name, 1, probe=self.probe, last=self.last, block=self.block)

    def select(self, prompt: Prompt) -> Selection:
        found = probe(prompt, self.probe)
        column, kept = forced_best(self.columns, found.columns, self.first, prompt)
        offset, used = forced_best(self.offsets, found.offsets, self.last, prompt)
        return Selection(blocks=along(prompt, offset, used), columns=column.masked_fill(~kept, -1))


def forced_best(budget: Any, mass: Tensor, forced: int, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """The places of most mass, the first ``forced`` always: [B, H, C], and which of them count.

    Args:
        budget: how many, forced ones included; those stay even if they are more.
        mass: [B, H, M].
        forced: places that always stay.
        prompt: whose tokens the places are.
    """
    there, length = prompt.real[:, None], prompt.length[:, None]
    count = amount(budget, mass * there, length, prompt.tokens)
    count = (
        max(count, forced)
        if isinstance(count, int)
        else torch.maximum(count, length.clamp(max=forced))
    )
    score = mass.clone()
    score[..., :forced] = torch.inf
    return best(score.masked_fill_(~there, -torch.inf), count)


def along(prompt: Prompt, offset: Tensor, used: Tensor) -> Tensor:
    """Blocks that diagonals touch, bool [B, H, Q, T].

    Args:
        prompt: the prompt.
        offset: distances back, int64 [B, H, C].
        used: which of them count.
    """
    near = offset.div(prompt.size, rounding_mode="floor")
    far = (offset + prompt.size - 1).div(prompt.size, rounding_mode="floor")
    # By distance in blocks; what does not count meets in one place too many.
    nowhere = prompt.blocks + 1
    touched = used.new_zeros(*used.shape[:2], nowhere + 1)
    for distance in (near, far):
        touched = touched.scatter(-1, distance.masked_fill(~used, nowhere), True)
    back = prompt.back.clamp(-1, prompt.blocks).flatten(1)[:, None]
    found = touched.gather(-1, back.clamp(min=0).expand(-1, used.shape[1], -1)) & (back >= 0)
    return found.view(*used.shape[:2], *prompt.back.shape[1:])
