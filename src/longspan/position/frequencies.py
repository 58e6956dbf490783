"""Rotary position embedding before any scaling, and the type that every scaling returns.

Paper: RoFormer (arXiv 2104.09864), section 3.2.

    theta_m = base^(-2 m / D),    angle(position, m) = position * theta_m,    m = 0 .. D/2 - 1

Axes: D rotary head width, m frequency index.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.errors import InputError


class Frequencies(NamedTuple):
    """What a scaling method gives to a rotary embedding.

    Attributes:
        inv_freq: float64 [D/2], radians per position, highest frequency first.
        attention_factor: multiplies both cosine and sine, so logits are multiplied by its square.
    """

    inv_freq: NDArray[np.float64]
    attention_factor: float


def default(dim: int, base: float) -> Frequencies:
    """Unscaled frequencies.

    Args:
        dim: rotary head width D, even and positive.
        base: ``rope_theta``, above 1.

    Raises:
        InputError: if ``dim`` is odd or not positive, or ``base`` is not above 1.
    """
    if dim <= 0 or dim % 2:
        raise InputError(f"A rotary width must be even and positive, got dim={dim}.")
    if not 1 < base < np.inf:
        raise InputError(f"A rotary base must be a number above 1, got base={base}.")
    return Frequencies(float(base) ** (-2.0 * np.arange(dim // 2) / dim), 1.0)


def check_factor(factor: float) -> None:
    """Refuse a scaling factor that would shorten the context.

    Raises:
        InputError: if ``factor`` is below 1.
    """
    if not factor >= 1:
        raise InputError(
            f"A RoPE scaling factor is target / trained length and at least 1, got {factor}."
        )
