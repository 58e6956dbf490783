"""Position interpolation: every position is divided by the factor.

Paper: Extending Context Window via Positional Interpolation (arXiv 2306.15595), equation 4.

    theta'_m = theta_m / s
"""

from __future__ import annotations

from longspan.position.frequencies import Frequencies, check_factor, default


def linear(dim: int, base: float, factor: float) -> Frequencies:
    """Frequencies of linear interpolation.

    Args:
        dim: rotary head width D.
        base: ``rope_theta``.
        factor: s = target length / trained length, at least 1.

    Raises:
        InputError: if an argument is out of range.
    """
    check_factor(factor)
    return Frequencies(default(dim, base).inv_freq / factor, 1.0)
