"""Longer positions for a Hugging Face model, written so that plain transformers reads them back.

A scaling lives in ``config.rope_parameters`` and nowhere else: a saved model gives the same
frequencies without longspan. What transformers would compute from the new parameters is compared
with ``longspan.position`` before anything is changed, because releases have read these fields
differently.

Three kinds need care. ``ntk`` has no name in transformers: it is a new ``rope_theta``. ``dynamic``
takes ``max_position_embeddings`` for the *trained* length, so that field keeps its value and only
the factor says how far the model is meant to go. ``longrope`` needs lists of factors that somebody
searched; it takes one list up to the trained length and another beyond, whatever a cache holds, so
that a generation which crosses that length reads keys of both.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from longspan import position
from longspan.errors import InputError, Refusal
from longspan.hf.rotary import frequencies, rebuild, rotary_modules, take_over
from longspan.hf.unwrap import base_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

KINDS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope")

# Layers that never look further than their own window have nothing to extend.
LOCAL_LAYERS = ("sliding_attention", "chunked_attention")


def trained_length(config: PreTrainedConfig) -> int:
    """Length in tokens for which the model's positions are made.

    Raises:
        Refusal: if the configuration has no rotary positions.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if length is None or not getattr(text, "rope_parameters", None):
        raise Refusal(
            f"{type(config).__name__} has no rotary positions (max_position_embeddings and "
            "rope_parameters); only models with RoPE can be extended."
        )
    return int(length)


def rope_parameters(
    config: PreTrainedConfig,
    kind: str,
    length: int,
    *,
    factors: position.LongFactors | None = None,
) -> dict[str, Any]:
    """Value of ``config.rope_parameters`` that stretches the model to ``length`` tokens.

    A model that is already scaled can be stretched further by the same kind; its factor is
    multiplied, from where it reaches: ``max_position_embeddings``, or the original length times
    the factor if that is further. A written temperature that is the one of the old factor goes.
    Where parameters are given per layer type (Gemma 3), layers with their own window keep theirs.

    Args:
        config: configuration of the model; not changed.
        kind: one of none, linear, ntk, dynamic, yarn, llama3, longrope.
        length: target length in tokens, at least the present ``max_position_embeddings``.
        factors: for longrope, its two lists; None: those that the model has already.

    Raises:
        InputError: an unknown kind, a length below the trained one, positions that are already
            scaled by another kind, or factors that are missing, do not fit the model, or go with
            another kind.
        Refusal: a model without RoPE.
    """
    if kind not in KINDS:
        raise InputError(f"Unknown RoPE scaling {kind!r}; choose one of {', '.join(KINDS)}.")
    if factors is not None and kind != "longrope":
        raise InputError(f"Factors belong to longrope; RoPE scaling {kind!r} takes none.")
    if not isinstance(length, int):
        raise InputError(f"The target length must be a whole number of tokens, got {length!r}.")
    text = config.get_text_config()
    trained = trained_length(text)
    if length < trained:
        raise InputError(
            f"The target length {length} is below the {trained} tokens this model is made for; "
            f"give a length of at least {trained}."
        )
    current = copy.deepcopy(text.rope_parameters)
    if "rope_type" in current or "rope_theta" in current:
        return _stretch(current, kind, length, trained, text, factors)
    return {
        layer: entry
        if entry is None or layer in LOCAL_LAYERS
        else _stretch(entry, kind, length, trained, text, factors)
        for layer, entry in current.items()
    }


def set_rope(
    model: PreTrainedModel,
    kind: str,
    length: int,
    *,
    factors: position.LongFactors | None = None,
) -> None:
    """Stretch the positions of a model in place: its configuration and its rotary modules.

    ``max_position_embeddings`` becomes ``length``, except for ``dynamic`` (see the module text).

    Args:
        model: a Hugging Face model, or a PEFT model around one.
        kind: one of none, linear, ntk, dynamic, yarn, llama3, longrope.
        length: target length in tokens.
        factors: for longrope, its two lists (``longspan.position.read_factors``); None: those that
            the model has already.

    Raises:
        InputError: as in ``rope_parameters``; the model is then unchanged.
        Refusal: a model without RoPE or with a mechanism in it, or rotary modules that cannot be
            rebuilt to these frequencies.
    """
    base = base_model(model)
    planned, rebuilt = _planned(base, kind, length, factors)
    config = base.config.get_text_config()
    config.rope_parameters = planned.rope_parameters
    config.max_position_embeddings = planned.max_position_embeddings
    for old, new in rebuilt:
        take_over(old, new)


def check_rope(
    model: PreTrainedModel,
    kind: str,
    length: int,
    *,
    factors: position.LongFactors | None = None,
) -> None:
    """Raise what ``set_rope`` would raise; changes nothing."""
    _planned(base_model(model), kind, length, factors)


def _planned(
    base: PreTrainedModel, kind: str, length: int, factors: position.LongFactors | None
) -> tuple[PreTrainedConfig, list[tuple[nn.Module, nn.Module]]]:
    """The configuration that a scaling makes, and each rotary module with the one for it."""
    from longspan.hf.mechanisms import swapped

    if swapped(base):
        raise Refusal(
            f"{type(base).__name__} computes a mechanism, which was made for the present "
            "frequencies and would keep them. Take it out (longspan.hf.remove, after "
            "longspan.hf.save_mechanism if it has weights), set the scaling, and put it in again. "
            "The model was not changed."
        )
    config = base.config.get_text_config()
    planned = copy.deepcopy(config)
    planned.rope_parameters = rope_parameters(config, kind, length, factors=factors)
    if kind != "dynamic":
        planned.max_position_embeddings = length
    _check_savable(planned, kind)
    rotary = list(rotary_modules(base))
    for name, old in rotary:
        if old.config is not config:
            raise Refusal(
                f"{name} ({type(old).__name__}) has a configuration of its own, as where layers "
                "have bases of their own (Granite SWA) or beside an image encoder: a scaling of "
                "the model's would not reach it. The model was not changed."
            )
    rebuilt = [(old, rebuild(name, old, planned)) for name, old in rotary]
    if not rebuilt:
        raise Refusal(
            f"{type(base).__name__} has no rotary module with inverse frequencies that can be "
            "rebuilt; its positions cannot be extended."
        )
    return planned, rebuilt


def _check_savable(planned: PreTrainedConfig, kind: str) -> None:
    """Refuse what the family's own rules forbid: transformers would not save such a model."""
    from huggingface_hub.errors import StrictDataclassError

    # Configurations of releases that have no such rules have no `validate` either.
    validate = getattr(planned, "validate", None)
    try:
        if validate is not None:
            validate()
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        raise Refusal(
            f"{type(planned).__name__} does not accept RoPE scaling {kind!r}, so that the model "
            f"could not be saved: {said}. The model was not changed."
        ) from error


def _stretch(
    entry: dict[str, Any],
    kind: str,
    length: int,
    trained: int,
    config: PreTrainedConfig,
    factors: position.LongFactors | None,
) -> dict[str, Any]:
    present = entry.get("rope_type", "default")
    growth = length / trained
    # Derived factors would change with max_position_embeddings, so they are written out.
    if present in ("yarn", "longrope") and entry.get("factor") is None:
        entry["factor"] = trained / entry["original_max_position_embeddings"]
    if kind == "none":
        return entry
    if present not in ("default", kind):
        raise InputError(
            f"The positions of this model are already scaled by {present!r}; they can be "
            f"stretched further by the same kind or left alone ('none'), not by {kind!r}."
        )
    width = _rotary_width(config, entry)
    if kind == "ntk":
        entry["rope_theta"] = position.ntk_base(width, entry["rope_theta"], growth)
        return entry
    entry["rope_type"] = kind
    if kind == "dynamic":
        # Beyond the trained length it is NTK, with the width that NTK needs.
        position.ntk_base(width, entry["rope_theta"], growth)
        entry["factor"] = growth
        return entry
    _multiply(entry, length, trained, width)
    if kind in ("yarn", "llama3", "longrope"):
        entry.setdefault("original_max_position_embeddings", trained)
    if kind == "llama3":
        entry.setdefault("low_freq_factor", 1.0)
        entry.setdefault("high_freq_factor", 4.0)
    if kind == "longrope":
        _put_factors(entry, width, factors)
    return entry


def _multiply(entry: dict[str, Any], length: int, trained: int, width: int) -> None:
    """Stretch an entry that may have a factor, which counts for as far as it reaches."""
    factor, original = entry.get("factor") or 1.0, entry.get("original_max_position_embeddings")
    # Some configurations of scaled models give the original length as max_position_embeddings.
    reached = max(trained, factor * original) if original else trained
    if length <= reached:
        entry["factor"] = factor
        return
    if original and entry.get("factor") and entry.get("attention_factor") is not None:
        old = frequencies(entry, width)
        # Written out, the temperature of the old factor would stay.
        if old is not None and np.isclose(entry["attention_factor"], old.attention_factor, 1e-3):
            del entry["attention_factor"]
    entry["factor"] = factor * (length / reached)


def _put_factors(entry: dict[str, Any], width: int, factors: position.LongFactors | None) -> None:
    if factors is None and "long_factor" not in entry:
        raise InputError(
            "RoPE scaling 'longrope' needs the factors that somebody searched for this model: "
            "give factors=longspan.position.read_factors(FILE), or --rope-factors FILE, a JSON "
            "file or model folder with short_factor and long_factor. Without any, choose yarn."
        )
    if factors is not None:
        factors.check_width(width)
        factors.check_base(width, entry["rope_theta"])
        entry["short_factor"], entry["long_factor"] = list(factors.short), list(factors.long)


def _rotary_width(config: PreTrainedConfig, entry: dict[str, Any]) -> int:
    try:
        head = getattr(config, "head_dim", None)
    except RuntimeError as error:
        # Gemma 4: a configuration of layers that differ in it.
        raise Refusal(
            f"{type(config).__name__} has layers of several head widths; only models whose heads "
            "have one can be extended."
        ) from error
    head = head or config.hidden_size // config.num_attention_heads
    return int(head * entry.get("partial_rotary_factor", 1.0))
