"""Backward passes that cannot be differentiated again, and say so.

``torch.autograd.function.once_differentiable`` says so only where an incoming gradient wants one
itself. Where none does, as under a loss that is a sum, it hands out constants: the second
derivative lacks what attention adds to it, silently.

What a backward gives depends on what its forward saved and on the incoming gradients. A second
derivative by any of these, and by all that they come from, is refused; others do not miss it.
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
    """A backward pass of an ``autograd.Function``; differentiating it again raises ``Refusal``.

    So does a batch of incoming gradients, as ``is_grads_batched`` and ``torch.func`` make it.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # A compiler cannot look into tensors, and has no batches.
        compiling = torch.compiler.is_compiling()
        if not compiling and any(x is not None and _is_batch(x) for x in grads):
            raise Refusal(
                "this kernel takes no batch of gradients (is_grads_batched, or torch.func around "
                "a backward alone); impl='reference' does, at O(N M) memory"
            )
        # Somebody may ask for second derivatives: create_graph=True.
        again = torch.is_grad_enabled()
        own = _Read(ctx) if again else ctx
        with torch.no_grad():
            found = backward(own, *grads)
        if not again:
            return found
        on = [x for x in (*own.saved_tensors, *grads) if x is not None and x.requires_grad]
        if not on:
            return found
        held = iter(_Last.apply(len(on), *on, *(x for x in found if x is not None)))
        return tuple(None if x is None else next(held) for x in found)

    return run


class _Read:
    """A context whose tensors are read once: gradient checkpointing gives them no second time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _is_batch(grad: Tensor) -> bool:
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)


class _Last(torch.autograd.Function):
    """Gradients that hang on other tensors."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise Refusal(
            "this kernel has no second derivative; impl='reference' has, at O(N M) memory"
        )
