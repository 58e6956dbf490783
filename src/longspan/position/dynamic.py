"""Dynamic NTK scaling: the base follows the current length, unchanged inside the trained one.

Origin: u/emozilla, "Dynamically Scaled RoPE" (2023), as in transformers ("dynamic").

    b' = b * (f n / L - (f - 1))^(D / (D - 2)),    n = max(current length, L)

At n = 2 L and f = 2 the effective scale is 3, not 2. Keys already in a cache keep the rotation of
the length at which they were written.
"""

from __future__ import annotations

from longspan.position.frequencies import Frequencies, check_factor, default
from longspan.position.ntk import ntk_base


def dynamic(dim: int, base: float, factor: float, trained: int, current: int) -> Frequencies:
    """Frequencies of dynamic NTK scaling at one length.

    Args:
        dim: rotary head width D.
        base: ``rope_theta``.
        factor: f, at least 1.
        trained: L, trained length in tokens (``max_position_embeddings`` in transformers).
        current: length in tokens of the sequence at hand.

    Raises:
        InputError: if an argument is out of range.
    """
    check_factor(factor)
    scale = factor * max(current, trained) / trained - (factor - 1)
    return default(dim, ntk_base(dim, base, scale))
