"""What ``hopper``'s backward begins and ends with, by row: one launch each (see ``_hopper_sums``).

Axes: B batch, H query heads, N query rows, K key heads, M key rows, D head width, C tiles of keys
that are cut.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from longspan.ops.fused import tile_of
from longspan.ops.launch import launch

# Numbers that a program clears at once.
_ZEROS = 1024


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("longspan.ops.kernels._hopper_sums")


def begun(
    out_BHND: Tensor,
    dout_BHND: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    numbers: int,
) -> tuple[Tensor, Tensor]:
    """What is added to exponents of 2 in each row, what its sums of gradients begin with; zeros.

    Args:
        out_BHND: outputs.
        dout_BHND: their gradients.
        lse: log-sum-exps [B, H, N].
        dlse: their gradients, None for zeros.
        numbers: how many zeros, in float32.
    """
    batch, heads, rows, width = out_BHND.shape
    # Rows that the copy unit can take.
    across = -(-rows // 4) * 4
    first_BH2N = out_BHND.new_empty(batch, heads, 2, across, dtype=torch.float32)
    lse_BHN = lse.contiguous()
    dlse_BHN = lse_BHN if dlse is None else dlse.float().contiguous()
    wide, tall = tile_of(width, numbers=4096)
    programs = batch * heads * -(-rows // tall)
    # Whole stretches of what a thread writes at once.
    each = -(-numbers // (programs * 16)) * 16
    zeros = first_BH2N.new_empty(programs * each)
    launch(
        _kernels().begun,
        (programs, 1, 1),
        (
            out_BHND,
            dout_BHND,
            lse_BHN,
            dlse_BHN,
            first_BH2N,
            zeros,
            each,
            rows,
            across,
            heads,
            *out_BHND.stride()[:3],
            *dout_BHND.stride()[:3],
            dlse is not None,
            width,
            wide,
            tall,
            _ZEROS,
        ),
        device=out_BHND.device,
    )
    return first_BH2N[..., :rows], zeros[:numbers]


def ended(
    own: tuple[Tensor, Tensor, float],
    cut: tuple[Tensor, Tensor],
    grads: tuple[Tensor | None, ...],
    compiled: int,
    *,
    adds: bool,
) -> None:
    """Write gradients of sums, by tiles of 64 rows.

    Args:
        own: sums of dq, where it goes, [B, H, N, D], and a factor.
        cut: sums of dk, then of dv, and int32 [C, 4] whose they are: first row, key head and batch
            row, ~ of it for the second pair of gradients.
        grads: dk and dv, and those of further keys or None.
        compiled: the width that sums have.
        adds: whether dk and dv are added to what is there.
    """
    sums, dq_BHND, scale = own
    batch, heads, rows, width = dq_BHND.shape
    tiles, pieces = batch * heads * -(-rows // 64), 2 * len(cut[1])
    assert grads[1] is not None
    launch(
        _kernels().ended,
        (tiles + 2 * pieces, 1, 1),
        (
            sums,
            _gradient(dq_BHND),
            scale,
            tiles,
            heads,
            *cut,
            pieces,
            *map(_gradient, grads),
            width,
            grads[1].shape[3],
            compiled,
            adds,
        ),
        device=sums.device,
    )


def _gradient(x_BHND: Tensor | None) -> tuple[Tensor | int, ...] | None:
    """Its memory, rows and strides."""
    return None if x_BHND is None else (x_BHND, x_BHND.shape[2], *x_BHND.stride())
