"""Causal sums of linear attention by chunks.

Inside a chunk the quadratic form, between chunks the running sums S and z; keys whose features
carry a log factor are weighed in units of exp(running maximum), which only earlier rows decide.

Axes: B batch, K key heads, G query heads per key head, N rows, R features, E = D + 1 (the values
and a one, whose sum is the denominator), T chunks of C rows, X = G C.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor
from torch.nn.functional import pad

# Rows per round: bounds the matrix of chunk-to-chunk factors, which is quadratic in the chunks.
_ROUND = 4096


def causal_sums(
    phi_q: Tensor,
    phi_k: Tensor,
    log_k: Tensor | None,
    v_BKNE: Tensor,
    before: tuple[Tensor, Tensor] | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Numerators and denominators of causal linear attention.

    Args:
        phi_q: features of the queries [B, K, G, N, R].
        phi_k: features of the keys [B, K, N, R], divided by exp(log_k).
        log_k: [B, K, N], or None for 0.
        v_BKNE: values and a one.
        before: sums [B, K, R, E] over earlier rows, divided by exp of their log [B, K].
        chunk: rows of a chunk.

    Returns:
        sums [B, K, G, N, E], each row with a common factor of its own, and what ``before`` is for
        the rows that follow.
    """
    batch, heads, rows, features = phi_k.shape
    if before is None:
        sums = phi_k.new_zeros(batch, heads, features, v_BKNE.shape[3])
        log = phi_k.new_full((batch, heads), 0.0 if log_k is None else lowest(phi_k.dtype))
    else:
        sums, log = before
    # Split and not sliced: the gradient of a slice is as long as all rows.
    wide = [x.split(_ROUND, dim=-2) for x in (phi_q, phi_k, v_BKNE)]
    logs = repeat(None) if log_k is None else log_k.split(_ROUND, dim=-1)
    parts = []
    for own_q, own_k, own_v, own_log in zip(*wide, logs, strict=False):
        part, sums, log = _round(own_q, own_k, own_log, own_v, sums, log, min(chunk, rows))
        parts.append(part)
    return torch.cat(parts, dim=3), sums, log


def _round(
    phi_q: Tensor,
    phi_k: Tensor,
    log_k: Tensor | None,
    v: Tensor,
    sums: Tensor,
    log: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, groups = phi_k.shape[2], phi_q.shape[2]
    extra = -rows % chunk
    q_BKTGCR = pad(phi_q, (0, 0, 0, extra)).unflatten(3, (-1, chunk)).transpose(2, 3)
    q_BKTXR = q_BKTGCR.flatten(3, 4)
    k_BKTCR = pad(phi_k, (0, 0, 0, extra)).unflatten(2, (-1, chunk))
    v_BKTCE = pad(v, (0, 0, 0, extra)).unflatten(2, (-1, chunk))
    a_BKTGCC = (q_BKTXR @ k_BKTCR.transpose(-1, -2)).unflatten(3, (groups, chunk))
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).triu(1)
    if log_k is None:
        a_BKTGCC = a_BKTGCC.masked_fill(later, 0.0)
        added = k_BKTCR.transpose(-1, -2) @ v_BKTCE
        before = torch.cat([sums[:, :, None], added], dim=2).cumsum(dim=2)
        across = q_BKTXR @ before[:, :, :-1]
    else:
        # Row i is in units of exp(its running maximum), which only earlier rows decide.
        own = pad(log_k, (0, extra), value=lowest(v.dtype))
        running = torch.cat([log[..., None], own], dim=-1).cummax(dim=-1).values
        row_BKTC = running[..., 1:].unflatten(-1, (-1, chunk))
        own_BKTC = own.unflatten(-1, (-1, chunk))
        edge = running[..., ::chunk]
        factor = own_BKTC[..., None, :] - row_BKTC[..., :, None]
        factor = factor.masked_fill(later, -torch.inf).exp()
        a_BKTGCC = a_BKTGCC * factor[:, :, :, None]
        weighted = k_BKTCR * (own_BKTC - edge[..., 1:, None]).exp()[..., None]
        added = torch.cat([sums[:, :, None], weighted.transpose(-1, -2) @ v_BKTCE], dim=2)
        after = torch.ones(added.shape[2], added.shape[2], dtype=torch.bool, device=v.device)
        step = (edge[..., None, :] - edge[..., :, None]).masked_fill(after.triu(1), -torch.inf)
        before = (step.exp() @ added.flatten(3)).unflatten(-1, added.shape[3:])
        log = edge[..., -1]
        across = (q_BKTXR @ before[:, :, :-1]).unflatten(3, (groups, chunk))
        across = across * (edge[..., :-1, None] - row_BKTC).exp()[:, :, :, None, :, None]
        across = across.flatten(3, 4)
    total = a_BKTGCC.flatten(3, 4) @ v_BKTCE + across
    total = total.unflatten(3, (groups, chunk)).transpose(2, 3).flatten(3, 4)
    return total[..., :rows, :], before[:, :, -1], log


def lowest(dtype: torch.dtype) -> float:
    """Log factor of a row that does not count."""
    # Differences of two such numbers stay finite.
    return torch.finfo(dtype).min / 4
