"""Mechanisms with weights of their own in a Hugging Face model: convert, save, load.

Weights that a mechanism adds start so that the model computes nearly what it did, as far as the
mechanism allows:

    NSA                   branches copy the key and value projections; the window's gate is open
                          (0.9975), the others shut (0.0025): window attention until trained
    AdaptiveSpan          spans of the trained length: dense attention up to there
    BlockGate             gates score mean keys by mean queries; dense where all blocks are chosen
    PooledChunkAttention  learned pooling starts as the mean, summaries weigh as many tokens
    Synthesizer           a mixture of the dot product (0.9997) and the dense kind
    LinearAttention       Hedgehog features with W = 1: the first terms of the exponential; far
                          from dense attention until trained (LoLCATs, arXiv 2410.10254, first
                          copies each layer's output, then trains LoRA)

LSH and routing take their strictly causal selection. Projections of the model are used where they
are, so LoRA and full training work as before; ``remove`` gives the model back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.errors import DataError, InputError, Refusal
from longspan.hf.mechanisms import Method, method, swapped
from longspan.hf.quiet import saving
from longspan.hf.register import registered
from longspan.hf.switch import Applied, put
from longspan.hf.unwrap import base_model
from longspan.mechanism.layer import MechanismLayer

_CONFIG, _WEIGHTS = "mechanism.json", "mechanism.safetensors"


def convert(
    model: Any,
    mechanism: type[MechanismLayer] | str,
    *,
    layers: Sequence[int] | None = None,
    impl: str = "auto",
    **options: Any,
) -> Applied:
    """Put a mechanism, with new weights of its own, into the attention layers of a causal model.

    Args:
        model: a Hugging Face model of the Llama type (q, k, v and o projections, RoPE), or a PEFT
            model around one; changed in place.
        mechanism: a layer of ``longspan.mechanism``, or its name.
        layers: numbers of the layers to convert; default: all. The others attend densely.
        impl: kernel name or ``"auto"``, as for ``longspan.attend``.
        options: of the mechanism, such as ``window=256``.

    Returns:
        A handle: ``handle.mechanisms`` maps the path of each module to its layer, which holds the
        new weights; ``handle.remove()``, or ``with``, takes them out again.

    Raises:
        InputError: for an unknown mechanism, option or layer.
        Refusal: if the mechanism has no causal form, or the model cannot be taken apart; with each
            reason. The model is then unchanged.
    """
    base = base_model(model)
    return put(base, method(base, mechanism, layers, impl, options), impl, new_weights=True)


def save_mechanism(model: Any, folder: str | Path) -> None:
    """Write what ``convert`` added, beside a model or anywhere: options and new weights.

    Raises:
        InputError: if the model has no mechanism, or an option is no plain value.
    """
    from safetensors.torch import save_file

    base = base_model(model)
    wanted = registered(base.config.get_text_config()._attn_implementation)
    if not isinstance(wanted, Method):
        raise InputError(f"{type(base).__name__} computes no mechanism: convert it first.")
    said = {
        "mechanism": wanted.kind.__name__,
        "options": dict(wanted.options),
        "layers": wanted.layers,
    }
    try:
        text = json.dumps(said, indent=2)
    except TypeError as error:
        raise InputError(f"{wanted} has options that a file cannot hold: {error}") from error
    weights = {
        f"{path}.{name}": tensor.detach().cpu().contiguous()
        for path, layer in swapped(base).items()
        for name, tensor in layer.state_dict().items()
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with saving():
        save_file(weights, target / _WEIGHTS)
        (target / _CONFIG).write_text(f"{text}\n", encoding="utf-8")


def load_mechanism(model: Any, folder: str | Path, *, impl: str = "auto") -> Applied:
    """Convert a model as a saved one was, with its new weights.

    Args:
        model: the model that was converted, as it was before.
        folder: where ``save_mechanism`` wrote.
        impl: kernel name or ``"auto"``.

    Returns:
        The handle of ``convert``.

    Raises:
        DataError: if the folder holds no mechanism, or one of another model. The model is then
            unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = Path(folder)
    try:
        said = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
        weights = load_file(source / _WEIGHTS)
        name, layers, options = said["mechanism"], said["layers"], said["options"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{source} holds no saved mechanism: {error}") from error
    try:
        applied = convert(model, name, layers=layers, impl=impl, **options)
    except (InputError, Refusal) as error:
        raise DataError(f"The mechanism in {source} does not fit this model: {error}") from error
    own = {
        f"{path}.{key}": tensor
        for path, layer in applied.mechanisms.items()
        for key, tensor in layer.state_dict().items()
    }
    wrong = sorted(
        key
        for key in own.keys() | weights.keys()
        if key not in own or key not in weights or own[key].shape != weights[key].shape
    )
    if wrong:
        applied.remove()
        raise DataError(
            f"The mechanism in {source} does not fit this model: {len(wrong)} weights differ, "
            f"first {wrong[0]}."
        )
    for key, tensor in own.items():
        tensor.copy_(weights[key])
    return applied
