"""Forward pass of the tiled kernel: every batch is one fused call, spans of one tile are joined
by lse.

    O <- O + sigmoid(lse' - lse) (O' - O),    lse <- log(exp lse + exp lse')

On CPU the fused call is the one behind PyTorch's own dense attention, which keeps a tile's
scores in the core's cache; elsewhere it is written out.

Axes: as in _tiled_views; T counts the rows of every head of a bundle where there is no H.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.kernels._tiled_schedule import Schedule
from longspan.ops.kernels._tiled_views import Biases, key_rows, query_rows
from longspan.ops.kernels._tiled_workers import run_parts


def forward(
    q_RD: Tensor,
    k_LD: Tensor,
    v_LD: Tensor,
    schedule: Schedule,
    biases: Biases,
    queries: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend from rows laid end to end.

    Returns:
        output [R, Dv] in the dtype of q, and lse [R, 1] in at least float32.
    """
    work = torch.promote_types(q_RD.dtype, torch.float32)
    out_RD = q_RD.new_empty(len(q_RD), v_LD.shape[1], dtype=work)
    lse_R1 = q_RD.new_empty(len(q_RD), 1, dtype=work)
    if not schedule.covers:
        out_RD.zero_()
        lse_R1.fill_(-torch.inf)
    attend = _fused if q_RD.device.type == "cpu" else _written_out

    def part(i: int) -> None:
        for batch in schedule.batches(i, grid=True):
            q_ACHTD, out_ACHTD, lse_ACHT1 = (
                query_rows(x, batch, queries) for x in (q_RD, out_RD, lse_R1)
            )
            mask = batch.run.mask
            new_out, new_lse = attend(
                q_ACHTD.flatten(2, 3),
                key_rows(k_LD, batch),
                key_rows(v_LD, batch),
                biases.whole(mask, batch.heads, lse_R1) if mask else (),
                scale,
            )
            shape_HT = out_ACHTD.shape[2:4]
            new_out, new_lse = new_out.unflatten(2, shape_HT), new_lse.unflatten(2, shape_HT)
            if batch.run.wave == 0:
                out_ACHTD.copy_(new_out)
                lse_ACHT1[..., 0].copy_(new_lse)
            else:
                new_lse = new_lse[..., None]
                # Where neither side has a key the difference is NaN; between zeros any weight
                # will do.
                weight_ACHT1 = torch.sigmoid(new_lse - lse_ACHT1).nan_to_num_(0.0)
                out_ACHTD.lerp_(new_out.to(work), weight_ACHT1)
                lse_ACHT1.copy_(torch.logaddexp(lse_ACHT1, new_lse))

    run_parts(part, len(schedule.parts))
    return out_RD.to(q_RD.dtype), lse_R1


def _fused(
    q_ACTD: Tensor,
    k_ACSD: Tensor,
    v_ACSD: Tensor,
    bias: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    width, value_width = q_ACTD.shape[-1], v_ACSD.shape[-1]
    # The call wants keys and values of one width.
    if value_width < width:
        v_ACSD = pad(v_ACSD, (0, width - value_width))
    elif width < value_width:
        q_ACTD, k_ACSD = (pad(x, (0, value_width - width)) for x in (q_ACTD, k_ACSD))
    out_ACTD, lse_ACT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_ACTD, k_ACSD, v_ACSD, attn_mask=bias[0] if bias else None, scale=scale
    )
    if len(bias) > 1:
        # It calls the lse of a row that sees nothing 0.
        lse_ACT = lse_ACT + bias[1]
    return out_ACTD[..., :value_width], lse_ACT


def _written_out(
    q_ACTD: Tensor,
    k_ACSD: Tensor,
    v_ACSD: Tensor,
    bias: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    work = torch.promote_types(q_ACTD.dtype, torch.float32)
    s_ACTS = (q_ACTD.to(work) @ k_ACSD.to(work).transpose(-1, -2)).mul_(scale)
    if bias:
        s_ACTS.add_(bias[0])
    lse_ACT = s_ACTS.logsumexp(-1)
    # A row that sees nothing has lse -inf: 0 in its place makes its weights 0, not NaN.
    finite_ACT1 = lse_ACT.masked_fill(lse_ACT.isneginf(), 0.0)[..., None]
    return s_ACTS.sub_(finite_ACT1).exp_() @ v_ACSD.to(work), lse_ACT
