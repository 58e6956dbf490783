"""What a cache layer holds: the kept tokens, and what its policy has to know of them.

Padding is never stored. What is stored is detached: gradients do not reach earlier calls.

Axes: B batch, H query heads, G key heads, C places, N new rows, D head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.hf._cache_asked import Asked
from longspan.hf._cache_read import KeptReader, positions_of
from longspan.hf._cache_rows import SeenRows
from longspan.hf._query_notes import QueryNotes
from longspan.hf.embedded import EmbeddingNorms
from longspan.kv.policy import Policy
from longspan.kv.store import Store
from longspan.kv.view import Turn, View, column_sums, over_group


@dataclass(frozen=True, eq=False, kw_only=True)
class Role:
    """What one layer of a cache is for.

    Attributes:
        policy: what stays.
        layer: which of the layers that take part.
        layers: how many take part.
        packed: read kept keys as if they lay side by side before the newest token.
        turn: rotates by so many positions more; needed for ``packed`` and for moments.
        norms: of the model's embeddings, if the policy needs them.
    """

    policy: Policy
    layer: int
    layers: int
    packed: bool = False
    turn: Turn | None = None
    norms: EmbeddingNorms | None = None


class KeptTokens:
    """The tokens of one layer.

    Attributes:
        role: of the layer.
        store: the tokens; None before any.
        rows: which rows so far were tokens.
        notes: of the queries.
        reader: reads the store.
        scale: factor on the logits, of the last call.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.store: Store | None = None
        self.rows = SeenRows()
        self.notes = QueryNotes(role.policy, role.turn)
        self.reader = KeptReader(role.policy, role.layer, role.turn if role.packed else None)
        self.scale = 1.0

    @property
    def bytes(self) -> int:
        """Bytes allocated: tokens with their room, and what the policy notes of them."""
        stored = 0 if self.store is None else self.store.bytes
        return stored + self.notes.bytes + self.reader.bytes

    def append(self, key: Tensor, value: Tensor, at: Tensor, real: Tensor | None) -> Store:
        """Store new rows.

        Args:
            key: [B, G, N, D].
            value: [B, G, N, Dv].
            at: positions [B, N].
            real: which are tokens, bool [B, N]; None: all.

        Returns:
            The store.
        """
        batch, heads, new, _ = key.shape
        place = at.to(key.device, torch.int32)[:, None].expand(-1, heads, -1)
        rows = {"keys": key, "values": value, "positions": place}
        if self.role.policy.needs_sums:
            rows["sums"] = torch.zeros(batch, heads, new, device=key.device)
        if self.role.policy.needs_norms:
            assert self.role.norms is not None
            found = self.role.norms.newest(batch, new).to(key.device)
            rows["norms"] = found[:, None].expand(-1, heads, -1)
        if self.store is None:
            like = {
                name: row if name in ("keys", "values") else row[0, 0, 0]
                for name, row in rows.items()
            }
            self.store = Store(batch, heads, like)
        before = self.store.length
        self.store.append(rows, real)
        self.reader.appended(key, before, real)
        return self.store

    def observe(
        self, query: Tensor, at: Tensor, real: Tensor | None, lse: Tensor | None, asked: Asked
    ) -> None:
        """Note of the queries of new rows, which are stored, what the policy needs.

        Args:
            query: [B, H, N, D].
            at: positions [B, N].
            real: which are tokens, bool [B, N]; None: all.
            lse: [B, H, N] over all stored keys at or before each row; None: not known.
            asked: what the call asked for.
        """
        assert self.store is not None
        query, policy = query.detach(), self.role.policy
        known = at if real is None else at.masked_fill(~real, -1)
        place = known.to(query.device)
        self.notes.take(query, place, asked.position_ids)
        if policy.needs_sums and (query.shape[2] > 1 or policy.sums_steps):
            positions = positions_of(self.store)
            received = column_sums(
                query,
                self.reader.keys(self.store),
                place,
                positions,
                self.scale,
                lse=None if lse is None else lse.detach(),
                aligned=real is None and self.store.even,
            )
            self.store.add("sums", over_group(received, positions.shape[1]).sum(2))

    def cut(self, left: Tensor) -> None:
        """Drop what was taken for tokens, and is padding: all but the first ``left`` [B]."""
        assert self.store is not None
        positions = positions_of(self.store)
        limit = left.to(positions.device)
        self.store.keep((positions >= 0) & (positions < limit[:, None, None]))
        self.notes.forget_from(left)
        self.reader.bounds = None

    def evict(self) -> None:
        """Let the policy decide."""
        policy = self.role.policy
        if self.store is None or self.store.longest <= policy.least:
            return
        if self.store.keep(policy.keep(self.view())):
            self.reader.evicted, self.reader.bounds = True, None

    def select(self, indices: Tensor) -> None:
        """Take rows of the batch by index."""
        if self.store is not None:
            self.store.select(indices)
            self.rows.select(indices)
            self.notes.select(indices)
            self.reader.bounds = None

    def view(self) -> View:
        """What the policy sees."""
        store, tokens = self.store, self.rows.tokens
        assert store is not None
        assert tokens is not None
        sums, norms = (
            store.padded(name) if name in store.buffers else None for name in ("sums", "norms")
        )
        return View(
            keys=self.reader.keys(store),
            values=store.padded("values"),
            positions=positions_of(store),
            seen=tokens,
            scale=self.scale,
            layer=self.role.layer,
            layers=self.role.layers,
            queries=self.notes.queries,
            query_positions=self.notes.positions,
            sums=sums,
            moments=self.notes.moments,
            norms=norms,
            turn=self.role.turn,
        )

    def fork(self, policy: Policy) -> KeptTokens:
        """A copy for another policy, which has not decided yet.

        Raises:
            InputError: if something was evicted, there is nothing, or what the policy needs was
                not noted.
        """
        if self.store is None or self.reader.evicted:
            raise InputError(
                "fork needs a cache that has read a prompt and evicted nothing: make it with the "
                "policy longspan.hf.fork.waiting([...]) and give it no single tokens."
            )
        own = self.role.policy
        lacking = [
            what
            for what, needed, noted in (
                ("the last queries", policy.observes, own.observes),
                ("attention received", policy.needs_sums, own.needs_sums),
                ("mean queries", policy.needs_moments, own.needs_moments),
                ("norms of embeddings", policy.needs_norms, own.needs_norms),
            )
            if needed > noted
        ]
        if lacking:
            raise InputError(
                f"This cache has not noted {' and '.join(lacking)}, which {policy} needs: make it "
                "with the policy longspan.hf.fork.waiting([...])."
            )
        new = KeptTokens(replace(self.role, policy=policy))
        needed = {"sums": policy.needs_sums, "norms": policy.needs_norms}
        new.store = self.store.copy([name for name, used in needed.items() if not used])
        new.rows, new.notes = copy.copy(self.rows), self.notes.fork(policy)
        new.scale = self.scale
        return new
