"""One range for every seed: what torch, numpy and Python all take."""

from __future__ import annotations

from longspan.errors import InputError


def check_seed(seed: int) -> None:
    """Raise InputError for a seed below 0 or from 2^63."""
    if not 0 <= seed < 2**63:
        raise InputError(f"A seed is a whole number from 0 and below 2^63, got {seed}.")
