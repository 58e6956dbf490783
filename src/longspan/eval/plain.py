"""Results as JSON that every reader takes: it has no word for what is not a finite number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; numbers that are not finite become null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Nested dicts and lists with None in the place of each float that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def mean(values: Iterable[float | None]) -> float:
    """Mean of one or more numbers; NaN if one of them was not finite when it was written down."""
    each = [math.nan if value is None else float(value) for value in values]
    return sum(each) / len(each)
