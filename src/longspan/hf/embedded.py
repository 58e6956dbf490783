"""Norms of what a model's input embedding gives, noted while it runs.

Attention functions and caches see queries and keys alone. A model with these hooks also says how
long the embedding of each token is, without being known: every transformers model names its input
embedding. Tokens of earlier calls are remembered with the cache that went along, so that a chunk
of a prompt knows the norms of the chunks before it.

Axes: B batch, N new rows, M rows with those before.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from longspan.errors import Refusal
from longspan.hf.routes import routed
from longspan.select.estimate import norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# On models and their attention modules; and the hooks of a model.
_NAME, _HOOKS = "_longspan_embedding_norms", "_longspan_embedding_hooks"


class _Call(threading.local):
    """The present call of a model: threads that share it must not read each other's."""

    newest: Tensor | None = None
    # Not the cache itself: the memory of the last one is not to wait for the next call.
    cache: ReferenceType[Any] | None = None


@dataclass
class _Noted:
    """What the calls before have given that went along with one cache.

    Attributes:
        parts: norms of each call [B, N].
        keys: those of a layer of the cache after the last call. What puts other rows in their
            place, as beams do, makes another tensor.
    """

    parts: list[Tensor] = field(default_factory=list)
    keys: ReferenceType[Tensor] | None = None


class EmbeddingNorms:
    """What a model's embedding gave last; one for each model, made by ``embedding_norms``."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is known."""
        self._call = _Call()
        self._known: WeakKeyDictionary[Any, _Noted] = WeakKeyDictionary()

    def newest(self, batch: int, rows: int) -> Tensor:
        """Norms of the rows of the present call, float32 [B, N].

        Raises:
            Refusal: if the model did not embed such rows.
        """
        own = self._call.newest
        if own is None or own.shape != (batch, rows):
            raise Refusal(
                f"The norms of the embeddings of {batch} x {rows} rows are not known: call the "
                "model itself, with input_ids or inputs_embeds, and make caches and prefill "
                "methods with embeddingnorm(...) anew after longspan.hf.remove(model)."
            )
        return own

    def all(self, batch: int, rows: int) -> Tensor:
        """Norms of those before the present call too, float32 [B, M].

        Raises:
            Refusal: if they are not known.
        """
        own, held = self._call.newest, self._call.cache
        if own is not None and own.shape == (batch, rows):
            return own
        cache = None if held is None else held()
        before = None if cache is None else self._known.get(cache)
        parts = [*(before.parts if before else []), *([] if own is None else [own])]
        widths = sum(part.shape[1] for part in parts)
        if widths != rows or any(len(part) != batch for part in parts):
            raise Refusal(
                f"Of {rows} rows, the norms of {widths} embeddings are known: embeddingnorm(...) "
                "needs the prompt as a whole, or in chunks with one cache, all read while the "
                "method is applied, and no rows of the cache changed in between, as beams do."
            )
        return torch.cat([part.to(parts[-1].device) for part in parts], 1)

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: forget the last call."""
        given = kwargs.get("inputs_embeds")
        self._call.newest = None if given is None else norm(given.detach())
        cache = kwargs.get("past_key_values")
        self._call.cache = None if cache is None else ref(cache)
        before = None if cache is None else self._known.get(cache)
        if before and before.keys and before.keys() is not _keys(cache):
            # Its rows are others now, or were cut: which norms are theirs is not known.
            del self._known[cache]

    def note(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """After the embedding."""
        self._call.newest = norm(out.detach())

    def end(self, _: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """After the model: remember with the cache."""
        cache, own = getattr(out, "past_key_values", None), self._call.newest
        if cache is None or own is None:
            return
        noted = self._known.setdefault(cache, _Noted())
        if cache.get_seq_length() <= own.shape[1]:
            # A cache that was emptied.
            noted.parts.clear()
        noted.parts.append(own)
        keys = _keys(cache)
        noted.keys = None if keys is None else ref(keys)

    def __reduce__(self) -> tuple[Any, ...]:
        # What was noted is of this run, and of this model: a copy notes its own.
        return EmbeddingNorms, ()


def _keys(cache: Any) -> Tensor | None:
    """The keys of the first layer of a cache that holds some as they are.

    A cache with a policy keeps norms beside its keys, and is asked for those of new rows alone.
    """
    held = (vars(layer).get("keys") for layer in getattr(cache, "layers", ()))
    return next((keys for keys in held if isinstance(keys, Tensor)), None)


def embedding_norms(base: PreTrainedModel) -> EmbeddingNorms:
    """The norms that a model notes; from the first call of this function on it does."""
    if _NAME in base.__dict__:
        return base.__dict__[_NAME]
    found = EmbeddingNorms()
    hooks = (
        base.register_forward_pre_hook(found.begin, with_kwargs=True),
        base.get_input_embeddings().register_forward_hook(found.note),
        base.register_forward_hook(found.end, with_kwargs=True),
    )
    for _, module in routed(base):
        setattr(module, _NAME, found)
    setattr(base, _NAME, found)
    # Beside it, not in it: copies of the model have handles of their own.
    setattr(base, _HOOKS, hooks)
    return found


def norms_for(module: nn.Module) -> EmbeddingNorms:
    """The norms that the model around an attention module notes.

    Raises:
        Refusal: if it does not.
    """
    found = module.__dict__.get(_NAME)
    if found is None:
        raise Refusal(
            "This model does not note the norms of its embeddings, which embeddingnorm(...) "
            "chooses by: put the method in with longspan.hf.prefill(model, ...)."
        )
    return found


def forget_norms(base: PreTrainedModel) -> None:
    """Take the hooks out again; nothing to do without any."""
    found = base.__dict__.pop(_NAME, None)
    if found is not None:
        for hook in base.__dict__.pop(_HOOKS):
            hook.remove()
        # Caches that still hold it must not go by what was noted long ago.
        found.forget()
        for module in base.modules():
            module.__dict__.pop(_NAME, None)
