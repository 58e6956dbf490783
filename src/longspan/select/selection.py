"""What was selected: whole blocks of keys for blocks of queries, and single columns for all rows.

    row i of block a sees j <= i with  blocks[a, j // S]  or  j in columns

Blocks are what kernels read fast; columns are gathered once and read by every row, so that a few
heavy keys cost no block each. A row's own block is always among them, so no row is empty.

Axes: B batch, H query heads, Q blocks of queries, T blocks of keys, C columns, S tokens of a
block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.select.prompt import Prompt


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """A union of blocks and columns; causal.

    Attributes:
        blocks: bool [B, H, Q, T], none later than the queries.
        columns: positions, int64 [B, H, C], in any order; -1 where there is none. None: none.
    """

    blocks: Tensor
    columns: Tensor | None = None

    def __or__(self, other: Selection) -> Selection:
        columns = [own.columns for own in (self, other) if own.columns is not None]
        return Selection(
            blocks=self.blocks | other.blocks,
            columns=_distinct(torch.cat(columns, -1)) if columns else None,
        )

    def heads(self, part: slice) -> Selection:
        """Of some query heads."""
        columns = None if self.columns is None else self.columns[:, part]
        return Selection(blocks=self.blocks[:, part], columns=columns)

    def shown(self, prompt: Prompt) -> Tensor:
        """Columns that add keys to those of a block of queries: bool [B, H, Q, C].

        They lie in no block that it sees, so before its own: all of its rows see the same.
        """
        assert self.columns is not None
        block = self.columns.clamp(min=0).div(prompt.size, rounding_mode="floor")[:, :, None]
        held = self.blocks.gather(-1, block.expand(-1, -1, self.blocks.shape[2], -1))
        before = (self.columns >= 0)[:, :, None] & (block < prompt.own[:, None, :, None])
        return before & ~held

    def pairs(self, prompt: Prompt) -> Tensor:
        """Query-key pairs of each head that are computed, int64 [B, H]."""
        stands = (prompt.at >= 0).unflatten(1, (-1, prompt.size))
        rows = stands.sum(2)
        earlier = (self.blocks & (prompt.back > 0)[:, None]).sum(-1) * prompt.size
        begin = (prompt.own * prompt.size)[..., None]
        own = (prompt.at + 1).unflatten(1, (-1, prompt.size)) - begin
        total = (earlier * rows[:, None]).sum(-1) + (own * stands).sum((1, 2))[:, None]
        if self.columns is not None:
            total = total + (self.shown(prompt).sum(-1) * rows[:, None]).sum(-1)
        return total

    def density(self, prompt: Prompt) -> Tensor:
        """Share of the causal pairs that is computed, float64 [B, H]; 1 is dense."""
        causal = (prompt.at + 1).sum(1)
        return self.pairs(prompt).double() / causal.clamp(min=1)[:, None]

    def mask(self, prompt: Prompt) -> Tensor:
        """Dense form [B, H, R, T S]; for tests and for single rows."""
        row = torch.arange(prompt.q.shape[2], device=prompt.q.device)
        return self.rows(prompt, row.expand(len(prompt.q), -1))

    def rows(self, prompt: Prompt, row: Tensor) -> Tensor:
        """Which keys some rows [B, P] of the prompt see: bool [B, H, P, T S]."""
        block = row.div(prompt.size, rounding_mode="floor")
        index = block[:, None, :, None].expand(*self.blocks.shape[:2], -1, self.blocks.shape[3])
        seen = self.blocks.gather(2, index).repeat_interleave(prompt.size, -1)
        if self.columns is not None:
            # Columns that are none meet in one place too many.
            place = self.columns.masked_fill(self.columns < 0, seen.shape[-1])
            wide = seen.new_zeros(*seen.shape[:2], seen.shape[-1] + 1).scatter(-1, place, True)
            seen = seen | wide[:, :, None, :-1]
        at = prompt.at.gather(1, row)
        return seen & (torch.arange(seen.shape[-1], device=row.device) <= at[:, None, :, None])


def _distinct(columns: Tensor) -> Tensor:
    """The same columns in rising order, repeated ones as -1."""
    columns = columns.sort(-1).values
    again = torch.zeros_like(columns, dtype=torch.bool)
    again[..., 1:] = columns[..., 1:] == columns[..., :-1]
    return columns.masked_fill(again, -1)
