"""LongLoRA's own way to compute shifted groups: roll, reshape, dense attention in each group.

Paper: LongLoRA (Chen et al. 2023, arXiv 2309.12307), shifted sparse attention. The second half of
the heads is rolled by half a group, groups are folded into the batch, each is causal inside, and
the roll is undone. The last group of the rolled heads joins the last half group with the first:
early rows see the end of the sequence there, which is a leak of the published form.

Axes: B batch, H heads, N rows, D head width, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.bench import dense
from longspan.bench.setting import Call, Setting
from longspan.errors import Refusal
from longspan.pattern import Pattern, ShiftedChunk


def over_pattern(pattern: Pattern, setting: Setting) -> Call:
    """For shifted chunks, with PyTorch's dense attention inside."""
    if not isinstance(pattern, ShiftedChunk) or not pattern.causal or setting.n % pattern.size:
        raise Refusal("causal shifted chunks of a whole number of groups only")
    if setting.heads % 2 or setting.key_heads % 2:
        raise Refusal("an even number of heads only")
    return longlora(pattern.size, dense.sdpa)


def border(pattern: Pattern) -> int:
    """Rows at either end that it computes differently."""
    return pattern.size // 2 if isinstance(pattern, ShiftedChunk) else 0


def longlora(size: int, inside: Call) -> Call:
    """Its attention over groups of ``size`` rows.

    Args:
        size: rows of a group; divides the rows of the sequence.
        inside: dense causal attention of q, k and v.
    """

    def fold(x_BHND: Tensor) -> Tensor:
        fixed, rolled = x_BHND.chunk(2, 1)
        x_BHND = torch.cat([fixed, rolled.roll(-size // 2, 2)], 1)
        return x_BHND.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = inside(*(fold(x) for x in (q, k, v)))
        out = out.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)
        fixed, rolled = out.chunk(2, 1)
        return torch.cat([fixed, rolled.roll(size // 2, 2)], 1)

    return call
