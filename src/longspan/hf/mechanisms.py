"""Mechanisms in the attention modules of a causal model: one route for all of them.

Chosen modules compute a layer of ``longspan.mechanism`` with the model's own projections; the
others attend densely. The attention implementation gets a name of longspan's, so that padding
reaches the layers, and ``generate`` keeps each layer's own state (see ``_state_layer``).
"""

from __future__ import annotations

import inspect as python_inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longspan import mechanism as mechanisms
from longspan.errors import InputError, Refusal
from longspan.hf._borrowed import build, read_frequencies, try_apart, why_not_apart
from longspan.hf._position_ids import check_goes_on, check_positions
from longspan.hf._state_layer import state_layer
from longspan.hf.register import (
    Attention,
    attention_over,
    checked_rows,
    described,
    enlist,
    register,
    registered,
)
from longspan.hf.rope import trained_length
from longspan.hf.rotary import rotary_modules
from longspan.hf.routes import note_changes, routed
from longspan.hf.rows import Rows
from longspan.hf.turns import check_turns
from longspan.mechanism.layer import MechanismLayer, options_of
from longspan.pattern import Causal
from longspan.position import Frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Options that are a length: by default the one that the model was trained for.
_LENGTHS = ("max_span", "max_length")


@dataclass(frozen=True)
class Method:
    """A mechanism with its options, and the layers of a model that compute it.

    Attributes:
        kind: class of its layers.
        options: their keyword arguments beside sizes and projections.
        layers: numbers of the model's layers; None for all.
    """

    kind: type[MechanismLayer]
    options: tuple[tuple[str, Any], ...]
    layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        words = ", ".join(f"{name}={value!r}" for name, value in self.options)
        where = "" if self.layers is None else f" in layers {', '.join(map(str, self.layers))}"
        return f"{self.kind.__name__}({words}){where}"


def method(
    base: PreTrainedModel,
    kind: type[MechanismLayer] | str,
    layers: Sequence[int] | None,
    impl: str,
    options: dict[str, Any],
) -> Method:
    """A mechanism for a model, with the options that start it near dense attention filled in.

    Raises:
        InputError: for an unknown mechanism, option or layer.
        Refusal: if it has no causal form.
    """
    if isinstance(kind, str):
        found = getattr(mechanisms, kind, None) if kind in mechanisms.__all__ else None
        if not isinstance(found, type) or not issubclass(found, MechanismLayer):
            known = ", ".join(mechanism_names())
            raise InputError(f"{kind!r} is no layer of longspan.mechanism: {known}")
        kind = found
    if not isinstance(kind, type) or not issubclass(kind, MechanismLayer):
        raise InputError(
            f"expected a layer of longspan.mechanism or its name, got {kind!r}: there are "
            f"{', '.join(mechanism_names())}"
        )
    name = kind.__name__
    if kind.no_causal_form or options.get("causal") is False:
        why = kind.no_causal_form or "causal=False lets tokens see later ones"
        raise Refusal(
            f"{name} cannot stand in for the causal attention of {type(base).__name__}: {why}. "
            "The model was not changed."
        )
    # A causal model decides that.
    allowed = {key: found for key, found in options_of(kind).items() if key != "causal"}
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise InputError(
            f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(allowed))}"
        )
    filled = {key: value for key, value in kind.near_dense.items() if key in allowed}
    for key in _LENGTHS:
        if key in allowed and allowed[key].default is not None:
            filled[key] = trained_length(base.config)
    # A list is what a tuple comes back as from a file.
    filled |= {key: tuple(x) if isinstance(x, list) else x for key, x in options.items()}
    missing = [
        key for key, found in allowed.items() if found.default is found.empty and key not in filled
    ]
    if missing:
        raise InputError(f"{name} needs {', '.join(missing)}")
    if impl != "auto" and "impl" in allowed:
        filled["impl"] = impl
    return Method(kind, tuple(sorted(filled.items())), _numbers(base, layers))


def register_method(wanted: Method, impl: str) -> str:
    """Make a mechanism known to transformers; the name to use."""
    return enlist(wanted, impl, _attention_beside)


def _attention_beside(name: str, wanted: Method, impl: str) -> Attention:
    """Dense attention: of the layers beside the mechanism, and what it took the place of."""
    dense = attention_over(name, Causal(), impl)

    def longspan_beside(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        chosen = wanted.layers is None or getattr(module, "layer_idx", None) in wanted.layers
        if chosen and not hasattr(module, "mechanism"):
            # A configuration goes to other models, in whose modules there is none.
            raise Refusal(
                f"{type(module).__name__} has the configuration of a model that computes "
                f"{wanted}, but the mechanism was not put into it. Apply it to this model "
                "too, or take the name out of its configuration: longspan.hf.remove(model)."
            )
        return dense(module, *args, **kwargs)

    return longspan_beside


def swap(base: PreTrainedModel, wanted: Method, impl: str, *, new_weights: bool) -> None:
    """Let the chosen modules compute a mechanism, and note how to undo it.

    Args:
        base: a model whose attention has the name of the mechanism already.
        wanted: the mechanism.
        impl: kernel name or ``"auto"``.
        new_weights: whether it may have weights of its own.

    Raises:
        LongspanError: a child that says why not; nothing is left behind in the modules.
    """
    ((_, rotary),) = rotary_modules(base)
    frequencies = read_frequencies(base, rotary)
    found = list(routed(base))
    chosen = found if wanted.layers is None else [found[number] for number in wanted.layers]
    causal = register(Causal(), impl)
    for path, owner in chosen:
        try_apart(path, owner, rotary, frequencies, causal)
    changes: list[tuple[str, Undo]] = []
    built = [
        (path, owner, build(wanted.kind, owner, frequencies, dict(wanted.options)))
        for path, owner in chosen
    ]
    added = [name for name, _ in built[0][2].named_parameters()]
    if added and not new_weights:
        raise Refusal(
            f"{wanted} has weights of its own ({', '.join(added)}), which a model does not bring: "
            "use longspan.hf.convert, and train them. The model was not changed."
        )
    for path, owner, layer in built:
        owner.mechanism = layer
        # Unlike a method, which is pickled as a name of its owner.
        owner.forward = partial(_forward, owner, frequencies)
        text = f"{path} ({type(owner).__name__}) computes {wanted.kind.__name__}"
        changes.append((text, Undo(owner)))
    note_changes(base, changes)


@dataclass(frozen=True, eq=False)
class Undo:
    """Takes a mechanism out of an attention module."""

    owner: Any

    def remove(self) -> None:
        del self.owner.forward
        del self.owner.mechanism


def swapped(base: nn.Module) -> dict[str, MechanismLayer]:
    """Path of each attention module that computes a mechanism, and its layer."""
    found = ((path, getattr(owner, "mechanism", None)) for path, owner in routed(base))
    return {path: layer for path, layer in found if isinstance(layer, MechanismLayer)}


def why_not_swap(base: PreTrainedModel, layers: tuple[int, ...] | None) -> Iterator[str]:
    """Reasons why mechanisms cannot be put into a model that routes."""
    name, config = type(base).__name__, base.config.get_text_config()
    rotary = [module for _, module in rotary_modules(base)]
    if len(rotary) != 1 or not hasattr(rotary[0], "inv_freq"):
        yield f"{name} has {len(rotary)} rotary modules instead of one with one set of frequencies"
    kinds = getattr(config, "layer_types", None)
    if kinds is None and getattr(config, "sliding_window", None):
        kinds = ["sliding_attention"] * config.num_hidden_layers
    for number, (path, owner) in enumerate(routed(base)):
        if layers is not None and number not in layers:
            continue
        if kinds is not None and kinds[number] != "full_attention":
            yield f"{path} has a window of its own, within which no mechanism would stay"
        elif why := why_not_apart(owner):
            yield f"{path} ({type(owner).__name__}) {why}"


def _forward(
    module: Any,
    frequencies: Frequencies,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In place of an attention module's own: x [B, N, d_model] to the same shape."""
    layer, name = module.mechanism, module.config._attn_implementation
    what = registered(name)
    if not isinstance(what, Method) or not isinstance(layer, what.kind):
        raise Refusal(
            f"{type(module).__name__} computes {type(layer).__name__}, but the attention of its "
            f"model is now {described(name)}, chosen past longspan or through another model with "
            "the same configuration: longspan.hf.remove(model) first."
        )
    # No keys are handed over, so none can have the wrong number.
    nothing = hidden_states.new_empty(1, 1, getattr(attention_mask, "keys", 0), 0)
    dropout = module.attention_dropout if module.training else 0.0
    rows = checked_rows(
        name,
        module,
        hidden_states[:, None],
        nothing,
        attention_mask,
        dropout,
        kwargs,
    )
    check_positions(rows, kwargs.get("position_ids"))
    valid = _valid(rows, hidden_states.device)
    if "turns" not in rows.kept and rows.queries > 1:
        check_turns(position_embeddings, frequencies, valid)
        rows.kept["turns"] = True
    if past_key_values is None:
        return layer(hidden_states, valid), None
    # One row is decoding, where looking would wait for the device at every step.
    if "goes on" not in rows.kept and rows.queries > 1:
        rows.kept["goes on"] = True
        told = None if rows.real is None else torch.from_numpy(rows.real)
        check_goes_on(kwargs.get("position_ids"), told, rows.query_start)
    cache = state_layer(past_key_values, module.layer_idx)
    if cache.seen != rows.query_start:
        raise Refusal(
            f"The cache holds {cache.seen} tokens and the next stand at {rows.query_start}: start "
            "with a new cache."
        )
    if "state" not in python_inspect.signature(layer.forward).parameters:
        out, why = layer(hidden_states, valid) if not cache.seen else None, "it keeps no state"
    else:
        try:
            out, cache.state = layer(hidden_states, valid, state=cache.state, return_state=True)
            why = ""
        except Refusal as refusal:
            out, why = layer(hidden_states, valid) if not cache.seen else None, str(refusal)
    if out is None:
        raise Refusal(
            f"{type(layer).__name__} cannot go on from a cache ({why}). Pass use_cache=False."
        )
    cache.seen += hidden_states.shape[1]
    return out, None


def _valid(rows: Rows, device: torch.device) -> Tensor | None:
    """False at padding [B, N]; None if there is none. Shared by the layers of a forward pass."""
    if "valid" not in rows.kept:
        if rows.own != Causal():
            raise Refusal(f"Mechanisms are causal here; this model's own mask is {rows.own}.")
        if rows.segments is not None and (rows.segments > 0).any():
            raise Refusal(
                "Packed documents: a mechanism would let them see each other. Run each document "
                "as a row of the batch, with an attention_mask."
            )
        valid = None if rows.segments is None else torch.from_numpy(rows.segments >= 0)
        rows.kept["valid"] = None if valid is None else valid.to(device)
    return rows.kept["valid"]


def _numbers(base: nn.Module, layers: Sequence[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    count = len(list(routed(base)))
    if not isinstance(layers, Sequence):
        raise InputError(f"layers must be a list of numbers from 0 to {count - 1}, got {layers!r}")
    wrong = [n for n in layers if not isinstance(n, int) or not -count <= n < count]
    if wrong or not layers:
        raise InputError(f"layers must be numbers from 0 to {count - 1}, got {list(layers)}")
    return tuple(sorted({n % count for n in layers}))


def mechanism_names() -> list[str]:
    """Names of the layers of ``longspan.mechanism``."""
    found = ((name, getattr(mechanisms, name)) for name in mechanisms.__all__)
    return [n for n, kind in found if isinstance(kind, type) and issubclass(kind, MechanismLayer)]
