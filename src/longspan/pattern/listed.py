"""Closed forms of listed positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longspan.pattern.algebra import Positions, Progression
from longspan.pattern.lattice import EVERY, Listed

# Lists of up to this many stretches stay in the keys' own order; others are gathered.
_FEW = 2


def stretches(positions: Sequence[int], lo: Positions, hi: Positions) -> list[Progression]:
    """Listed positions in ``[lo, hi)``, as intervals if they form few stretches.

    Args:
        positions: rising, without repetition.
        lo: first position that each query may see [n].
        hi: one past the last [n].
    """
    listed = np.asarray(positions, np.int64)
    if len(listed) == 0:
        return []
    gaps = np.flatnonzero(np.diff(listed) > 1)
    if len(gaps) >= _FEW:
        return [(Listed(listed), [(lo, hi)])]
    starts = listed[np.append(0, gaps + 1)]
    stops = listed[np.append(gaps, len(listed) - 1)] + 1
    runs = zip(starts, stops, strict=True)
    return [(EVERY, [(np.maximum(lo, a), np.minimum(hi, b)) for a, b in runs])]
