"""How a cache layer reads what it stores: at which places, which pages, by which kernel.

    more than one row   dense over the kept tokens; the kernel over the new rows is merged by lse
    one row             over all that is stored, itself among it

Axes: B batch, H query heads, G key heads, C places, N new rows, S places read, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.hf._cache_asked import Asked
from longspan.kv.policy import Policy
from longspan.kv.quest import PageBounds, Quest
from longspan.kv.read import read, read_one
from longspan.kv.store import Store
from longspan.kv.view import Turn
from longspan.ops import attend
from longspan.pattern import Causal, Dense


def positions_of(store: Store) -> Tensor:
    """Positions of stored tokens among the real ones of their row, int64 [B, G, C]; -1: none."""
    positions = store.padded("positions").long()
    # Most caches are even, at every step.
    return positions if store.even else positions.masked_fill(~store.valid(), -1)


class KeptReader:
    """Reads the store of one layer.

    Attributes:
        evicted: whether tokens have gone, so that the others no longer lie side by side.
        bounds: of the pages that Quest chooses from; None until it has to.
    """

    def __init__(self, policy: Policy, layer: int, turn: Turn | None) -> None:
        """A reader.

        Args:
            policy: what stays, and how much of it is read.
            layer: which of the layers that take part.
            turn: rotates by so many positions more, if kept keys are to be read as if they lay
                side by side before the newest token; None: where they are.
        """
        quest = next((part for part in policy.parts if isinstance(part, Quest)), None)
        self._quest = None if quest is None or layer < quest.dense_layers else quest
        self._turn = turn
        self.evicted = False
        self.bounds: PageBounds | None = None

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.bounds is None else self.bounds.bytes

    def appended(self, key: Tensor, before: Tensor, real: Tensor | None) -> None:
        """New keys were stored.

        Args:
            key: [B, G, N, D].
            before: tokens that each head had before [B, G].
            real: which of them were stored, bool [B, N]; None: all.
        """
        if self.bounds is not None and real is None:
            self.bounds.extend(key, before, torch.full_like(before, key.shape[2]))
        else:
            self.bounds = None

    def keys(self, store: Store, newest: Tensor | None = None) -> Tensor:
        """Kept keys [B, G, C, D], moved next to each other if positions are packed.

        Args:
            store: the tokens.
            newest: position before which the last of them is to lie [B]; None: the last one stays.
        """
        keys = store.padded("keys")
        if self._turn is None or not self.evicted:
            return keys
        positions = positions_of(store)
        last = positions.amax((1, 2)) if newest is None else newest.to(keys.device) - 1
        length = store.length.to(keys.device)
        place = torch.arange(keys.shape[2], device=keys.device)
        goal = last[:, None, None] - (length[..., None] - 1 - place)
        shift = (goal - positions).masked_fill(positions < 0, 0)
        return self._turn(keys.flatten(0, 1)[:, None], shift.flatten(0, 1)).view_as(keys)

    def before(
        self, store: Store, query: Tensor, at: Tensor, real: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of new rows, all later, over everything that is kept.

        Args:
            store: the tokens.
            query: [B, H, N, D].
            at: positions of the new rows [B, N].
            real: which of them are tokens, bool [B, N]; None: all.
            scale: factor on the logits.

        Returns:
            out [B, H, N, Dv] and lse [B, H, N].
        """
        # Padding before the new tokens stands where the last old one does.
        later = at if real is None else at.masked_fill(~real, int(at.max()))
        keys, values = self.keys(store, later.amin(1)), store.padded("values")
        if store.even:
            # Nothing to mask: any kernel does it.
            return attend(
                query,
                keys.contiguous(),
                values.contiguous(),
                Dense(),
                positions=torch.arange(query.shape[2], device="cpu"),
                key_positions=torch.arange(keys.shape[2], device="cpu"),
                scale=scale,
                return_lse=True,
            )
        return read(query, keys, values, at.to(query.device), positions_of(store), scale)

    def among(
        self, store: Store, query: Tensor, at: Tensor, real: Tensor | None, asked: Asked
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of new rows over everything that is stored, themselves among it.

        Args:
            store: the tokens.
            query: [B, H, N, D].
            at: positions of the new rows [B, N].
            real: which of them are tokens, bool [B, N]; None: all.
            asked: where the rows may look.

        Returns:
            out [B, H, N, Dv], and lse [B, H, N] if it was computed.
        """
        device, scale = query.device, asked.scale
        simple = asked.pattern == Causal() and query.shape[2] == 1 and real is None
        places = self._pages(store, query) if simple else None
        if places is not None:
            keys, values = store.gather("keys", places), store.gather("values", places)
            valid = places < store.length.to(device)[..., None]
            at_keys = store.gather("positions", places).long().masked_fill(~valid, -1)
        else:
            keys, values = self.keys(store), store.padded("values")
            if simple and not asked.with_lse:
                valid = None if store.even else store.valid()
                return read_one(query, keys, values, valid, scale), None
            at_keys = positions_of(store)
            valid = at_keys >= 0
        if simple and not asked.with_lse:
            return read_one(query, keys, values, valid, scale), None
        return read(query, keys, values, at.to(device), at_keys, scale, asked.pattern)

    def _pages(self, store: Store, query: Tensor) -> Tensor | None:
        """Places that Quest reads [B, G, S]; None for all."""
        if self._quest is None:
            return None
        if self.bounds is None:
            self.bounds = PageBounds(self._quest.page, store.padded("keys"), store.length)
        return self.bounds.choose(query[:, :, 0], store.length, self._quest.tokens)
