"""YaRN: fast dimensions stay, slow ones are interpolated, a linear ramp lies between.

Paper: YaRN (arXiv 2309.00071), section 3.4. The ramp is that of the authors' code and of
transformers, over the *dimension index*; the paper's is over the number of rotations
L / wavelength and differs by up to 0.37.

    theta'_m = (1 - g_m) theta_m / s + g_m theta_m,    g_m = 1 - clamp((m - lo) / (hi - lo), 0, 1)
    lo, hi = D ln(L / (2 pi beta)) / (2 ln b), the dimension that turns beta_fast, beta_slow times
    attention factor = 0.1 ln s + 1
"""

from __future__ import annotations

import math

import numpy as np

from longspan.position.frequencies import Frequencies, check_factor, default


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """Multiplier of cosine and sine: ``0.1 mscale ln(factor) + 1``; 1 if nothing is scaled."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn(
    dim: int,
    base: float,
    factor: float,
    trained: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
) -> Frequencies:
    """Frequencies and temperature of YaRN.

    Args:
        dim: rotary head width D.
        base: ``rope_theta``.
        factor: s = target length / trained length, at least 1.
        trained: L, trained length in tokens.
        beta_fast: rotations within L above which a dimension stays.
        beta_slow: rotations within L below which a dimension is interpolated.
        truncate: round the ramp's ends outwards to whole dimensions.
        mscale: with ``mscale_all_dim``, the attention factor is the ratio of the two temperatures.
        mscale_all_dim: see ``mscale``.

    Raises:
        InputError: if an argument is out of range.
    """
    check_factor(factor)
    theta = default(dim, base).inv_freq
    low, high = (
        dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (beta_fast, beta_slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        # As in the authors' code: a step instead of a division by zero.
        high += 0.001
    keep = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    if mscale and mscale_all_dim:
        temperature = yarn_temperature(factor, mscale) / yarn_temperature(factor, mscale_all_dim)
    else:
        temperature = yarn_temperature(factor)
    return Frequencies((1 - keep) * theta / factor + keep * theta, temperature)
