"""LongRoPE: one searched factor per dimension, one set inside the trained length, one beyond.

Paper: LongRoPE (arXiv 2402.13753), equation 3; microsoft/LongRoPE rope/longrope.py; transformers
("longrope").

    theta'_m = theta_m / lambda_m,    attention factor = sqrt(1 + ln s / ln L)

The paper's unscaled start tokens are left out, as in transformers, and so is its search: factors
come from whoever searched them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.errors import DataError, InputError
from longspan.position.frequencies import Frequencies, check_factor, default

_LISTS = ("short_factor", "long_factor")
# Of float32, in which models compute frequencies.
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class LongFactors:
    """The two lists of a searched LongRoPE scaling, each D/2 positive divisors of frequencies.

    Attributes:
        short: for texts up to the trained length; ones leave them as they are.
        long: for longer texts.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, values in zip(_LISTS, (self.short, self.long), strict=True):
            wrong = [x for x in values if not (_is_number(x) and _LEAST <= x <= _MOST)]
            if wrong or not values:
                raise InputError(
                    f"{name} of LongRoPE is a list of positive numbers that float32 holds, one "
                    f"for each frequency; got {wrong[0]!r} in it."
                    if wrong
                    else f"{name} of LongRoPE is empty: give one number for each frequency."
                )

    def check_base(self, dim: int, base: float) -> None:
        """Raise InputError unless float32 holds all frequencies that the lists give.

        Args:
            dim: rotary head width D, which ``check_width`` has found to fit.
            base: ``rope_theta``.
        """
        for name, values in zip(_LISTS, (self.short, self.long), strict=True):
            found = default(dim, base).inv_freq / np.asarray(values)
            for divisor, frequency in zip(values, found.tolist(), strict=True):
                if not _LEAST <= frequency <= 1 / _LEAST:
                    raise InputError(
                        f"{name} of LongRoPE holds {divisor!r}, which with rope_theta {base:g} "
                        f"makes a frequency of {frequency:.3g} radians per token: float32, in "
                        "which models compute them, does not hold it or its inverse. Give "
                        "factors searched for this model."
                    )

    def check_width(self, dim: int) -> None:
        """Raise InputError unless both lists fit a rotary width of ``dim``."""
        for name, values in zip(_LISTS, (self.short, self.long), strict=True):
            if len(values) != dim // 2:
                raise InputError(
                    f"{name} of LongRoPE has {len(values)} numbers; a rotary width of {dim} needs "
                    f"{dim // 2}, one for each frequency. Give factors searched for this model."
                )


def read_factors(path: str | Path) -> LongFactors:
    """Factors from a JSON file, or from the configuration of another model.

    Args:
        path: a JSON object with the lists ``short_factor`` and ``long_factor``; a model's
            config.json that has them in ``rope_parameters`` or ``rope_scaling``; or its folder.

    Raises:
        DataError: the file is missing, is no JSON, or holds no such lists.
        InputError: a list holds something else than positive numbers that float32 holds.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        held = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(
            f"The LongRoPE factors {file} cannot be read: {error.strerror or error}. Give a JSON "
            f"file with {' and '.join(_LISTS)}, or the folder of a model that has them."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {error}.") from error
    found = _find(held)
    if found is None:
        raise DataError(
            f"{file} holds no lists {' and '.join(_LISTS)}, neither at its top nor in "
            "rope_parameters or rope_scaling; these are the factors of LongRoPE."
        )
    return LongFactors(short=tuple(found[_LISTS[0]]), long=tuple(found[_LISTS[1]]))


def _find(held: Any) -> dict[str, Any] | None:
    """The dictionary that has both lists: this one, or what a configuration keeps inside."""
    if not isinstance(held, dict):
        return None
    if all(isinstance(held.get(name), list) for name in _LISTS):
        return held
    inside = ("rope_parameters", "rope_scaling", "text_config", "full_attention")
    found = (_find(held.get(name)) for name in inside)
    return next((one for one in found if one is not None), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
