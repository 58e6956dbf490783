"""What transformers and a cache layer with a policy hand to each other.

transformers calls ``update`` with new keys and values, and they come back marked; the attention
function that receives them claims them and calls ``attend`` of the layer. Keys that were not
claimed were read past longspan, and are noticed at the next call.

Axes: B batch, G key heads, N new rows, D head width.
"""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from longspan.errors import InputError, Refusal
from longspan.hf._cache_asked import mark
from longspan.hf.register import registered
from longspan.pattern import Pattern

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


class HandedLayer(CacheLayerMixin):
    """A cache layer whose keys are stored and read by longspan's attention function."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, config: Any, modules: frozenset[int]) -> None:
        """A layer of one model.

        Args:
            config: of the model; consulted for its present attention.
            modules: ``id`` of the configurations that modules of the model have.
        """
        self.config = weakref.ref(config)
        self.modules = modules
        self._pending = False

    def __reduce__(self) -> Any:
        raise Refusal(
            "a cache with a policy cannot be pickled: it reads attention, rotation and "
            "embeddings of the model that it was made for, in this process. Copy it with "
            "copy.deepcopy(cache) here; elsewhere make one with longspan.kv.cache(model, ...) and "
            "read the prompt again."
        )

    @property
    def batch(self) -> int | None:
        """Sequences that it holds; None before any."""
        raise NotImplementedError

    def expect(self, rows: int) -> None:
        """So many new rows come; called before they are taken."""
        raise NotImplementedError

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
        config = self.config()
        name = None if config is None else config._attn_implementation
        self.check_read()
        if not isinstance(registered(name), Pattern):
            raise Refusal(_UNREAD)
        self.check_batch(len(key_states))
        self.expect(key_states.shape[2])
        self._pending = True
        mark(key_states, self)
        return key_states, value_states

    def check_batch(self, rows: int) -> None:
        """Refuse another number of sequences than those that were read."""
        if self.batch not in (None, rows):
            raise InputError(
                f"the cache holds {self.batch} sequences, got {rows}; use "
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
        if config is not None and id(config) not in self.modules:
            raise Refusal(
                "This cache was made for another model than that of the "
                f"{type(module).__name__} which reads it now. Make one with "
                "longspan.kv.cache(model, ...) for the model that uses it."
            )

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    # Its name before transformers 5.20.
    get_max_cache_shape = get_max_length

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


def refuse_to_take_back() -> NoReturn:
    """Raise Refusal: what was evicted for tokens that came too early is gone."""
    raise Refusal(
        "A cache with a policy cannot take tokens back, which assisted and prompt-lookup "
        "decoding need: what was evicted for them is gone. Decode without them."
    )
