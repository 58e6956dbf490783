"""Steps that are smaller than the last digit of a weight in half precision.

Between 0.5 and 1 the numbers of bfloat16 lie 0.004 apart. A norm's weight begins at 1, and AdamW
with a rate of 2e-4 moves it by no more than that: each sum rounds back to 1. So the optimizer
changes float32 copies of such weights, as in mixed precision training (Micikevicius et al. 2018,
arXiv 1710.03740, section 3.1), and the model gets them rounded. Weights in float32 or float64 are
their own copies. Memory: one more float32 per weight in half precision, moments in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_HALF = (torch.bfloat16, torch.float16)


class FullPrecision:
    """Trained parameters by name, each with the parameter that an optimizer is to change.

    Attributes:
        copies: by name, float32 copies of parameters in half precision, and the others themselves.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self.copies = {
            name: nn.Parameter(p.detach().float()) if p.dtype in _HALF else p
            for name, p in trained.items()
        }
        self._pairs = [(p, self.copies[name]) for name, p in trained.items() if p.dtype in _HALF]

    def add_gradients(self) -> None:
        """Add the gradients of one backward to those of the copies, in float32."""
        for parameter, copy in self._pairs:
            if parameter.grad is None:
                continue
            gradient, parameter.grad = parameter.grad.float(), None
            copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)

    @torch.no_grad()
    def write(self) -> None:
        """Round the copies into the model."""
        for parameter, copy in self._pairs:
            parameter.copy_(copy)
