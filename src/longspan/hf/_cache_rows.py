"""Which rows of the calls so far were tokens, by the masks that came with them.

Positions count the tokens of each row of the batch, as patterns and policies do; padding has none.
A row that ended early is fed rows that nothing marks; a later mask says that they were padding.

Axes: B batch, N new rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.errors import InputError
from longspan.hf.rows import Rows


class Standing(NamedTuple):
    """Where the new rows of one call stand.

    Attributes:
        at: positions [B, N].
        real: which are tokens, bool [B, N]; None: all.
        cut: so many tokens are left of those before [B], the others were padding; None: all are.
    """

    at: Tensor
    real: Tensor | None
    cut: Tensor | None


class SeenRows:
    """Rows that one layer of a cache has seen.

    Attributes:
        count: of rows, padding among them.
        tokens: real ones in each row of the batch [B]; None before the first call.
    """

    def __init__(self) -> None:
        self.count = 0
        self.tokens: Tensor | None = None
        self._told: NDArray[np.bool_] | None = None

    def take(self, rows: Rows, batch: int) -> Standing:
        """Count the new rows.

        Args:
            rows: of the call.
            batch: rows of the batch.

        Raises:
            InputError: if the mask of rows before has changed elsewhere than at the end of a row
                of the batch; nothing is counted then.
        """
        # One row of a mask stands for the whole batch.
        told = (
            None if rows.real is None else np.broadcast_to(rows.real, (batch, rows.real.shape[1]))
        )
        cut = None if self.tokens is None else self._cut(rows, told, batch)
        before = self.tokens if cut is None else cut
        self._told = told
        end = rows.query_start + rows.queries
        self.count += rows.queries
        if rows.positions is None or rows.segments is None:
            at = torch.arange(rows.query_start, end, device="cpu").expand(batch, -1)
            self.tokens = torch.full((batch,), end, device="cpu")
            return Standing(at, None, cut)
        at = torch.from_numpy(rows.positions).expand(batch, -1)
        real = torch.from_numpy(rows.segments >= 0).expand(batch, -1)
        last = (at + 1).masked_fill(~real, 0).amax(1)
        self.tokens = last if before is None else torch.maximum(before, last)
        return Standing(at, None if bool(real.all()) else real, cut)

    def select(self, indices: Tensor) -> None:
        """Take rows of the batch by index."""
        if self.tokens is not None:
            self.tokens = self.tokens[indices.cpu()]
        if self._told is not None:
            self._told = self._told[indices.cpu().numpy()]

    def _cut(self, rows: Rows, told: NDArray[np.bool_] | None, batch: int) -> Tensor | None:
        """Tokens left of those before by the present mask, told [B, rows]; None: all of them."""
        if "before" not in rows.kept:
            # Once for all layers.
            rows.kept["before"] = (
                torch.full((batch,), self.count, device="cpu")
                if told is None
                else torch.from_numpy(told[:, : self.count].sum(1))
            )
        left: Tensor = rows.kept["before"]
        if bool((left == self.tokens).all()):
            return None
        everything = np.ones((batch, self.count), bool)
        old = everything if self._told is None else self._told
        now = everything if told is None else told[:, : self.count]
        rank = old.cumsum(1) - 1
        if not np.array_equal(now, old & (rank < left.numpy()[:, None])):
            raise InputError(
                "The attention_mask says of tokens that the cache has read that they are padding, "
                "or the reverse, and not only at the end of a row: pass the mask of the earlier "
                "calls, with ones or zeros behind it."
            )
        return left
