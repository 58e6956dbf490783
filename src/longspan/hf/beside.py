"""Layers beside a model: any mechanism on the model's own projections, and what its layers read.

Nothing is put into the model, so mechanisms without a causal form can be tried out as well.

Axes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longspan.hf._borrowed import build, read_frequencies
from longspan.hf.rotary import rotary_modules
from longspan.hf.routes import routed
from longspan.mechanism.layer import MechanismLayer


def layers_beside(
    model: Any, kind: type[MechanismLayer], options: Mapping[str, Any]
) -> list[MechanismLayer]:
    """One layer for each attention module, with the module's projections and its rotation.

    Args:
        model: a causal model of the Llama type; unchanged.
        kind: of the layers.
        options: their keyword arguments beside sizes and projections.
    """
    ((_, rotary),) = rotary_modules(model)
    frequencies = read_frequencies(model, rotary)
    owners = [owner for _, owner in routed(model)]
    return [build(kind, owner, frequencies, dict(options)) for owner in owners]


@torch.no_grad()
def attention_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What each attention module reads [B, N, d_model] while the model computes ``ids`` [B, N]."""
    seen: list[Tensor] = []
    hooks = [
        owner.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for _, owner in routed(model)
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
