"""Layers whose rows look back at tokens: what decoding keeps, and where rows and tokens stand.

Axes: B batch, H query heads, K key heads, N query rows (the last of M), M key rows, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.mechanism._summary_state import join_masks
from longspan.mechanism.layer import (
    Count,
    MechanismLayer,
    check_state,
    cleared,
    positions,
    rows_at,
    to_front,
)
from longspan.nn.attention import check


@dataclass(frozen=True, kw_only=True)
class TokenState:
    """What decoding keeps: the tokens so far, O(N) unless a layer forgets.

    Attributes:
        kept: keys and values [B, K, M, D].
        valid: False at padding [B, M]; None if there is none.
        before: tokens forgotten, per batch row where padding makes them differ.
    """

    kept: tuple[Tensor, ...]
    valid: Tensor | None
    before: Count = 0


class PastLayer(MechanismLayer):
    """Base of layers that decode from the tokens so far; a subclass gives ``answer``."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        state: TokenState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attend.

        Args:
            x: tokens [B, N, d_model]; with a state, those after it.
            mask: True at tokens, False at padding [B, N].
            state: of the tokens before.
            return_state: also return the state after ``x``.

        Returns:
            [B, N, d_model], and with ``return_state`` the state. At padding the attention is 0.
        """
        check(x, self.d_model, mask)
        check_state(state, TokenState, "kept", len(x), self.kv_heads)
        valid = None if mask is None else mask.to(torch.bool)
        (x,) = cleared(valid, x)
        before = 0
        if state is not None:
            rows = (state.kept[0].shape[2], x.shape[1])
            valid = join_masks(state.valid, valid, len(x), rows, x.device)
            before = state.before
        total = x.shape[1] + (0 if state is None else state.kept[0].shape[2])
        place = places(x.shape[1], valid, total, x.device)
        shift = before[:, None] if isinstance(before, Tensor) else before
        asked, new = self.ask(x, place + shift)
        kept = new
        if state is not None:
            kept = tuple(torch.cat(pair, dim=2) for pair in zip(state.kept, new, strict=True))
        out = self.join(self.answer(asked, tokens_first(valid, *kept), place, valid))
        return (out, self.remember(kept, valid, before)) if return_state else out

    def ask(self, x: Tensor, place: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What rows ask with, and what later rows need of them: [B, K, N, D] each."""
        q, k, v = self.project(x, place)
        return (q,), (k, v)

    def answer(
        self,
        asked: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        place: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """The mechanism: what ``ask`` gave, over the tokens so far, to [B, H, N, D].

        Args:
            asked: of the rows.
            kept: of all tokens so far, in the order of positions, padding behind them.
            place: which of these tokens each row is [1 or B, N]; -1 at padding.
            valid: False at padding of the rows so far, as they came [B, M].
        """
        raise NotImplementedError

    def remember(
        self, kept: tuple[Tensor, ...], valid: Tensor | None, before: Count
    ) -> TokenState:
        """The state: everything."""
        return TokenState(kept=kept, valid=valid, before=before)


def places(rows: int, valid_BM: Tensor | None, keys: int, device: torch.device) -> Tensor:
    """Position of each query, the last ``rows`` of ``keys`` [1 or B, N]; -1 at padding."""
    if valid_BM is None:
        return torch.arange(keys - rows, keys, device=device)[None]
    place = positions(valid_BM, valid_BM).masked_fill(~valid_BM, -1)
    return place[:, keys - rows :]


def tokens_first(valid_BM: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows [B, K, M, D] in the order of positions, padding behind them as zeros."""
    if valid_BM is None:
        return tensors
    order, _ = to_front(valid_BM)
    hidden = ~valid_BM.gather(1, order)[:, None, :, None]
    return tuple(rows_at(x, order).masked_fill(hidden, 0.0) for x in tensors)


def in_order(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries; keys and values in the order of positions, padding behind them; the place of each
    query.
    """
    valid = None if mask is None else mask.to(torch.bool)
    (q,) = cleared(valid, q)
    k, v = tokens_first(valid, k, v)
    return q, k, v, places(q.shape[2], valid, k.shape[2], q.device)
