"""One layer of a cache that follows a policy.

transformers calls ``update`` with the new keys and values; the attention function then calls
``attend``, which stores them, reads what is kept, and lets the policy decide. So the new rows see
the kept tokens and themselves, and what goes, goes afterwards. transformers is told the tokens
*seen* as the length, so that positions go on counting, and the tokens *kept* as the mask's size.

    first rows          the pattern's kernel over the new rows
    more than one row   dense over the kept tokens, kernel over the new rows, merged by lse
    one row             stored first, then read with the rest

Axes: B batch, H query heads, G key heads, C places, N new rows, D head width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from longspan.hf._cache_asked import Asked, NewRows
from longspan.hf._cache_handover import HandedLayer
from longspan.hf._cache_read import positions_of
from longspan.hf._cache_tokens import KeptTokens, Role
from longspan.kv.policy import Policy
from longspan.kv.store import Store
from longspan.kv.view import View
from longspan.ops import merge
from longspan.pattern import Causal


class KeptLayer(HandedLayer):
    """Keys and values of one layer, of which a policy decides what stays.

    Attributes:
        held: the tokens, and what the policy has to know of them.
    """

    def __init__(self, role: Role, config: Any, modules: frozenset[int]) -> None:
        """A new layer.

        Args:
            role: what it is for.
            config: of the model; consulted for its present attention.
            modules: ``id`` of the configurations that modules of the model have.
        """
        super().__init__(config, modules)
        self._hold(KeptTokens(role))

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptLayer:
        # A copy belongs to the same model, which a pickle cannot say.
        new = object.__new__(type(self))
        memo[id(self)] = new
        norms = self.held.role.norms
        memo[id(norms)] = norms
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def reset(self) -> None:
        """Forget everything."""
        self._hold(KeptTokens(self.held.role))

    @property
    def policy(self) -> Policy:
        """What stays."""
        return self.held.role.policy

    @property
    def store(self) -> Store | None:
        """The kept tokens; None before any."""
        return self.held.store

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Kept keys [B, G, C, D]; heads that keep fewer are filled up at the end."""
        return None if self.store is None else self.store.padded("keys")

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Kept values [B, G, C, Dv], as ``keys``."""
        return None if self.store is None else self.store.padded("values")

    @property
    def positions(self) -> Tensor | None:
        """Positions of the kept tokens among the real ones of their row [B, G, C]; -1: none."""
        return None if self.store is None else positions_of(self.store)

    @property
    def is_initialized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether it holds anything."""
        return self.store is not None

    @property
    def bytes(self) -> int:
        """Bytes allocated: tokens with their room, and what the policy notes of them."""
        return self.held.bytes

    @property
    def batch(self) -> int | None:
        """Sequences that it holds; None before any."""
        return None if self.store is None else len(self.store.length)

    @property
    def seen(self) -> int:
        """Tokens seen, padding counted."""
        return self.held.rows.count

    def get_seq_length(self) -> int:
        """Tokens seen, padding counted."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys that the next rows can see at most, rows before the first of them)."""
        rows = query_length if isinstance(query_length, int) else len(query_length)
        kept = 0 if self.store is None else self.store.longest
        return kept + rows, self.seen - kept

    def expect(self, rows: int) -> None:
        """So many new rows come: before a single one, a policy may act on the prompt."""
        if self._due and rows == 1:
            self.evict()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, asked: Asked, new_rows: NewRows
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over what is kept and the new rows; then store, and let the policy decide.

        Args:
            query: [B, H, N, D].
            key: new keys [B, G, N, D].
            value: new values [B, G, N, Dv].
            asked: where the rows stand and may look.
            new_rows: gives (out, lse) of attention among the new rows.

        Returns:
            out [B, H, N, Dv], and lse [B, H, N] if it was computed.
        """
        held = self.held
        held.scale = asked.scale
        at, real, left = held.rows.take(asked.rows, len(query))
        if left is not None:
            held.cut(left)
        lse: Tensor | None
        if held.store is None or held.store.longest == 0:
            out, lse = new_rows()
            held.append(key, value, at, real)
        elif query.shape[2] > 1 and asked.pattern == Causal():
            old = held.reader.before(held.store, query, at, real, asked.scale)
            out, lse = merge([old, new_rows()])
            held.append(key, value, at, real)
        else:
            store = held.append(key, value, at, real)
            out, lse = held.reader.among(store, query, at, real, asked)
        exact = asked.dense and asked.pattern == Causal()
        held.observe(query, at, real, lse if exact else None, asked)
        self._after(query.shape[2])
        return out, lse

    def evict(self) -> None:
        """Let the policy decide now."""
        self._due, self._since = False, 0
        self.held.evict()

    def view(self) -> View:
        """What the policy sees."""
        return self.held.view()

    def fork(self, policy: Policy) -> KeptLayer:
        """A copy as another policy would have it now, which has decided already.

        Raises:
            InputError: if this layer has evicted something, is empty, or has not noted what the
                policy needs.
        """
        held = self.held.fork(policy)
        new = KeptLayer(held.role, self.config(), self.modules)
        new._hold(held)
        if policy.evicts:
            new.evict()
        return new

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take batch rows by index, as beam search does."""
        self.held.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows, by index or boolean mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.batch is not None:
            row = torch.arange(self.batch, device="cpu")
            self.reorder_cache(row.repeat_interleave(repeats))

    def _hold(self, held: KeptTokens) -> None:
        """Hold other tokens, of which no decision is due."""
        self.held = held
        self._pending = self._due = False
        self._since = 0

    def _after(self, new: int) -> None:
        """Count new rows, and let the policy decide if it is time."""
        if not self.policy.evicts:
            return
        self._since += new
        if self.policy.when == 0:
            self._due = self._due or new > 1
        elif self._since >= self.policy.when:
            self.evict()
