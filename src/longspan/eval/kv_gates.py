"""Gates that tell retrieval heads from streaming ones, where none were learned.

DuoAttention (Xiao et al. 2024, arXiv 2410.10819) trains a gate for each head; here a head's gate
is the attention that would be lost if it were a streaming head, measured on one prompt.
"""

from __future__ import annotations

from typing import Any

import torch

from longspan.kv.policy import RECENT, SINKS
from longspan.kv.view import over_group

# Queries whose attention tells retrieval heads from streaming ones.
WATCHED = 64


def streaming_gates(cache: Any) -> list[list[float]]:
    """How much each key head needs more than sinks and recent tokens, [layer][head], 0 to 1.

    The share of the last ``WATCHED`` queries' attention that falls between the sinks and the
    tokens recent to all of them; a stand-in for the gates that DuoAttention learns.

    Args:
        cache: has read a prompt and notes so many queries.
    """
    gates = []
    for layer in cache.layers:
        view = layer.view()
        mass, at = view.observed(WATCHED)
        rows = (at >= 0).sum(1)
        first = at.masked_fill(at < 0, torch.iinfo(at.dtype).max).amin(1) - RECENT
        between = (view.positions >= SINKS) & (view.positions < first[:, None, None])
        by_head = over_group(mass, view.keys.shape[1]).mean(2).masked_fill(~between, 0.0).sum(-1)
        gates.append((by_head / rows[:, None]).mean(0).tolist())
    return gates
