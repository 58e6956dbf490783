"""The layer of a transformers cache that holds the state of a mechanism.

A state is whatever a mechanism keeps: sums of a fixed size, summaries, a window, or all tokens. So
``generate`` costs what the mechanism's own decoding costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from longspan.errors import Refusal


class StateLayer(CacheLayerMixin):
    """State of one converted attention module.

    Attributes:
        state: what the mechanism gave; None before the first tokens, or if it cannot decode.
        seen: tokens so far, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is reserved ahead."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refuse keys: this layer belongs to a mechanism.

        Raises:
            Refusal: always.
        """
        raise Refusal(
            "This cache was filled by a mechanism that has been taken out of the model since: "
            "start with a new cache."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a mask would be made for."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.seen

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    # Its name before transformers 5.20.
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen = None, 0

    def offload(self) -> None:
        """States stay where they are."""

    prefetch = offload

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget the newest tokens: sums cannot be taken apart.

        Raises:
            Refusal: unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise Refusal(
                "The state of a mechanism cannot be cropped (assisted generation needs that)."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each beam go on from another one."""
        self._batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        self._batch(lambda x: x[indices])

    def _batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = _over_tensors(self.state, change)


def state_layer(cache: Cache, index: int) -> StateLayer:
    """The state of layer ``index`` in a cache, put in place of an empty dynamic layer.

    Raises:
        Refusal: if the cache is of another kind, or the layer holds keys already.
    """
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if isinstance(layer, StateLayer):
        return layer
    if type(layer) is not DynamicLayer or layer.get_seq_length():
        raise Refusal(
            "A mechanism keeps a state of its own and needs a new dynamic cache; got a "
            f"{type(layer).__name__}. Leave past_key_values and cache_implementation out."
        )
    cache.layers[index] = own = StateLayer()
    return own


def _over_tensors(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, tuple):
        return tuple(_over_tensors(part, change) for part in state)
    if is_dataclass(state) and not isinstance(state, type):
        parts = {f.name: _over_tensors(getattr(state, f.name), change) for f in fields(state)}
        return replace(state, **parts)
    return state
