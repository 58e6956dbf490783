"""LongRoPE: one searched factor per dimension, one set inside the trained length, one beyond.

Paper: LongRoPE (arXiv 2402.13753), equation 3; microsoft/LongRoPE rope/longrope.py; transformers
("longrope").

    theta'_m = theta_m / lambda_m,    attention factor = sqrt(1 + ln s / ln L)

The paper's unscaled start tokens are left out, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from longspan.errors import InputError
from longspan.position.frequencies import Frequencies, check_factor, default


def longrope(
    dim: int, base: float, factors: Sequence[float], factor: float, trained: int
) -> Frequencies:
    """Frequencies and temperature of LongRoPE for one set of factors.

    Args:
        dim: rotary head width D.
        base: ``rope_theta``.
        factors: D/2 positive divisors: the short set up to ``trained`` tokens, then the long set.
        factor: s = target length / trained length, at least 1.
        trained: L, trained length in tokens.

    Raises:
        InputError: if an argument is out of range or ``factors`` has another length than D/2.
    """
    check_factor(factor)
    divisors = np.asarray(factors, dtype=np.float64)
    if divisors.shape != (dim // 2,) or not (divisors > 0).all():
        raise InputError(
            f"LongRoPE needs {dim // 2} positive factors for dim={dim}, "
            f"got shape {divisors.shape}."
        )
    temperature = math.sqrt(1 + math.log(factor) / math.log(trained))
    return Frequencies(default(dim, base).inv_freq / divisors, temperature)
