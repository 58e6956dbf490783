"""Forward pass of the tiled kernel: every batch is one fused call, spans of one tile are joined
by lse.

    O <- O + sigmoid(lse' - lse) (O' - O),    lse <- log(exp lse + exp lse')

On CPU the fused call is the one behind PyTorch's own dense attention, which keeps a tile's
scores in the core's cache; elsewhere it is written out.

Axes: as in _tiled_views.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.kernels._tiled_schedule import Schedule
from longspan.ops.kernels._tiled_views import (
    Biases,
    Canvas,
    key_rows,
    query_rows,
)
from longspan.ops.workers import run_parts


def forward(
    q_RD: Tensor,
    k_LD: Tensor,
    v_LD: Tensor,
    schedule: Schedule,
    biases: Biases,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend from rows as they lie in memory.

    Returns:
        output [R, Dv] in the dtype of q and lse [R, 1] in at least float32, which lie as q does.
    """
    work = torch.promote_types(q_RD.dtype, torch.float32)
    out_RD = q_RD.new_empty(len(q_RD), v_LD.shape[1], dtype=work)
    lse_R1 = q_RD.new_empty(len(q_RD), 1, dtype=work)
    if not schedule.covers:
        out_RD.zero_()
        lse_R1.fill_(-torch.inf)
    attend = _fused if q_RD.device.type == "cpu" else _written_out

    def part(i: int) -> None:
        canvas = Canvas(lse_R1)
        for batch in schedule.batches(i, apart=False):
            q_JHTD, out_JHTD, lse_JHT1 = (query_rows(x, batch) for x in (q_RD, out_RD, lse_R1))
            mask = batch.run.mask
            new_out, new_lse = attend(
                q_JHTD.flatten(1, 2),
                key_rows(k_LD, batch),
                key_rows(v_LD, batch),
                biases.whole(mask, batch.heads, canvas) if mask else (),
                scale,
            )
            new_out, new_lse = new_out.view_as(out_JHTD), new_lse.view_as(lse_JHT1)
            if batch.run.wave == 0:
                out_JHTD.copy_(new_out)
                lse_JHT1.copy_(new_lse)
            else:
                # Where neither side has a key the difference is NaN; between zeros any weight
                # will do.
                weight_JHT1 = torch.sigmoid(new_lse - lse_JHT1).nan_to_num_(0.0)
                out_JHTD.lerp_(new_out.to(work), weight_JHT1)
                lse_JHT1.copy_(torch.logaddexp(lse_JHT1, new_lse))

    run_parts(part, len(schedule.parts))
    return out_RD.to(q_RD.dtype), lse_R1


def _fused(
    q_JTD: Tensor,
    k_JSD: Tensor,
    v_JSD: Tensor,
    bias: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    width, value_width = q_JTD.shape[-1], v_JSD.shape[-1]
    # The call wants keys and values of one width.
    if value_width < width:
        v_JSD = pad(v_JSD, (0, width - value_width))
    elif width < value_width:
        q_JTD, k_JSD = (pad(x, (0, value_width - width)) for x in (q_JTD, k_JSD))
    # Jobs as batch rows, for it lays the rows of heads between each other.
    out_J1TD, lse_J1T = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x_JXD[:, None] for x_JXD in (q_JTD, k_JSD, v_JSD)),
        attn_mask=bias[0] if bias else None,
        scale=scale,
    )
    lse_JT = lse_J1T[:, 0]
    if len(bias) > 1:
        # It calls the lse of a row that sees nothing 0.
        lse_JT = lse_JT + bias[1]
    return out_J1TD[:, 0, :, :value_width], lse_JT


def _written_out(
    q_JTD: Tensor,
    k_JSD: Tensor,
    v_JSD: Tensor,
    bias: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    work = torch.promote_types(q_JTD.dtype, torch.float32)
    s_JTS = (q_JTD.to(work) @ k_JSD.to(work).transpose(-1, -2)).mul_(scale)
    if bias:
        s_JTS.add_(bias[0])
    lse_JT = s_JTS.logsumexp(-1)
    # A row that sees nothing has lse -inf: 0 in its place makes its weights 0, not NaN.
    finite_JT1 = lse_JT.masked_fill(lse_JT.isneginf(), 0.0)[..., None]
    return s_JTS.sub_(finite_JT1).exp_() @ v_JSD.to(work), lse_JT
