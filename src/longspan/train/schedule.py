"""The learning rate by step: a linear warm-up, then constant or a cosine to a tenth."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine"]


def learning_rate(step: int, *, lr: float, warmup: int, steps: int, schedule: Schedule) -> float:
    """Learning rate of one step.

    Args:
        step: its number, counted from 0.
        lr: rate after the warm-up.
        warmup: steps over which it grows linearly.
        steps: of the whole run; the cosine reaches a tenth of ``lr`` after the last one.
        schedule: what follows the warm-up.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = (step - warmup) / max(1, steps - warmup)
    return lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
