"""What the ranges of the rows of a tile have in common.

Axes: G range groups, N query rows in Q tiles, m ranges per query.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.ranges import KeyRanges


class RowTiles(NamedTuple):
    """Bounds of the t-th range over the rows of a tile that have one, [G, Q, m] each.

    Attributes:
        first: least lower bound; the number of keys where no row has the range.
        begun: greatest lower bound, 0 there.
        ended: least upper bound, the number of keys there.
        last: greatest upper bound, 0 there.
        whole: whether every row has it; rows beyond the last one do not count.
    """

    first: Tensor
    begun: Tensor
    ended: Tensor
    last: Tensor
    whole: Tensor


def row_tiles(ranges: KeyRanges, tile: int) -> RowTiles:
    """Bounds of all ranges by tiles of rows. O(N m) time and memory."""
    lo_GNm, hi_GNm, keys = ranges.lo_GNm, ranges.hi_GNm, ranges.keys
    some_GNm = lo_GNm < hi_GNm

    def tiled(x_GNm: Tensor, fill: int) -> Tensor:
        """[G, Q, tile, m], with rows that lack the range set to ``fill``."""
        return by_tile(x_GNm.masked_fill(~some_GNm, fill), tile, fill)

    return RowTiles(
        first=tiled(lo_GNm, keys).amin(2),
        begun=tiled(lo_GNm, 0).amax(2),
        ended=tiled(hi_GNm, keys).amin(2),
        last=tiled(hi_GNm, 0).amax(2),
        whole=by_tile(some_GNm, tile, True).all(2),
    )


def by_tile(x_GNm: Tensor, tile: int, fill: int) -> Tensor:
    """[G, N, m] as [G, Q, tile, m], with ``fill`` beyond the last row."""
    short = -x_GNm.shape[1] % tile
    return pad(x_GNm, (0, 0, 0, short), value=fill).unflatten(1, (-1, tile))
