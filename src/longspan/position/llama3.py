"""Llama 3 scaling: by wavelength against the trained length, without temperature.

Source: meta-llama/llama-models, models/llama3/model.py; transformers ("llama3").

    wavelength < L / high: theta         wavelength > L / low: theta / f
    between: (1 - u) theta / f + u theta,    u = (L / wavelength - low) / (high - low)
"""

from __future__ import annotations

import numpy as np

from longspan.errors import InputError
from longspan.position.frequencies import Frequencies, check_factor, default


def llama3(
    dim: int,
    base: float,
    factor: float,
    trained: int,
    *,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Frequencies:
    """Frequencies of Llama 3 scaling.

    Args:
        dim: rotary head width D.
        base: ``rope_theta``.
        factor: f, at least 1.
        trained: L, trained length in tokens.
        low_freq_factor: waves longer than ``trained / low_freq_factor`` are interpolated.
        high_freq_factor: waves shorter than ``trained / high_freq_factor`` stay.

    Raises:
        InputError: if an argument is out of range.
    """
    check_factor(factor)
    if not 0 < low_freq_factor < high_freq_factor:
        raise InputError(
            "Expected 0 < low_freq_factor < high_freq_factor, "
            f"got {low_freq_factor} and {high_freq_factor}."
        )
    theta = default(dim, base).inv_freq
    turns = trained * theta / (2 * np.pi)
    keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return Frequencies((1 - keep) * theta / factor + keep * theta, 1.0)
