"""Rotary position embedding of queries and keys (RoFormer, Su et al. 2021, arXiv 2104.09864).

Halves are paired, as in Llama: component m turns with component m + D/2 by position * theta_m.

Axes: B batch, H heads, N rows, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.fused import can_fuse
from longspan.ops.turn import turn_rows


def rotate(x_BHND: Tensor, positions: Tensor, inv_freq: Tensor, factor: float = 1.0) -> Tensor:
    """Turn queries or keys by their positions.

    Args:
        x_BHND: queries or keys [B, H, N, D].
        positions: whole numbers [N] or [B, N].
        inv_freq: radians per position [D/2].
        factor: multiplies cosine and sine.

    Returns:
        Tensor of the shape and dtype of ``x_BHND``; angles are computed in float32 at least.
    """
    work = torch.promote_types(x_BHND.dtype, torch.float32)
    angle = positions.to(work)[..., None] * inv_freq.to(device=x_BHND.device, dtype=work)
    angle_11ND = angle[:, None] if angle.dim() == 3 else angle
    cos, sin = angle_11ND.cos() * factor, angle_11ND.sin() * factor
    if _one_angle_a_row(x_BHND, positions) and can_fuse(x_BHND, cos) and not cos.requires_grad:
        # Written as below every number would be moved a dozen times.
        tables = (x.reshape(-1, *x.shape[-2:]) for x in (cos, sin))
        return turn_rows(x_BHND, *tables)
    first, second = x_BHND.to(work).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BHND.dtype)


def _one_angle_a_row(x_BHND: Tensor, positions: Tensor) -> bool:
    """Whether there are rows, and nothing is broadcast but batch rows and heads."""
    batch, _, rows, _ = x_BHND.shape
    return x_BHND.numel() > 0 and positions.shape in ((rows,), (1, rows), (batch, rows))


def count_positions(segments_BN: Tensor) -> Tensor:
    """Place of each row inside its segment [B, N]; padding (negative) does not count."""
    used = segments_BN >= 0
    row = torch.arange(segments_BN.shape[-1], device=segments_BN.device).expand_as(segments_BN)
    count = used.cumsum(dim=-1) - 1
    # A segment starts where it differs from that of the last row that is no padding.
    last = torch.where(used, row, -1).cummax(dim=-1).values
    before = torch.nn.functional.pad(last, (1, 0), value=-1)[..., :-1]
    other = segments_BN.gather(-1, before.clamp(min=0)) != segments_BN
    starts = used & (other | (before < 0))
    begin = torch.where(starts, count, 0).cummax(dim=-1).values
    return torch.where(used, count - begin, 0)
