"""NTK-aware scaling: a larger base: fast dimensions barely move, the slowest is interpolated.

Origin: u/bloc97, "NTK-Aware Scaled RoPE" (2023); YaRN (arXiv 2309.00071), definition 1.

    b' = b * s^(D / (D - 2)),    theta'_m = b'^(-2 m / D)

The first frequency stays, the last is divided by exactly s.
"""

from __future__ import annotations

from longspan.errors import InputError
from longspan.position.frequencies import Frequencies, check_factor, default


def ntk_base(dim: int, base: float, factor: float) -> float:
    """The base b' that replaces ``rope_theta``.

    Args:
        dim: rotary head width D, at least 4.
        base: ``rope_theta``.
        factor: s = target length / trained length, at least 1.

    Raises:
        InputError: if an argument is out of range.
    """
    check_factor(factor)
    if dim < 4:
        raise InputError(f"NTK scaling needs a rotary width of at least 4, got dim={dim}.")
    return float(base) * float(factor) ** (dim / (dim - 2))


def ntk(dim: int, base: float, factor: float) -> Frequencies:
    """Frequencies of fixed NTK-aware scaling; arguments and errors as in ``ntk_base``."""
    return default(dim, ntk_base(dim, base, factor))
