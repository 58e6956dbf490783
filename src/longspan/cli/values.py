"""Values given on the command line as text."""

from __future__ import annotations

from typing import Any

from longspan.errors import InputError


def whole_numbers(text: str) -> tuple[int, ...]:
    """``"512,4096"`` -> (512, 4096). Raises InputError for anything else."""
    try:
        return tuple(int(part.replace("_", "")) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"Expected whole numbers with commas, like 512,4096; got {text!r}."
        ) from None


def numbers(text: str) -> tuple[float, ...]:
    """``"0,0.5,1"`` -> (0.0, 0.5, 1.0). Raises InputError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"Expected numbers with commas, like 0,0.5,1; got {text!r}.") from None


def pick_device(name: str | None) -> str:
    """The device that was asked for, or ``cuda`` if there is one, else ``cpu``."""
    if name is not None:
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def read_rope_factors(path: str | None) -> Any:
    """The factors of ``--rope-factors``, or None."""
    if path is None:
        return None
    from longspan.position import read_factors

    return read_factors(path)
