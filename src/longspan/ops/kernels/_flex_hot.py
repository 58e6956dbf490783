"""Keys that nearly every query sees, copied, so that many programs share their gradients.

In the backward one program adds up dK and dV of a key tile, over all query tiles that see it, one
after the other. A tile of a window is seen by few of them; the tile that holds a sink is seen by
all, and when the other programs are done this one has hardly begun. Here such a tile stands
several times among the keys, each copy seen by one stretch of the queries, and the gradients of
copies add up in the key. Nothing else changes: every query sees the same keys as before.

Axes: G range groups, N query rows, M key rows, m ranges per query, C key tiles, B batch, H query
heads, K key heads, E copied rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.kernels._flex_tiles import count_tiles
from longspan.ops.ranges import KeyRanges

# A key tile is hot if it has this many times the work of the mean tile, and this much at least,
# in query tiles over all heads of its key head.
_HOT = 8
_LEAST = 128
# Work that is left to a copy, in multiples of the mean.
_SHARE = 2


@dataclass(frozen=True, eq=False)
class Copies:
    """Ranges over the keys and some copies behind them.

    Attributes:
        ranges: the same visible keys, seen in their copies.
        row_E: int64, the key row that each row behind the M keys repeats.
    """

    ranges: KeyRanges
    row_E: Tensor

    def take(self, x_BKMD: Tensor) -> Tensor:
        """Keys or values with the copies behind them [B, K, M + E, D]."""
        return torch.cat([x_BKMD, x_BKMD.index_select(2, self.row_E)], dim=2)


_copies: WeakKeyDictionary[KeyRanges, dict[tuple[int, int], Copies | None]] = WeakKeyDictionary()


def copies_of(ranges: KeyRanges, heads: int, key_heads: int) -> Copies | None:
    """Copies of the hot keys, or None where no key is hot; kept as long as ``ranges`` lives."""
    kept = _copies.setdefault(ranges, {})
    name = (heads, key_heads)
    if name not in kept:
        kept[name] = _find(ranges, heads, key_heads)
    return kept[name]


def _find(ranges: KeyRanges, heads: int, key_heads: int) -> Copies | None:
    counts = count_tiles(ranges)
    tile, queries, keys = counts.tile, ranges.queries, ranges.keys
    seen_GC = counts.q_GC + counts.full_q_GC
    group_BH = ranges.group_BH.expand(-1, heads)
    work_BKC = seen_GC[group_BH].unflatten(1, (key_heads, -1)).sum(2).float()
    used = work_BKC > 0
    if not bool(used.any()):
        return None
    mean = float(work_BKC[used].mean())
    work_C = work_BKC.amax((0, 1))
    hot = torch.nonzero(work_C > max(_HOT * mean, _LEAST)).flatten().tolist()
    lo_GNm, hi_GNm = ranges.lo_GNm.clone(), ranges.hi_GNm.clone()
    row = torch.arange(queries, device=lo_GNm.device)[None, :, None]
    # Copies begin at a tile of their own.
    extra = [torch.zeros(-keys % tile, dtype=torch.long)]
    end = keys + len(extra[0])
    for c in hot:
        first, last = c * tile, min((c + 1) * tile, keys)
        copies = int(work_C[c] / (_SHARE * mean))
        # Each copy serves a stretch of whole query tiles; the first stretch keeps the original.
        stretch = -(-queries // (copies * tile)) * tile
        inside = (lo_GNm >= first) & (hi_GNm <= last) & (lo_GNm < hi_GNm) & (row >= stretch)
        move = torch.where(inside, end - first + (row // stretch - 1) * tile, 0).int()
        lo_GNm += move
        hi_GNm += move
        rows = torch.arange(first, first + tile).clamp(max=keys - 1)
        taken = -(-queries // stretch) - 1
        extra.append(rows.repeat(taken))
        end += taken * tile
    # More copies than keys would cost more than they save.
    if not hot or end > 2 * keys:
        return None
    row_E = torch.cat(extra).to(lo_GNm.device)
    return Copies(KeyRanges(lo_GNm, hi_GNm, ranges.group_BH, end), row_E)
