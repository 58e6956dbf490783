"""What a cache layer remembers of the queries, as far as its policy asks for it.

The last queries themselves, for policies that look at a window of them; sums of q and q q^T before
rotation, for those that expect the next ones. Padding is never counted.

Axes: B batch, H query heads, N new rows, W observed queries, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.kv.policy import Policy
from longspan.kv.view import Moments, Turn


class QueryNotes:
    """Notes of one layer.

    Attributes:
        queries: the last ones [B, H, W, D]; None before any, or if no part asks for them.
        positions: theirs, int64 [B, W], -1 for padding.
        moments: of all queries so far; None as for ``queries``.
    """

    def __init__(self, policy: Policy, turn: Turn | None) -> None:
        """Empty notes.

        Args:
            policy: says what is noted.
            turn: rotates by so many positions more; needed for moments.
        """
        self._policy, self._turn = policy, turn
        self.queries: Tensor | None = None
        self.positions: Tensor | None = None
        self.moments: Moments | None = None

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        held = [self.queries, self.positions]
        if self.moments is not None:
            held += [self.moments.first, self.moments.second]
        return sum(x.untyped_storage().nbytes() for x in held if x is not None)

    def take(self, query: Tensor, place: Tensor, position_ids: Any) -> None:
        """Note new queries.

        Args:
            query: [B, H, N, D], rotated, without gradient.
            place: positions among the real tokens, int64 [B, N], -1 for padding.
            position_ids: for which the model rotated them, if it says so.
        """
        if self._policy.observes:
            last = self._policy.observes
            queries = query if self.queries is None else torch.cat([self.queries, query], 2)
            places = place if self.positions is None else torch.cat([self.positions, place], 1)
            # The last tokens of each row: padding between two prompts pushes none of them out.
            chosen = (places >= 0).byte().argsort(dim=1, stable=True)[:, -last:]
            self.queries = queries.take_along_dim(chosen[:, None, :, None], 2)
            self.positions = places.gather(1, chosen)
        if self._policy.needs_moments:
            self._add_moments(query, place, position_ids)

    def forget_from(self, count: Tensor) -> None:
        """Positions from ``count`` [B] on were padding; means go on counting their queries."""
        if self.positions is not None:
            gone = self.positions >= count.to(self.positions.device)[:, None]
            self.positions = self.positions.masked_fill(gone, -1)

    def select(self, rows: Tensor) -> None:
        """Take batch rows by index."""
        for name in ("queries", "positions"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held[rows.to(held.device)])
        if self.moments is not None:
            old = self.moments
            rows = rows.to(old.first.device)
            self.moments = Moments(
                count=old.count[rows], first=old.first[rows], second=old.second[rows]
            )

    def fork(self, policy: Policy) -> QueryNotes:
        """A copy of what another policy needs of them."""
        new = QueryNotes(policy, self._turn)
        if policy.observes:
            assert self.queries is not None
            assert self.positions is not None
            new.queries = self.queries[:, :, -policy.observes :].clone()
            new.positions = self.positions[:, -policy.observes :].clone()
        if policy.needs_moments:
            # Replaced as a whole when queries come, never changed.
            new.moments = self.moments
        return new

    def _add_moments(self, query: Tensor, place: Tensor, position_ids: Any) -> None:
        """Sums of q and q q^T before rotation, over the real tokens that count."""
        assert self._turn is not None
        batch, heads, _, width = query.shape
        rotated = place if position_ids is None else position_ids.expand(batch, -1)
        counted = place >= self._policy.skips
        kind = torch.promote_types(query.dtype, torch.float32)
        plain = self._turn(query.to(kind), -rotated) * counted[:, None, :, None]
        if self.moments is None:
            self.moments = Moments(
                count=plain.new_zeros(batch),
                first=plain.new_zeros(batch, heads, width),
                second=plain.new_zeros(batch, heads, width, width),
            )
        old = self.moments
        self.moments = Moments(
            count=old.count + counted.sum(1),
            first=old.first + plain.sum(2),
            second=old.second + plain.mT @ plain,
        )
