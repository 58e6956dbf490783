"""The rotary modules of a model: found, built anew for other parameters, and compared.

What transformers computes from ``config.rope_parameters`` is compared with ``longspan.position``,
because releases have read these fields differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from longspan import position
from longspan.errors import Refusal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


def rotary_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every rotary embedding."""
    for name, module in model.named_modules():
        buffers = [buffer for buffer, _ in module.named_buffers(recurse=False)]
        if any(buffer.endswith("inv_freq") for buffer in buffers) and hasattr(module, "config"):
            yield name, module


def rebuild(name: str, old: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """A rotary module of the same class for the planned configuration, its frequencies checked."""
    kind = type(old)
    try:
        new = kind(config)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise Refusal(
            f"{name} ({kind.__name__}) cannot be rebuilt for {config.rope_parameters}: {error!r}."
        ) from error
    entries = config.rope_parameters
    nested = "rope_type" not in entries
    for layer, entry in entries.items() if nested else [("", entries)]:
        if entry is None:
            continue
        prefix = f"{layer}_" if nested else ""
        if getattr(new, f"{prefix}inv_freq", None) is None:
            continue
        # Longer texts have other frequencies in longrope; back to the first ones in the end.
        changes = entry["rope_type"] == "longrope"
        for place in (entry["original_max_position_embeddings"], 0) if changes else (0,):
            if changes:
                _forward_at(new, place, layer if nested else None)
            got = getattr(new, f"{prefix}inv_freq")
            wanted = _expected(entry, 2 * got.numel(), config, place)
            if wanted is None:
                continue
            factor = getattr(new, f"{prefix}attention_scaling", 1.0)
            same = np.allclose(got.double().cpu().numpy(), wanted.inv_freq, rtol=1e-5, atol=0)
            if not same or abs(factor - wanted.attention_factor) > 1e-6:
                raise Refusal(
                    f"The installed transformers reads {entry} as other frequencies than intended "
                    f"in {name} ({kind.__name__}); the model was not changed."
                )
    return new


def _forward_at(rotary: nn.Module, place: int, layer: str | None) -> None:
    """Have a rotary module make the frequencies for a text that ends at a place."""
    import torch

    device = next(rotary.buffers()).device
    more = {} if layer is None else {"layer_type": layer}
    rotary(torch.empty(0, device=device), torch.tensor([[place]], device=device), **more)


def _expected(
    entry: dict[str, Any], width: int, config: PreTrainedConfig, place: int
) -> position.Frequencies | None:
    """As ``frequencies``, with the temperature that the entry may give."""
    # transformers reads `truncate` beside the layer types, not inside them.
    truncate = config.rope_parameters.get("truncate", True)
    scaled = frequencies(entry, width, place, truncate=truncate)
    fixed = entry.get("attention_factor")
    if scaled is None or fixed is None or entry["rope_type"] not in ("yarn", "longrope"):
        return scaled
    return scaled._replace(attention_factor=fixed)


def frequencies(
    entry: dict[str, Any], width: int, place: int = 0, *, truncate: bool = True
) -> position.Frequencies | None:
    """Frequencies that an entry of ``rope_parameters`` means.

    Args:
        entry: of one layer type, with its kind and base.
        width: channels that rotate.
        place: where the text ends.
        truncate: for yarn, whether its bounds are whole channels.

    Returns:
        Them, with the temperature that follows from the other parameters; None for kinds that
        longspan does not write.
    """
    kind, base = entry["rope_type"], entry["rope_theta"]
    if kind in ("default", "dynamic"):
        # Before a forward pass longer than the trained length, dynamic is the default.
        return position.default(width, base)
    # PhiMoE has temperatures of its own in its longrope.
    if kind not in ("linear", "llama3", "yarn", "longrope") or "short_mscale" in entry:
        return None
    factor = entry["factor"]
    if kind == "linear":
        return position.linear(width, base, factor)
    original = entry["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = entry["low_freq_factor"], entry["high_freq_factor"]
        return position.llama3(
            width, base, factor, original, low_freq_factor=low, high_freq_factor=high
        )
    if kind == "longrope":
        divisors = entry["long_factor" if place >= original else "short_factor"]
        return position.longrope(width, base, divisors, factor, original)
    options = {"truncate": truncate}
    for option in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if entry.get(option) is not None:
            options[option] = entry[option]
    return position.yarn(width, base, factor, original, **options)


def take_over(old: nn.Module, new: nn.Module) -> None:
    """Copy what a rotary module computed when it was built; the module and its config stay."""
    for name, buffer in new.named_buffers(recurse=False):
        device = old.get_buffer(name).device if hasattr(old, name) else buffer.device
        old.register_buffer(name, buffer.to(device), persistent=False)
    for name, value in vars(new).items():
        if not name.startswith("_") and name not in ("training", "config"):
            setattr(old, name, value)
    # longrope keeps what it made for longer texts, where it made it: its own device has to.
    for name in [name for name in vars(old) if name.endswith("long_inv_freq")]:
        delattr(old, name)
