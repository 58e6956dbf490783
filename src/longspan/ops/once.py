"""Backward passes that cannot be differentiated again, and say so.

``torch.autograd.function.once_differentiable`` says so only where an incoming gradient wants one
itself. Where none does, as under a loss that is a sum, it hands out constants: the second
derivative lacks what attention adds to it, silently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from longspan.errors import Refusal

Backward = Callable[..., tuple[Tensor | None, ...]]


def once(backward: Backward) -> Backward:
    """A backward pass of an ``autograd.Function``; differentiating it again raises ``Refusal``."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        # Somebody may ask for second derivatives: create_graph=True.
        if not torch.is_grad_enabled():
            return found
        held = iter(_Last.apply(*(x.detach().requires_grad_() for x in found if x is not None)))
        return tuple(None if x is None else next(held) for x in found)

    return run


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise Refusal(
            "this kernel has no second derivative; impl='reference' has, at O(N M) memory"
        )
