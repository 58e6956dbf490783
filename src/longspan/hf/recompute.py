"""Gradient checkpointing, by whichever name the installed transformers has for it."""

from __future__ import annotations

from typing import Any

from longspan.hf.unwrap import base_model


def recompute_layers(model: Any, on: bool = True, *, reentrant: bool = False) -> None:
    """Compute each layer again in the backward pass instead of keeping its activations.

    Args:
        model: a Hugging Face model, or a PEFT model around one.
        on: switch on or off.
        reentrant: which of torch's two implementations; the reentrant one needs inputs that
            require gradients.
    """
    base = base_model(model)
    # transformers 5.23 renamed gradient_checkpointing_* and warns about the old names.
    word = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(base, f"{word}_checkpointing_enable")({"use_reentrant": reentrant})
    else:
        getattr(base, f"{word}_checkpointing_disable")()
