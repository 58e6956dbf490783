"""Between the attention function and a cache layer: what is asked, and of whom.

transformers hands queries to the attention function and keys to the cache, and neither to the
other. A cache layer with a policy marks the new keys that it returns, so that the attention
function finds it; no hook, and no model needs to be known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from longspan.hf.rows import Rows
from longspan.pattern import Pattern

if TYPE_CHECKING:
    from longspan.hf._cache_handover import HandedLayer
    from longspan.hf._cache_layer import KeptLayer

_MARK = "_longspan_kept_layer"

NewRows = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Asked:
    """One attention call over a cache layer.

    Attributes:
        rows: where the queries stand.
        pattern: where they may look, the model's own mask included.
        scale: factor on the logits.
        position_ids: positions for which the model rotated queries and keys, if it says so.
        with_lse: whether the log-sum-exp of every row is needed.
        dense: whether attention among the new rows follows ``pattern`` exactly; false for an
            estimate, whose log-sum-exp says nothing about all keys.
    """

    rows: Rows
    pattern: Pattern
    scale: float
    position_ids: Any = None
    with_lse: bool = False
    dense: bool = True


def mark(key: Tensor, layer: HandedLayer) -> None:
    """Say to which cache layer new keys belong."""
    setattr(key, _MARK, layer)


def kept_layer(key: Tensor) -> KeptLayer | None:
    """The cache layer to which keys belong; None if they are all keys there are."""
    return getattr(key, _MARK, None)
