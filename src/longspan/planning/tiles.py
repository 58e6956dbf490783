"""Which tiles of a blocked kernel the key ranges of a plan touch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.integer[Any]]


def touched_tiles(lo: Rows, hi: Rows, block: int = 128) -> int:
    """Count the ``block x block`` tiles that hold at least one pair.

    Args:
        lo: first key row of each range, [n, m].
        hi: one past the last, [n, m]; empty ranges are ignored.
        block: rows of a query tile and of a key tile.

    Returns:
        The number of tiles. O(n m log(n m)) time, O(n m) memory.
    """
    query_tile = np.broadcast_to(np.arange(len(lo))[:, None] // block, lo.shape)
    used = lo < hi
    spans = np.stack([query_tile[used], lo[used] // block, (hi[used] - 1) // block], axis=1)
    if len(spans) == 0:
        return 0
    # Neighbouring rows mostly touch the same tiles: drop repeats before sorting what is left.
    spans = spans[np.append(True, (np.diff(spans, axis=0) != 0).any(axis=1))]
    spans = spans[np.lexsort((spans[:, 1], spans[:, 0]))]
    first, last = spans[:, 1], spans[:, 2]
    # One line of numbers for all query tiles, so that a running maximum starts anew in each of
    # them.
    offset = spans[:, 0].astype(np.int64) * (int(last.max()) + 2)
    reach = np.maximum.accumulate(offset + last + 1)
    before = np.append(0, reach[:-1])
    return int(np.maximum(0, reach - np.maximum(before, offset + first)).sum())
