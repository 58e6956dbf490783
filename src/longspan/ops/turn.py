"""Rotary embeddings on a GPU in one Triton kernel.

    out_m = x_m cos - x_m' sin            out_m' = x_m' cos + x_m sin            m' = m + D / 2

Every number is read and written once. Written as PyTorch operations it is moved a dozen times.

Axes: B batch, H heads, N rows, D width, m half of it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longspan.ops.launch import launch

# Pairs that one program holds.
_PAIRS = 4096


def turn_rows(x_BHND: Tensor, cos_BNm: Tensor, sin_BNm: Tensor) -> Tensor:
    """Rows with both halves of them turned, [B, H, N, D] in the dtype of ``x``; differentiable.

    Args:
        x_BHND: of any layout, where ``fused.can_fuse`` holds; D is even.
        cos_BNm: float32 [B or 1, N, D / 2], for all heads, as ``sin_BNm``; without gradient.
        sin_BNm: the same of the sine.
    """
    return _Turn.apply(x_BHND, cos_BNm.contiguous(), sin_BNm.contiguous(), 1.0)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHND: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        ctx.sign = sign
        ctx.save_for_backward(cos, sin)
        x_BHND = x_BHND if x_BHND.stride(-1) == 1 else x_BHND.contiguous()
        batch, heads, rows, width = x_BHND.shape
        out = x_BHND.new_empty(batch, heads, rows, width)
        half = width // 2
        wide = 1 << (half - 1).bit_length()
        tall = max(1, _PAIRS // wide)
        kernels: ModuleType = importlib.import_module("longspan.ops._turn_triton")
        launch(
            kernels.turn_rows,
            (-(-rows // tall), batch * heads, 1),
            (
                x_BHND,
                cos,
                sin,
                out,
                rows,
                heads,
                *x_BHND.stride()[:3],
                cos[0].numel() if len(cos) > 1 else 0,
                sign,
                half,
                wide,
                tall,
            ),
            device=x_BHND.device,
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The transpose of a rotation turns back.
        return _Turn.apply(grads[0], *ctx.saved_tensors, -ctx.sign), None, None, None
