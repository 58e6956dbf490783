"""One layer of a cache that follows a policy.

transformers calls ``update`` with the new keys and values; the attention function then calls
``attend``, which stores them, reads what is kept, and lets the policy decide. So the new rows see
the kept tokens and themselves, and what goes, goes afterwards. transformers is told the tokens
*seen* as the length, so that positions go on counting, and the tokens *kept* as the mask's size.

    first rows          the pattern's kernel over the new rows
    more than one row   dense over the kept tokens, kernel over the new rows, merged by lse
    one row             stored first, then read with the rest

Padding is never stored. A row of a batch that ends early is fed some that nothing marks; it goes
when a later mask says what it was. What is stored is detached: gradients do not reach earlier
calls.

Axes: B batch, H query heads, G key heads, C places, N new rows, D head width.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from longspan.errors import InputError, Refusal
from longspan.hf._cache_asked import Asked, NewRows, mark
from longspan.hf._query_notes import QueryNotes
from longspan.hf.embedded import EmbeddingNorms
from longspan.hf.register import registered
from longspan.hf.rows import Rows
from longspan.kv.policy import Policy
from longspan.kv.quest import PageBounds, Quest
from longspan.kv.read import read, read_one
from longspan.kv.store import Store
from longspan.kv.view import Turn, View, column_sums, over_group
from longspan.ops import attend, merge
from longspan.pattern import Causal, Dense, Pattern

_UNREAD = (
    "This cache is read by longspan's attention, which the model does not use (any more), or "
    "which did not receive the cache's keys as they were. Make the cache with "
    "longspan.kv.cache(model, ...) after the model's attention is settled, and keep it applied "
    "while the cache is in use."
)

_READ_TWICE = (
    "This model attends twice to the same keys (as DiffLlama does, and layers that share the keys "
    "of an earlier one), which a cache with a policy stores and forgets at their first reading. "
    "Leave past_key_values out; the cache and what the model computed are not to be used."
)


class KeptLayer(CacheLayerMixin):
    """Keys and values of one layer, and what its policy needs to know of them."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        policy: Policy,
        config: Any,
        *,
        modules: frozenset[int],
        layer: int,
        layers: int,
        packed: bool = False,
        turn: Turn | None = None,
        norms: EmbeddingNorms | None = None,
    ) -> None:
        """A new layer.

        Args:
            policy: what stays.
            config: of the model; consulted for its present attention.
            modules: ``id`` of the configurations that modules of the model have.
            layer: which of the layers that take part.
            layers: how many take part.
            packed: read kept keys as if they lay side by side before the newest token.
            turn: rotates by so many positions more; needed for ``packed`` and for moments.
            norms: of the model's embeddings, if the policy needs them.
        """
        self.policy = policy
        self.layer, self.layers = layer, layers
        self.packed, self.turn = packed, turn
        self.norms = norms
        self._config = weakref.ref(config)
        self._modules = modules
        self._quest = next((part for part in policy.parts if isinstance(part, Quest)), None)
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptLayer:
        # A copy belongs to the same model, which a pickle cannot say.
        new = object.__new__(type(self))
        memo[id(self)] = new
        memo[id(self.norms)] = self.norms
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __reduce__(self) -> Any:
        raise Refusal(
            "a cache with a policy cannot be pickled: it reads attention, rotation and "
            "embeddings of the model that it was made for, in this process. Copy it with "
            "copy.deepcopy(cache) here; elsewhere make one with longspan.kv.cache(model, ...) and "
            "read the prompt again."
        )

    def reset(self) -> None:
        """Forget everything."""
        self.store: Store | None = None
        self.is_initialized = False
        self.seen = 0
        self._pending = self._due = self._evicted = False
        self._since = 0
        self._scale = 1.0
        self._real: Tensor | None = None
        self._told: NDArray[np.bool_] | None = None
        self.notes = QueryNotes(self.policy, self.turn)
        self._bounds: PageBounds | None = None

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
        if self.store is None:
            return None
        positions = self.store.padded("positions").long()
        # Most caches are even, at every step.
        return positions if self.store.even else positions.masked_fill(~self.store.valid(), -1)

    @property
    def bytes(self) -> int:
        """Bytes allocated: tokens with their room, and what the policy notes of them."""
        stored = 0 if self.store is None else self.store.bytes
        bounds = 0 if self._bounds is None else self._bounds.bytes
        return stored + self.notes.bytes + bounds

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing to do ahead: the attention function stores."""

    @torch.compiler.disable
    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys [B, G, N, D] and values; the attention function finds this layer by them.

        Raises:
            Refusal: if the model does not compute attention through longspan.
        """
        config = self._config()
        name = None if config is None else config._attn_implementation
        self.check_read()
        if not isinstance(registered(name), Pattern):
            raise Refusal(_UNREAD)
        self.check_batch(len(key_states))
        if self._due and key_states.shape[2] == 1:
            self.evict()
        self._pending = True
        mark(key_states, self)
        return key_states, value_states

    def check_batch(self, rows: int) -> None:
        """Refuse another number of sequences than those that were read."""
        if self.store is not None and rows != len(self.store.length):
            raise InputError(
                f"the cache holds {len(self.store.length)} sequences, got {rows}; use "
                "batch_repeat_interleave or batch_select_indices of the cache to change that."
            )

    def check_read(self) -> None:
        """Refuse what comes after new keys that nobody has read here."""
        if self._pending:
            # Whose cache it is may go on with it.
            self._pending = False
            raise Refusal(_UNREAD)

    def claim(self, module: nn.Module) -> None:
        """Give the new keys to the attention that reads them; whatever stops it, others may go on.

        Args:
            module: whose attention it is.

        Raises:
            Refusal: if the keys were read before: they would be stored twice. Or if the module is
                of another model than the cache: keys of one model mean nothing to another, and a
                policy reads its rotation and embeddings.
        """
        if not self._pending:
            raise Refusal(_READ_TWICE)
        self._pending = False
        config = getattr(module, "config", None)
        if config is not None and id(config) not in self._modules:
            raise Refusal(
                "This cache was made for another model than that of the "
                f"{type(module).__name__} which reads it now. Make one with "
                "longspan.kv.cache(model, ...) for the model that uses it."
            )

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
        self._scale = asked.scale
        at, real = self._stand(asked.rows, len(query))
        kept = 0 if self.store is None else self.store.longest
        lse: Tensor | None
        if kept == 0:
            out, lse = new_rows()
            self._append(key, value, at, real)
        elif query.shape[2] > 1 and asked.pattern == Causal():
            out, lse = merge([self._read_old(query, at, real), new_rows()])
            self._append(key, value, at, real)
        else:
            self._append(key, value, at, real)
            out, lse = self._read(query, at, real, asked)
        exact = asked.dense and asked.pattern == Causal()
        self._observe(query, at, real, lse if exact else None, asked)
        self._after(query.shape[2])
        return out, lse

    def evict(self) -> None:
        """Let the policy decide now."""
        self._due, self._since = False, 0
        if self.store is None or self.store.longest <= self.policy.least:
            return
        if self.store.keep(self.policy.keep(self.view())):
            self._evicted = True
            self._bounds = None

    def fork(self, policy: Policy) -> KeptLayer:
        """A copy as another policy would have it now, which has decided already.

        Raises:
            InputError: if this layer has evicted something, is empty, or has not noted what the
                policy needs.
        """
        if self.store is None or self._evicted:
            raise InputError(
                "fork needs a cache that has read a prompt and evicted nothing: make it with the "
                "policy longspan.hf.fork.waiting([...]) and give it no single tokens."
            )
        lacking = [
            what
            for what, needed, noted in (
                ("the last queries", policy.observes, self.policy.observes),
                ("attention received", policy.needs_sums, self.policy.needs_sums),
                ("mean queries", policy.needs_moments, self.policy.needs_moments),
                ("norms of embeddings", policy.needs_norms, self.policy.needs_norms),
            )
            if needed > noted
        ]
        if lacking:
            raise InputError(
                f"This cache has not noted {' and '.join(lacking)}, which {policy} needs: make it "
                "with the policy longspan.hf.fork.waiting([...])."
            )
        new = KeptLayer(
            policy,
            self._config(),
            modules=self._modules,
            layer=self.layer,
            layers=self.layers,
            packed=self.packed,
            turn=self.turn,
            norms=self.norms,
        )
        needed = {"sums": policy.needs_sums, "norms": policy.needs_norms}
        new.store = self.store.copy([name for name, used in needed.items() if not used])
        new.is_initialized, new.seen = True, self.seen
        new._scale, new._real, new._told = self._scale, self._real, self._told
        new.notes = self.notes.fork(policy)
        if policy.evicts:
            new.evict()
        return new

    def view(self) -> View:
        """What the policy sees."""
        assert self.store is not None
        assert self._real is not None
        positions = self.positions
        assert positions is not None
        sums, norms = (
            self.store.padded(name) if name in self.store.buffers else None
            for name in ("sums", "norms")
        )
        return View(
            keys=self._as_read(self.store.padded("keys")),
            values=self.store.padded("values"),
            positions=positions,
            seen=self._real,
            scale=self._scale,
            layer=self.layer,
            layers=self.layers,
            queries=self.notes.queries,
            query_positions=self.notes.positions,
            sums=sums,
            moments=self.notes.moments,
            norms=norms,
            turn=self.turn,
        )

    def get_seq_length(self) -> int:
        """Tokens seen, padding counted."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys that the next rows can see at most, rows before the first of them)."""
        rows = query_length if isinstance(query_length, int) else len(query_length)
        kept = 0 if self.store is None else self.store.longest
        return kept + rows, self.seen - kept

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take batch rows by index, as beam search does."""
        if self.store is None:
            return
        assert self._real is not None
        self.store.select(beam_idx)
        self._real = self._real[beam_idx.cpu()]
        if self._told is not None:
            self._told = self._told[beam_idx.cpu().numpy()]
        self._bounds = None
        self.notes.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows, by index or boolean mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.store is not None:
            row = torch.arange(len(self.store.length), device="cpu")
            self.reorder_cache(row.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to take back of 0 tokens; more cannot be taken back.

        Raises:
            Refusal: for other numbers: what was evicted for them is gone.
        """
        if tokens_to_remove:
            refuse_to_take_back()

    def offload(self) -> None:
        """Not offered.

        Raises:
            Refusal: always.
        """
        raise Refusal("A cache with a policy is not offloaded; it is small by itself.")

    prefetch = offload

    def _stand(self, rows: Rows, batch: int) -> tuple[Tensor, Tensor | None]:
        """Positions [B, N] of the new rows, and which are real (None: all); counts them."""
        # One row of a mask stands for the whole batch.
        told = (
            None if rows.real is None else np.broadcast_to(rows.real, (batch, rows.real.shape[1]))
        )
        if self._real is not None:
            self._forget_padding(rows, told, batch)
        self._told = told
        if rows.positions is None or rows.segments is None:
            at = (rows.query_start + torch.arange(rows.queries, device="cpu")).expand(batch, -1)
            self._real = torch.full((batch,), rows.query_start + rows.queries, device="cpu")
            self.seen += rows.queries
            return at, None
        at = torch.from_numpy(rows.positions).expand(batch, -1)
        real = torch.from_numpy(rows.segments >= 0).expand(batch, -1)
        before = (
            torch.zeros(batch, dtype=torch.int64, device="cpu")
            if self._real is None
            else self._real
        )
        last = (at + 1).masked_fill(~real, 0).amax(1)
        self._real = torch.maximum(before, last)
        self.seen += rows.queries
        return at, None if bool(real.all()) else real

    def _forget_padding(self, rows: Rows, told: NDArray[np.bool_] | None, batch: int) -> None:
        """Drop what was taken for tokens, and is padding by the present mask, told [B, rows].

        Raises:
            InputError: if the mask has changed elsewhere than at the end of a row.
        """
        assert self._real is not None
        assert self.store is not None
        if "before" not in rows.kept:
            # Once for all layers.
            rows.kept["before"] = (
                torch.full((batch,), self.seen, device="cpu")
                if told is None
                else torch.from_numpy(told[:, : self.seen].sum(1))
            )
        count: Tensor = rows.kept["before"]
        if bool((count == self._real).all()):
            return
        everything = np.ones((batch, self.seen), bool)
        old = everything if self._told is None else self._told
        now = everything if told is None else told[:, : self.seen]
        rank = old.cumsum(1) - 1
        if not np.array_equal(now, old & (rank < count.numpy()[:, None])):
            raise InputError(
                "The attention_mask says of tokens that the cache has read that they are padding, "
                "or the reverse, and not only at the end of a row: pass the mask of the earlier "
                "calls, with ones or zeros behind it."
            )
        positions = self.positions
        assert positions is not None
        limit = count.to(positions.device)
        self.store.keep((positions >= 0) & (positions < limit[:, None, None]))
        self.notes.forget_from(count)
        self._real, self._bounds = count, None

    def _append(self, key: Tensor, value: Tensor, at: Tensor, real: Tensor | None) -> None:
        batch, heads, new, _ = key.shape
        place = at.to(key.device, torch.int32)[:, None].expand(-1, heads, -1)
        rows = {"keys": key, "values": value, "positions": place}
        if self.policy.needs_sums:
            rows["sums"] = torch.zeros(batch, heads, new, device=key.device)
        if self.policy.needs_norms:
            assert self.norms is not None
            found = self.norms.newest(batch, new).to(key.device)
            rows["norms"] = found[:, None].expand(-1, heads, -1)
        if self.store is None:
            like = {
                name: row if name in ("keys", "values") else row[0, 0, 0]
                for name, row in rows.items()
            }
            self.store = Store(batch, heads, like)
            self.is_initialized = True
        before = self.store.length
        self.store.append(rows, real)
        if self._bounds is not None and real is None:
            self._bounds.extend(key, before, torch.full_like(before, new))
        else:
            self._bounds = None

    def _as_read(self, keys: Tensor, newest: Tensor | None = None) -> Tensor:
        """Kept keys, moved next to each other if positions are packed.

        Args:
            keys: [B, G, C, D], the stored ones.
            newest: position before which the last of them is to lie [B]; None: the last one stays.
        """
        if not (self.packed and self._evicted):
            return keys
        assert self.store is not None
        assert self.turn is not None
        positions = self.positions
        assert positions is not None
        last = positions.amax((1, 2)) if newest is None else newest.to(keys.device) - 1
        length = self.store.length.to(keys.device)
        place = torch.arange(keys.shape[2], device=keys.device)
        goal = last[:, None, None] - (length[..., None] - 1 - place)
        shift = (goal - positions).masked_fill(positions < 0, 0)
        return self.turn(keys.flatten(0, 1)[:, None], shift.flatten(0, 1)).view_as(keys)

    def _read_old(self, query: Tensor, at: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention of new rows, all later, over everything that is kept."""
        assert self.store is not None
        # Padding before the new tokens stands where the last old one does.
        later = at if real is None else at.masked_fill(~real, int(at.max()))
        keys = self._as_read(self.store.padded("keys"), later.amin(1))
        values = self.store.padded("values")
        if self.store.even:
            # Nothing to mask: any kernel does it.
            return attend(
                query,
                keys.contiguous(),
                values.contiguous(),
                Dense(),
                positions=torch.arange(query.shape[2], device="cpu"),
                key_positions=torch.arange(keys.shape[2], device="cpu"),
                scale=self._scale,
                return_lse=True,
            )
        positions = self.positions
        assert positions is not None
        return read(query, keys, values, at.to(query.device), positions, self._scale)

    def _read(
        self, query: Tensor, at: Tensor, real: Tensor | None, asked: Asked
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over what is stored, the new rows among it."""
        assert self.store is not None
        store, device = self.store, query.device
        simple = asked.pattern == Causal() and query.shape[2] == 1 and real is None
        places = self._pages(query) if simple else None
        if places is not None:
            keys, values = store.gather("keys", places), store.gather("values", places)
            valid = places < store.length.to(device)[..., None]
            at_keys = store.gather("positions", places).long().masked_fill(~valid, -1)
        else:
            keys, values = self._as_read(store.padded("keys")), store.padded("values")
            if simple and not asked.with_lse:
                valid = None if store.even else store.valid()
                return read_one(query, keys, values, valid, self._scale), None
            at_keys = self.positions
            assert at_keys is not None
            valid = at_keys >= 0
        if simple and not asked.with_lse:
            return read_one(query, keys, values, valid, self._scale), None
        return read(query, keys, values, at.to(device), at_keys, self._scale, asked.pattern)

    def _pages(self, query: Tensor) -> Tensor | None:
        """Places that Quest reads [B, G, S]; None for all."""
        if self._quest is None or self.layer < self._quest.dense_layers:
            return None
        assert self.store is not None
        if self._bounds is None:
            self._bounds = PageBounds(
                self._quest.page, self.store.padded("keys"), self.store.length
            )
        return self._bounds.choose(query[:, :, 0], self.store.length, self._quest.tokens)

    def _observe(
        self,
        query: Tensor,
        at: Tensor,
        real: Tensor | None,
        lse: Tensor | None,
        asked: Asked,
    ) -> None:
        """Note of the queries what the policy needs."""
        assert self.store is not None
        query = query.detach()
        known = at if real is None else at.masked_fill(~real, -1)
        place = known.to(query.device)
        self.notes.take(query, place, asked.position_ids)
        if self.policy.needs_sums and (query.shape[2] > 1 or self.policy.sums_steps):
            positions = self.positions
            assert positions is not None
            received = column_sums(
                query,
                self._as_read(self.store.padded("keys")),
                place,
                positions,
                self._scale,
                lse=None if lse is None else lse.detach(),
                aligned=real is None and self.store.even,
            )
            self.store.add("sums", over_group(received, positions.shape[1]).sum(2))

    def _after(self, new: int) -> None:
        if not self.policy.evicts:
            return
        self._since += new
        if self.policy.when == 0:
            self._due = self._due or new > 1
        elif self._since >= self.policy.when:
            self.evict()


def refuse_to_take_back() -> NoReturn:
    """Raise Refusal: what was evicted for tokens that came too early is gone."""
    raise Refusal(
        "A cache with a policy cannot take tokens back, which assisted and prompt-lookup "
        "decoding need: what was evicted for them is gone. Decode without them."
    )
