"""Which tiles of the score matrix some range touches, and which it covers wholly.

A tile is 128 query rows by 128 key rows. Each range of each row marks where its tiles begin and
end; a running sum along the keys then counts the ranges over every tile. Time O(N m + Q C) per
group, and O(Q C) scratch for a few groups at a time; the lists are as wide as the longest row
needs, not one column per tile. Never a mask of N x M.

Axes: G range groups, g some of them, N query rows, M key rows, m ranges per query, Q query tiles,
C key tiles, W longest tile list of a query tile, V longest tile list of a key tile. Z and Y are
the batch rows and heads that the lists tell apart: 1 where all are alike, else B and H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.ranges import KeyRanges

TILE = 128
_TILES_AT_ONCE = 1 << 26


class TileLists(NamedTuple):
    """For each tile row, how many tiles it visits and which; unused entries are 0.

    ``partial`` tiles need the mask, ``full`` tiles do not. The first four go from query tile to
    key tiles (forward and dQ), the last four from key tile to query tiles (dK, dV). int32; counts
    [Z, Y, Q] or [Z, Y, C], indices [Z, Y, Q, W] or [Z, Y, C, V]. The order is the one of the
    BlockMask constructor.
    """

    kv_count: Tensor
    kv_index: Tensor
    full_kv_count: Tensor
    full_kv_index: Tensor
    q_count: Tensor
    q_index: Tensor
    full_q_count: Tensor
    full_q_index: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TileCounts:
    """How many tiles each row of tiles visits, before any list is written."""

    tile: int
    kv_GQ: Tensor
    full_kv_GQ: Tensor
    q_GC: Tensor
    full_q_GC: Tensor
    # The longest list of a query tile and of a key tile, at least 2: see `_pad`.
    width: int
    height: int
    # Group of each distinct batch row and head.
    group_ZY: Tensor

    @property
    def list_bytes(self) -> int:
        """Bytes of all eight lists."""
        queries, keys = _pad(self.kv_GQ.shape[1]), _pad(self.q_GC.shape[1])
        cells = queries * (self.width + 1) + keys * (self.height + 1)
        return 2 * cells * self.group_ZY.numel() * torch.int32.itemsize


_counts: WeakKeyDictionary[KeyRanges, TileCounts] = WeakKeyDictionary()


def count_tiles(ranges: KeyRanges) -> TileCounts:
    """How many tiles the lists of the given ranges will hold; kept as long as ``ranges`` lives."""
    if ranges in _counts:
        return _counts[ranges]
    tile = _tile(ranges.queries, ranges.keys)
    parts = [
        (partial.sum(-1), full.sum(-1), partial.sum(-2), full.sum(-2))
        for _, partial, full in _tiles(ranges, tile)
    ]
    kv, full_kv, q, full_q = (torch.cat(part).int() for part in zip(*parts, strict=True))
    # Forward and decoding kernels address partial and full lists alike, hence one width for both.
    width, height = torch.stack(
        [torch.maximum(kv.max(), full_kv.max()), torch.maximum(q.max(), full_q.max())]
    ).tolist()
    group_ZY = ranges.group_BH
    if (group_ZY == group_ZY[:, :1]).all():
        group_ZY = group_ZY[:, :1]
    if (group_ZY == group_ZY[:1]).all():
        group_ZY = group_ZY[:1]
    _counts[ranges] = counts = TileCounts(
        tile=tile,
        kv_GQ=kv,
        full_kv_GQ=full_kv,
        q_GC=q,
        full_q_GC=full_q,
        width=_pad(width),
        height=_pad(height),
        group_ZY=group_ZY,
    )
    return counts


def tile_lists(ranges: KeyRanges) -> TileLists:
    """Full and partial tiles of the given ranges, both ways, computed on their device."""
    counts = count_tiles(ranges)
    groups, queries = counts.kv_GQ.shape
    keys = counts.q_GC.shape[1]
    like = {"device": counts.kv_GQ.device, "dtype": torch.int32}
    kv_index, full_kv_index = torch.zeros(2, groups, _pad(queries), counts.width, **like).unbind()
    q_index, full_q_index = torch.zeros(2, groups, _pad(keys), counts.height, **like).unbind()
    for first, partial_GQC, full_GQC in _tiles(ranges, counts.tile):
        for tiles_GQC, forth, back in (
            (partial_GQC, kv_index, q_index),
            (full_GQC, full_kv_index, full_q_index),
        ):
            group, query, key = tiles_GQC.nonzero().unbind(-1)
            place = tiles_GQC.cumsum(-1, dtype=torch.int32)[group, query, key] - 1
            forth[first + group, query, place.long()] = key.int()
            place = tiles_GQC.cumsum(-2, dtype=torch.int32)[group, query, key] - 1
            back[first + group, key, place.long()] = query.int()

    def rows(count_GX: Tensor) -> Tensor:
        length = count_GX.shape[1]
        return pad(count_GX, (0, _pad(length) - length))

    by_group = TileLists(
        rows(counts.kv_GQ),
        kv_index,
        rows(counts.full_kv_GQ),
        full_kv_index,
        rows(counts.q_GC),
        q_index,
        rows(counts.full_q_GC),
        full_q_index,
    )
    return TileLists(*(x[counts.group_ZY].contiguous() for x in by_group))


def touched_tiles(ranges: KeyRanges, tile: int) -> Tensor:
    """int64 [G]: how many tiles of ``tile`` rows and keys some range of the group touches."""
    parts = [(partial | full).sum((1, 2)) for _, partial, full in _tiles(ranges, tile)]
    return torch.cat(parts)


def _pad(length: int) -> int:
    # A dimension of 1 is compiled in as a constant; 2 may become a symbol.
    return max(length, 2)


def _tile(queries: int, keys: int) -> int:
    tile = TILE
    while -(-queries // tile) * -(-keys // tile) > _TILES_AT_ONCE:
        tile *= 2
    return tile


def _tiles(ranges: KeyRanges, tile: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Partial and full tiles, a few groups at a time: (first group, bool [g, Q, C] twice)."""
    lo, hi, keys = ranges.lo_GNm, ranges.hi_GNm, ranges.keys
    queries = -(-ranges.queries // tile)
    columns = -(-keys // tile)
    step = max(1, _TILES_AT_ONCE // (queries * columns))
    row_N = torch.arange(ranges.queries, device=lo.device) // tile

    def covered(begin_gNm: Tensor, end_gNm: Tensor) -> Tensor:
        """How many ranges cover each tile: 1 up where one begins, 1 down where it ends."""
        groups = len(begin_gNm)
        group_g = torch.arange(groups, device=lo.device)
        line_gNm = ((group_g[:, None] * queries + row_N) * (columns + 1))[..., None]
        some = (begin_gNm < end_gNm).int().flatten()
        change = torch.zeros(groups * queries * (columns + 1), dtype=torch.int32, device=lo.device)
        change.scatter_add_(0, (line_gNm + begin_gNm).flatten(), some)
        change.scatter_add_(0, (line_gNm + end_gNm).flatten(), -some)
        change = change.view(groups, queries, columns + 1)
        return change.cumsum(-1, dtype=torch.int32)[..., :columns]

    for first in range(0, ranges.groups, step):
        lo_gNm, hi_gNm = lo[first : first + step], hi[first : first + step]
        # An unused range must begin and end in one tile also after rounding outwards.
        last_gNm = torch.where(lo_gNm < hi_gNm, -(-hi_gNm // tile), lo_gNm // tile)
        touched = covered(lo_gNm // tile, last_gNm) > 0
        # The ranges of a row are disjoint, so `tile` covers are one from each row of the tile. A
        # tile that sticks out of the last row or key is never full: the kernel cuts it with the
        # mask.
        inner_gNm = -(-lo_gNm // tile)
        full = covered(inner_gNm, torch.maximum(hi_gNm // tile, inner_gNm)) == tile
        yield first, touched & ~full, full
