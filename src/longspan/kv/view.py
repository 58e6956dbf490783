"""What a policy sees of a layer when it decides, and the attention that keys have received.

Column sums are streamed over tiles of query rows, so no N x C tensor is formed; with the
log-sum-exp of the attention kernel each tile needs one product and no second pass.

Axes: B batch, H query heads, G key heads, C places, N query rows, W observed queries, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits in a tile of query rows: what stays in a core's cache, or 256 MiB on an accelerator.
CPU_TILE, DEVICE_TILE = 1 << 18, 1 << 26
# Fewer rows make slow products: a tile that must not hold whole rows has as many.
SQUARE = 128

Turn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Moments:
    """Sums over the queries so far, before rotation, in float32.

    Attributes:
        count: [B].
        first: sum of q [B, H, D].
        second: sum of q q^T [B, H, D, D].
    """

    count: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """One layer of a cache.

    Attributes:
        keys: as they are read, [B, G, C, D].
        values: [B, G, C, Dv].
        positions: place of each token among the real ones of its row, int64 [B, G, C], rising;
            -1 where a place holds none.
        seen: real tokens so far, int64 [B].
        scale: factor on the logits.
        layer: which layer.
        layers: of how many that take part.
        queries: the last queries [B, H, W, D]; None if no part asked for them.
        query_positions: int64 [B, W], -1 for padding.
        sums: attention received so far [B, G, C], summed over the query heads of a group.
        moments: of the queries.
        norms: lengths of the tokens' embeddings [B, G, C]; None if no part asked for them.
        turn: (x [B, H, N, D], places [B, N]) rotated by so many positions more.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    seen: Tensor
    scale: float
    layer: int = 0
    layers: int = 1
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    sums: Tensor | None = None
    moments: Moments | None = None
    norms: Tensor | None = None
    turn: Turn | None = None

    @property
    def valid(self) -> Tensor:
        """Where there is a token, bool [B, G, C]."""
        return self.positions >= 0

    def observed(self, rows: int) -> tuple[Tensor, Tensor]:
        """Attention of the last ``rows`` queries, summed: [B, H, C], and their positions."""
        assert self.queries is not None
        assert self.query_positions is not None
        places = self.query_positions[:, -rows:]
        queries = self.queries[:, :, -rows:]
        return column_sums(queries, self.keys, places, self.positions, self.scale), places


def column_sums(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    *,
    lse: Tensor | None = None,
    aligned: bool = False,
) -> Tensor:
    """Attention that each key receives from all queries together.

        sum_i exp(scale q_i . k_j - lse_i),   j at or before i

    O(H N C D) time, O(H C) memory and a bounded tile.

    Args:
        q: [B, H, N, D].
        k: [B, G, C, D].
        q_positions: int64 [B, N]; rows below 0 do not count.
        k_positions: int64 [B, G, C]; places below 0 hold no key.
        scale: factor on the logits.
        lse: [B, H, N] over exactly these keys, if it is known; else it is computed.
        aligned: the queries are the last N places of every head, so a tile need not look past
            its own.

    Returns:
        float32 (float64 for float64) [B, H, C].
    """
    batch, heads, n, width = q.shape
    groups, places = k.shape[1:3]
    kind = torch.promote_types(q.dtype, torch.float32)
    rows, keys = q.to(kind).reshape(batch, groups, -1, n, width) * scale, k.to(kind).mT
    tall = rows_in_tile(batch * heads * places, q.device)
    wide = places
    if lse is not None:
        # One more column of the queries meets ones: the product is what the exponential takes.
        # A row without keys, as of padding, has no weights whatever stands there.
        norm = lse.to(kind).masked_fill(lse == -torch.inf, 0.0).view(batch, groups, -1, n, 1)
        rows = torch.cat([rows, -norm], -1)
        keys = torch.cat([keys, keys.new_ones(batch, groups, 1, places)], 2)
        if tall < SQUARE < n:
            tall = SQUARE
            wide = max(SQUARE, rows_in_tile(batch * heads * tall, q.device))
    total = (
        q.new_zeros(batch, groups, places, dtype=kind)
        .unsqueeze(2)
        .repeat(1, 1, heads // groups, 1)
    )
    for begin in range(0, n, tall):
        end = min(n, begin + tall)
        reach = places - n + end if aligned else places
        tile = rows[:, :, :, begin:end].flatten(2, 3)
        # Keys before an aligned tile are seen by all of it.
        seen = reach - (end - begin) if aligned else 0
        for left in range(0, reach, wide):
            right = min(reach, left + wide)
            weight = (tile @ keys[..., left:right]).unflatten(2, (-1, end - begin))
            if right > seen:
                _hide(weight, q_positions[:, begin:end], k_positions[:, :, left:right])
            if lse is None:
                norm = weight.logsumexp(-1, keepdim=True)
                weight.sub_(norm.masked_fill_(norm == -torch.inf, 0.0))
            total[..., left:right] += weight.exp_().sum(3)
    return total.flatten(1, 2)


def _hide(logits: Tensor, q_at: Tensor, k_at: Tensor) -> None:
    """Set logits [B, G, H / G, N, C] to -inf where queries [B, N] do not see keys [B, G, C]."""
    key, query = k_at[:, :, None, None], q_at[:, None, None, :, None]
    logits.masked_fill_((key < 0) | (key > query), -torch.inf)


def rows_in_tile(logits: int, device: torch.device) -> int:
    """Query rows in a tile, if each has so many logits; at least 1."""
    tile = CPU_TILE if device.type == "cpu" else DEVICE_TILE
    return max(1, tile // max(1, logits))


def over_group(score: Tensor, groups: int) -> Tensor:
    """Query heads beside each other in their group: [B, H, C] to [B, G, H / G, C]."""
    return score.view(score.shape[0], groups, -1, score.shape[-1])
