"""What decoding keeps: the tokens of the open chunk, and one summary per closed one.

Axes: B batch, H query heads, K key heads, L rows since the first open chunk began, S summaries, D
head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.mechanism.layer import Count, rows_at, to_front


@dataclass(frozen=True, kw_only=True)
class SummaryState:
    """What decoding keeps: at most C - 1 tokens, and one key and value per closed chunk.

    Attributes:
        open_key: keys of the open chunk, not rotated [B, K, L, D].
        open_value: their values.
        open_pooled: what their summary will be made of.
        open_valid: False at padding [B, L]; None if there is none.
        key: summaries [B, K or H, S, D], rotated.
        value: summaries.
        valid: False where there is no summary [B, S]; None if there are all.
        closed: chunks closed so far, per batch row where padding makes them differ.
    """

    open_key: Tensor
    open_value: Tensor
    open_pooled: Tensor
    open_valid: Tensor | None
    key: Tensor
    value: Tensor
    valid: Tensor | None
    closed: Count


def state_after(
    size: int,
    rows: tuple[Tensor, Tensor, Tensor],
    valid: Tensor | None,
    summaries: tuple[Tensor, Tensor],
    real: Tensor | None,
    closed: Count,
) -> SummaryState:
    """What the next tokens need.

    Args:
        size: tokens of a chunk.
        rows: keys, not rotated, values, and what summaries are made of, since the first open
            chunk began [B, K, L, D].
        valid: False at padding [B, L].
        summaries: keys and values of chunks that have ended, and with padding of those that have
            not [B, K or H, S, D].
        real: True at chunks that have ended [B, S].
        closed: chunks closed before these rows.
    """
    (k, v, pooled), (keys, values) = rows, summaries
    if valid is None:
        done = k.shape[2] // size
        return SummaryState(
            open_key=k[:, :, done * size :],
            open_value=v[:, :, done * size :],
            open_pooled=pooled[:, :, done * size :],
            open_valid=None,
            key=keys,
            value=values,
            valid=None,
            closed=closed + done,
        )
    assert real is not None
    tokens = valid.sum(dim=-1)
    done = tokens // size
    order, _ = to_front(valid)
    width = int((tokens - done * size).max())
    open_row = done[:, None] * size + torch.arange(width, device=k.device)
    open_row = order.gather(1, open_row.clamp_max(order.shape[1] - 1))
    open_valid = torch.arange(width, device=k.device) < (tokens - done * size)[:, None]
    order, _ = to_front(real)
    order = order[:, : int(real.sum(dim=-1).max())]
    return SummaryState(
        open_key=rows_at(k, open_row),
        open_value=rows_at(v, open_row),
        open_pooled=rows_at(pooled, open_row),
        open_valid=open_valid,
        key=rows_at(keys, order),
        value=rows_at(values, order),
        valid=real.gather(1, order),
        closed=closed + done,
    )


def join_masks(
    old: Tensor | None,
    new: Tensor | None,
    batch: int,
    rows: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """Two masks side by side; None stands for all True."""
    if old is None and new is None:
        return None
    whole = [
        torch.ones(batch, count, dtype=torch.bool, device=device) if mask is None else mask
        for mask, count in zip((old, new), rows, strict=True)
    ]
    return torch.cat(whole, dim=1)
