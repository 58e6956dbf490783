"""Calls of a model that a cache with a policy cannot serve, refused before anything is computed.

transformers hands a cache on without comparing it with the other arguments: told not to use it,
or given text that it holds already, ``generate`` reads that text again behind itself, and
generates from it without a word. A hook on the model compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from longspan.errors import InputError
from longspan.hf._cache_layer import KeptLayer
from longspan.hf._position_ids import check_goes_on, read_again

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HOOK = "_longspan_cache_calls"


def check_calls(base: PreTrainedModel) -> None:
    """From now on, compare caches with the other arguments of each call of a model."""
    if _HOOK not in base.__dict__:
        hook: Any = _check
        setattr(base, _HOOK, base.register_forward_pre_hook(hook, with_kwargs=True))


def leave_calls(base: PreTrainedModel) -> None:
    """Take the hook out again; nothing to do without one."""
    hook = base.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.remove()


# A compiler around the model steps out here: numbers are read off masks and positions.
@torch.compiler.disable
def _check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the model: raise InputError for arguments that contradict its cache."""
    layers = getattr(kwargs.get("past_key_values"), "layers", ())
    kept = next((layer for layer in layers if isinstance(layer, KeptLayer)), None)
    if kept is None:
        return
    _check_whole(layers)
    if kwargs.get("use_cache") is False:
        raise InputError(
            "past_key_values came with use_cache=False (of the call, or of the generation "
            "settings): generate would read the whole text again at each step, into the cache. "
            "Pass use_cache=True, or leave past_key_values out."
        )
    new = kwargs.get("input_ids", args[0] if args else None)
    new = kwargs.get("inputs_embeds") if new is None else new
    if not isinstance(new, Tensor) or new.dim() < 2:
        return
    (batch, rows), read = new.shape[:2], kept.seen
    kept.check_batch(batch)
    mask, tokens = kwargs.get("attention_mask"), read + rows
    told = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if read and (not rows or (told is not None and told.shape[1] < tokens)):
        raise read_again(read)
    # One row is decoding, where looking would wait for the device at every step.
    if rows > 1:
        so_far = None if told is None else told[:, :tokens]
        check_goes_on(kwargs.get("position_ids"), so_far, read)


def _check_whole(layers: Sequence[Any]) -> None:
    """Raise InputError if some layers have read what others have not."""
    read = {
        layer.get_seq_length()
        for layer in layers
        if isinstance(layer, KeptLayer | DynamicSlidingWindowLayer)
    }
    if len(read) > 1:
        raise InputError(
            "A call before was stopped between two layers (out of memory, perhaps): some layers "
            f"of the cache have read {max(read)} tokens, others {min(read)}. Give reset() of the "
            "cache, or another one, the whole text."
        )
