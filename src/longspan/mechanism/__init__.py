"""Attentions that are more than a mask: one paper, one file.

Layers are drop-in modules, ``longspan.mechanism.X(d_model, heads, ...)(x, mask=None)``; where a
mechanism has no parameters of its own there is a function on q, k, v [B, H, N, D] too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "FeatureMap": "feature_maps",
    "Favor": "performer",
    "Laplace": "feature_maps",
    "LinearAttention": "linear",
    "Performer": "performer",
    "linear_attention": "linear",
    "redraw": "performer",
}

__all__ = [
    "Favor",
    "FeatureMap",
    "Laplace",
    "LinearAttention",
    "Performer",
    "linear_attention",
    "redraw",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longspan.mechanism' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"longspan.mechanism.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from longspan.mechanism.feature_maps import FeatureMap, Laplace
    from longspan.mechanism.linear import LinearAttention, linear_attention
    from longspan.mechanism.performer import Favor, Performer, redraw
