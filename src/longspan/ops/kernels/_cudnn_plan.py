"""Key ranges in the form of ``cudnn.flex_attention``, and the plans made from them.

There a mask is int32 endpoints F [1 or H, e, B N] with e odd: query i sees the keys
[0, F_0) + [F_1, F_2) + [F_3, F_4) + ..., and the endpoints of a query never decrease. Our ranges
are that already, but for the first one, which starts at 0 there, and for unused ones, which must
not step back: a running maximum moves them to the end of the last used one, where they are empty.

A plan lists the tiles that some query sees, and 16,384 bits for each tile that only some see. It
takes milliseconds, so it is kept.

Axes: B batch, H query heads, N query rows, M key rows, G range groups, m ranges per query, e
endpoints per query, Q tiles of query rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.kept import Kept
from longspan.ops.ranges import KeyRanges
from longspan.ops.row_tiles import row_tiles

_TILE = 128
_WORDS = _TILE * _TILE // 32
# The kernels count endpoints and mask words in int32. Tiles are 64 to 192 rows high, so that the
# words are known up to a factor of less than two.
MOST_ENDPOINTS = 1 << 31
MOST_WORDS = 1 << 30

PLANS: Kept[Any] = Kept()
_words: WeakKeyDictionary[KeyRanges, int] = WeakKeyDictionary()


def endpoints(ranges: KeyRanges, batch: int) -> Tensor:
    """The ranges as int32 [1 or H, e, B N]; 1 where all heads see the same."""
    group_BH = ranges.group_BH.expand(batch, -1)
    if bool((group_BH == group_BH[:, :1]).all()):
        group_BH = group_BH[:, :1]
    lo_GmN, hi_GmN = ranges.lo_GNm.mT, ranges.hi_GNm.mT
    groups, count, queries = lo_GmN.shape
    ends_GeN = torch.empty(groups, 2 * count, queries, dtype=torch.int32, device=lo_GmN.device)
    ends_GeN[:, 0::2], ends_GeN[:, 1::2] = lo_GmN, hi_GmN
    for e in range(1, 2 * count):
        torch.maximum(ends_GeN[:, e - 1], ends_GeN[:, e], out=ends_GeN[:, e])
    if bool((ends_GeN[:, 0] == 0).all()):
        ends_GeN = ends_GeN[:, 1:]
    else:
        # The range that starts at 0 is empty.
        ends_GeN = pad(ends_GeN, (0, 0, 1, 0))
    return ends_GeN[group_BH].permute(1, 2, 0, 3).flatten(2).contiguous()


def empty_rows(ends_HeN: Tensor, batch: int) -> Tensor | None:
    """bool [B, 1 or H, N], the queries that see no key; None if every one sees some."""
    begins, stops = ends_HeN[:, 1::2], ends_HeN[:, 2::2]
    empty = (ends_HeN[:, 0] == 0) & (begins >= stops).all(1)
    return empty.unflatten(1, (batch, -1)).transpose(0, 1) if bool(empty.any()) else None


def endpoint_count(ranges: KeyRanges, batch: int, heads: int) -> int:
    """At most how many endpoints the ranges become."""
    return heads * (2 * ranges.lo_GNm.shape[2] + 1) * batch * ranges.queries


def mask_words(ranges: KeyRanges, batch: int, heads: int) -> int:
    """At most how many mask words the plan holds, up to the height of the tiles.

    A tile is partly visible only where some range begins or ends: between the least and the
    greatest bound of its rows. O(N m) time and memory.
    """
    group_BH = ranges.group_BH.expand(-1, heads)
    if ranges not in _words:
        tiles_G = _edge_tiles(ranges)
        _words[ranges] = int(tiles_G[group_BH].sum()) * _WORDS
    # Ranges may be those of any number of batch rows.
    return _words[ranges] * (batch // len(group_BH))


def plan_of(
    ranges: KeyRanges, kind: tuple[object, ...], batch: int, make: Callable[[Tensor], Any]
) -> Any:
    """The plan of the given ranges, made once.

    Args:
        ranges: visible keys.
        kind: all else that a plan depends on.
        batch: batch rows.
        make: makes a plan from endpoints.
    """
    return PLANS.plan_of(ranges, kind, lambda: (endpoints(ranges, batch),), make)


def last_queries_first(plan: Any) -> None:
    """Let the backward walk the queries of each key tile from the last to the first.

    It keeps a key tile and walks the query tiles that see it. Causal keys begin to be seen at
    different queries, but most are seen to the end: walking from there, programs that run at the
    same time read the same queries, from the cache. Strided keys are few, so that many heads
    are under way at once, and without this their queries come from memory again and again.

    Args:
        plan: made with a backward, of the kind that is not deterministic.
    """
    lists = getattr(getattr(plan, "_packed_plan", None), "bwd_tensors", None)
    index, offset = (getattr(lists, f"full_block_{x}", None) for x in ("idx", "offset"))
    if index is None or offset is None or offset.numel() < 2:
        return
    offset = offset.long()
    rows = torch.arange(len(offset) - 1, device=index.device)
    row = rows.repeat_interleave(offset.diff(), output_size=int(offset[-1]))
    place = torch.arange(len(row), device=index.device)
    index[: len(row)] = index[offset[row] + offset[row + 1] - 1 - place]


def _edge_tiles(ranges: KeyRanges) -> Tensor:
    """int64 [G]: at most how many tiles of 128 x 128 are partly visible."""
    tiles = row_tiles(ranges, _TILE)

    def between(low_GQm: Tensor, high_GQm: Tensor) -> Tensor:
        return (-(-high_GQm // _TILE) - low_GQm // _TILE).clamp(min=0)

    touched_GQm = between(tiles.first, tiles.last)
    edges_GQm = between(tiles.first, tiles.begun) + between(tiles.ended, tiles.last)
    # Where a row lacks the range, as rows beyond the last one do, no tile of it is whole.
    whole_GQm = tiles.whole
    if ranges.queries % _TILE:
        whole_GQm[:, -1] = False
    edges_GQm = torch.minimum(edges_GQm, touched_GQm)
    return torch.where(whole_GQm, edges_GQm, touched_GQm).sum((1, 2))
