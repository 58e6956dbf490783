"""Attention of transformers' own sparse models on their own patterns."""

from __future__ import annotations

import numpy as np

from longspan.bench.setting import Call, Setting, ungrouped
from longspan.errors import Refusal
from longspan.hf.peers import bigbird_layer, longformer_layer
from longspan.pattern import Pattern, RandomBlocks, Window, bigbird
from longspan.pattern.algebra import At, Or


def longformer(pattern: Pattern, setting: Setting) -> Call:
    """Longformer's layer without global tokens."""
    if not isinstance(pattern, Window) or pattern.causal or pattern.size % 2 == 0:
        raise Refusal("two-sided windows of an odd number of keys only")
    return ungrouped(longformer_layer(pattern.size // 2, setting.n, setting.heads))


def big_bird(pattern: Pattern, setting: Setting) -> Call:
    """BigBird's layer with the random blocks that our pattern draws."""
    parts = pattern.parts if isinstance(pattern, Or) else ()
    for one in parts:
        if isinstance(one, RandomBlocks) and not one.causal:
            if pattern != bigbird(one.size, one.count, seed=one.seed):
                break
            drawn = _drawn(one, setting)
            return ungrouped(bigbird_layer(one.size, drawn, setting.n, setting.width))
    raise Refusal("bigbird(block, random) with random blocks only")


def _drawn(pattern: RandomBlocks, setting: Setting) -> np.ndarray:
    """The blocks that each middle block draws, [H, n / block - 2, r]."""
    blocks = setting.n // pattern.size
    middle = np.arange(1, blocks - 1) * pattern.size
    found = [
        pattern._drawn(middle, At(head=head, heads=setting.heads, length=setting.n))
        for head in range(setting.heads)
    ]
    if not all(real.all() for _, real in found):
        raise Refusal(f"too few blocks to draw {pattern.count} from")
    return np.stack([block.T for block, _ in found])
