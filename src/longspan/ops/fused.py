"""What surrounds a kernel on a GPU, each in one Triton kernel: gathering rows, merging parts.

    out[b, h, p] = x[b, h, row[b, p]]
    lse = log sum_p exp(lse_p)            out = sum_p exp(lse_p - lse) out_p

Every number is read and written once, at the speed of memory. Written as PyTorch operations these
cost as much as the attention over a small window itself.

Axes: B batch, H heads, N rows, P places, D width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers that one program holds.
_NUMBERS = 4096


def can_fuse(*tensors: Tensor) -> bool:
    """Whether these tensors are on a GPU, and Triton is there."""
    return all(x.is_cuda and x.dtype != torch.float64 for x in tensors) and _has_triton()


def gather(x_BHND: Tensor, row_BP: Tensor) -> Tensor:
    """Rows of ``x`` [B, H, N, D] in the order of ``row`` int64 [B or 1, P]; without gradient."""
    x_BHND, row_BP = x_BHND.contiguous(), row_BP.contiguous()
    batch, heads, rows, width = x_BHND.shape
    places = row_BP.shape[1]
    out_BHPD = x_BHND.new_empty(batch, heads, places, width)
    wide, tall = _tile(width)
    step = places if len(row_BP) > 1 else 0
    with torch.cuda.device(x_BHND.device):
        _kernels().gather_rows[(-(-places // tall), batch * heads)](
            x_BHND, row_BP, out_BHPD, rows, places, heads, step, width, wide, tall
        )
    return out_BHPD


def merge_fused(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join (out, lse) pairs as ``merge`` does; differentiable once."""
    return _Merge.apply(*(x.contiguous() for part in parts for x in part))


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses = given[::2], given[1::2]
        out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
        width, rows = out.shape[-1], lse.numel()
        wide, tall = _tile(width)
        with torch.cuda.device(out.device):
            _kernels().merge_rows[(-(-rows // tall),)](
                outs, lses, out, lse, rows, width, wide, tall
            )
        ctx.save_for_backward(*given, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, ...]:
        *given, lse = ctx.saved_tensors
        outs, lses = tuple(given[::2]), tuple(given[1::2])
        d_outs, d_lses = (tuple(torch.empty_like(x) for x in xs) for xs in (outs, lses))
        width, rows = outs[0].shape[-1], lse.numel()
        wide, tall = _tile(width)
        d_out, d_lse = (x.contiguous() for x in grads)
        with torch.cuda.device(lse.device):
            _kernels().merge_gradients[(-(-rows // tall),)](
                outs, lses, lse, d_out, d_lse, d_outs, d_lses, rows, width, wide, tall
            )
        return tuple(x for pair in zip(d_outs, d_lses, strict=True) for x in pair)


def _tile(width: int) -> tuple[int, int]:
    """Columns and rows of a program, both powers of two."""
    wide = 1 << (width - 1).bit_length()
    return wide, max(1, _NUMBERS // wide)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _kernels() -> ModuleType:
    from longspan.ops import _fused_triton

    return _fused_triton
