"""Whether a model rotates its rows as a mechanism does that counts tokens by itself.

A mechanism rotates every token by one position more than the token before. A model that was given
other positions, or several for a token as images have (Qwen-VL), hands its layers cosines and
sines that say so: the angles between neighbouring rows are not the frequencies.

Axes: B batch, N tokens, C rotated channels, two of each frequency.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.position import Frequencies

# Of the cosine of an angle; cosines and sines come in the model's dtype.
_TOLERANCE = 0.05


def check_turns(turns: Any, frequencies: Frequencies, valid: Tensor | None) -> None:
    """Refuse rows that are not one position apart.

    Args:
        turns: cosines and sines of the rows [B or 1, N, C], or with an axis of positions in front.
        frequencies: those that the mechanism rotates by.
        valid: False at padding [B, N]; None if there is none.

    Raises:
        InputError: if neighbouring tokens are another distance apart.
    """
    cos, sin = (part.detach().flatten(0, -3).float() for part in turns)
    scale = frequencies.attention_factor**2
    apart = (cos[:, 1:] * cos[:, :-1] + sin[:, 1:] * sin[:, :-1]) / scale
    # Channels of one frequency lie side by side or half a width apart.
    wanted = torch.from_numpy(frequencies.inv_freq).cos().repeat(2).sort().values.to(apart)
    off = (apart.sort(-1).values - wanted).abs().amax(-1) > _TOLERANCE
    if valid is not None:
        both = valid[:, 1:] & valid[:, :-1]
        off = off[:, None] & both if len(off) == 1 else off.unflatten(0, (-1, len(both))) & both
    if bool(off.any()):
        raise InputError(
            "The model rotates neighbouring tokens by other distances than 1 (position_ids with "
            "gaps, or images, whose tokens have several positions), but a mechanism counts "
            "tokens. Leave position_ids out, pass padding as attention_mask, and use a pattern "
            "where images are read."
        )
