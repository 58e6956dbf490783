"""Training that broke is found out, not written down."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from longspan.errors import RunError

# The first step of AdamW is ten times the rate, and a float32.
LARGEST_RATE = 1e30


def check_step(loss: float, grad_norm: float, step: int, lr: float) -> None:
    """Raise RunError if step number ``step``, counted from 1, gave no finite numbers.

    Args:
        loss: of the step.
        grad_norm: norm of its gradient.
        step: its number.
        lr: highest learning rate, to name it.
    """
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise RunError(
            f"The loss is {loss} and the gradient norm {grad_norm} at step {step}: "
            f"the run is broken. {_advice(lr)}"
        )


def check_weights(weights: Iterable[Tensor], lr: float) -> None:
    """Raise RunError if a weight is not finite: the last step may be the one that broke."""
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise RunError(
            f"Weights are no longer finite after the last step: the run is broken. {_advice(lr)}"
        )


def _advice(lr: float) -> str:
    return f"Lower the learning rate (now {lr:g}) or lengthen the warm-up."
