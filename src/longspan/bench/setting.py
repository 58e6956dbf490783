"""What a benchmark runs on: sizes, dtype and device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.errors import InputError

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
# Floating-point operations per pair, head and unit of width: two products forward, seven in all.
WAYS = {"forward": 4, "forward+backward": 14}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of one call.

    Attributes:
        n: rows.
        heads: query heads.
        key_heads: key heads; they divide the query heads.
        width: of a head.
        dtype: one of ``DTYPES``.
        device: ``cpu`` or ``cuda``.
        causal: whether the dense attention of comparisons is.
    """

    n: int
    heads: int = 8
    key_heads: int = 8
    width: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    causal: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.device not in DEVICES:
            raise InputError(f"device must be {' or '.join(DEVICES)}, got {self.device!r}")
        for name in ("n", "heads", "key_heads", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.key_heads:
            raise InputError(f"key heads must divide heads, got {self.key_heads} and {self.heads}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device is cuda, and torch sees none; leave --device out, or cpu")

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return self.width**-0.5

    @property
    def dense_pairs(self) -> int:
        """Query-key pairs of dense attention over all heads."""
        return self.heads * (self.n * (self.n + 1) // 2 if self.causal else self.n * self.n)

    def tensors(self) -> list[Tensor]:
        """Normal q [1, H, N, D], k and v [1, K, N, D], the same in every process."""
        make = torch.Generator(self.device).manual_seed(self.n)
        shapes = [(1, h, self.n, self.width) for h in (self.heads, self.key_heads, self.key_heads)]
        dtype = getattr(torch, self.dtype)
        return [torch.randn(s, generator=make, device=self.device).to(dtype) for s in shapes]


def by_rows(attend: Callable[..., Any]) -> Call:
    """A function of [B, N, H, D] tensors, which may give more than its output, as a call."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = attend(*(x.transpose(1, 2) for x in (q, k, v)))
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return call


def ungrouped(attend: Call) -> Call:
    """A call that knows no grouped queries, with keys and values repeated for it."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        each = q.shape[1] // k.shape[1]
        return attend(q, *(x.repeat_interleave(each, 1) if each > 1 else x for x in (k, v)))

    return call


def both_ways(call: Call, inputs: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Forward without gradients, and forward + backward; the keys are those of ``WAYS``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    slope = torch.ones_like(inputs[0])

    def forward() -> object:
        with torch.no_grad():
            return call(*inputs)

    return {
        "forward": forward,
        "forward+backward": lambda: torch.autograd.grad(call(*leaves), leaves, slope),
    }
