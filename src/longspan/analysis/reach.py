"""Who reaches whom over the layers.

Token j reaches token i after L layers if a chain of L steps leads from i back to j, each step
inside some head's pattern of its layer, or staying in place (the residual stream):

    P_L = (A_L + I) (A_{L-1} + I) ... (A_1 + I)     over booleans, A_l = union over the heads

Exact for small n: a layer costs O(pairs n / 8) where queries see few keys, and a matrix product,
O(n^3), where they see many. For large n rows of P_L are sampled: start at one query and walk the
layers backwards, O(N m) for each row, layer and layer of a period. The products only grow, so
that a period of layers which adds nothing is the last one that is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from longspan.analysis.relation import Relation
from longspan.pattern.algebra import Mask, Pattern

# Mean keys of a query up to which rows are joined one by one instead of by a matrix product.
# Samples below which shares are estimated in proportion to the legal keys.
_FEW_SAMPLES = 8
_FEW = 64


def period(pattern: Pattern, limit: int = 64) -> int:
    """After how many layers the pattern repeats; ``limit`` if it does not before."""
    first = [pattern.at_layer(layer) for layer in range(2 * limit)]
    for step in range(1, limit):
        if all(a == b for a, b in zip(first[step:], first, strict=False)):
            return step
    return limit


def reach_exact(unions: Sequence[Mask], layers: int) -> Iterator[Mask]:
    """P_1 ... P_layers as dense masks; one and the same where a layer adds nothing.

    Args:
        unions: pairs of each layer of one period, [n, n] each.
        layers: number of layers.
    """
    steps = [_Step(_with_self(union)) for union in unions]
    reached, idle = steps[0].sees, 0
    yield reached
    for layer in range(1, layers):
        if idle < len(steps):
            further = steps[layer % len(steps)].times(reached)
            same = np.array_equal(further, reached)
            reached, idle = (reached, idle + 1) if same else (further, 0)
        yield reached


def closure(unions: Sequence[Mask]) -> tuple[Mask, int]:
    """What is reached after any number of layers, and how many layers that takes.

    The products only grow, so the number of layers is found by doubling and halving: O(log L)
    products instead of L.
    """
    steps = [_with_self(union) for union in unions]
    one = steps[0]
    for step in steps[1:]:
        one = _times(step, one)
    powers = [one]
    while not np.array_equal(twice := _times(powers[-1], powers[-1]), powers[-1]):
        powers.append(twice)
    whole = powers[-1]
    reached, periods = np.eye(len(whole), dtype=bool), 0
    for exponent in reversed(range(len(powers))):
        further = _times(powers[exponent], reached)
        if not np.array_equal(further, whole):
            reached, periods = further, periods + 2**exponent
    depth = periods * len(steps)
    for step in steps:
        if np.array_equal(reached, whole):
            break
        reached, depth = _times(step, reached), depth + 1
    return whole, depth


def reach_of_row(relations: Sequence[Relation], row: int, layers: int) -> list[Mask]:
    """Row ``row`` of P_1 ... P_layers, as flags [n] each; equal ones are often the same."""
    period = len(relations)
    start = np.arange(relations[0].n) == row
    found = [start] * layers
    # A walk from a layer begins as all those do that begin whole periods above it.
    for top in range(min(period, layers)):
        seen, idle = start, 0
        followed = [np.zeros_like(start)] * period
        for step in range(top + 1 + (layers - 1 - top) // period * period):
            if idle < period:
                layer = (top - step) % period
                # What the layer was asked before has been followed before.
                new = relations[layer].keys(seen & ~followed[layer]) & ~seen
                followed[layer] = seen
                seen, idle = (seen | new, 0) if new.any() else (seen, idle + 1)
            if step % period == top:
                found[step] = seen
    return found


def sampled_rows(n: int, samples: int, seed: int) -> NDArray[np.int64]:
    """The first row, random ones, two from each of equal stretches in their order, the last one.

    Returns:
        Rows [samples // 2 * 2 + 2].
    """
    stretches = samples // 2
    draws = np.random.default_rng(seed).random((stretches, 2))
    rows = ((np.arange(stretches)[:, None] + draws) / stretches * n).astype(np.int64)
    return np.concatenate([[0], rows.ravel(), [n - 1]])


def share_and_error(
    reached: NDArray[np.float64], allowed: NDArray[np.int64], mean: float
) -> tuple[float, float]:
    """Share of the legal pairs that are reached, and its standard error: a regression estimate.

    Keys that are reached are nearly as many for most rows (a window), or grow with the row
    (strided keys): what a line over the legal keys of a row leaves is small either way. Shares of
    rows would change most where there are fewest samples, in the first rows.

    The error is that of two rows of a stretch. In the first and the last stretch it is that of the
    end, too: often nothing else changes, as in a window, and two rows would be alike by chance.
    It does not know of a jump elsewhere that no two rows of a stretch lie around, as between two
    chunks that are much longer than a stretch: there it may be 0 for a share that is off by up to
    half a stretch times the jump.

    Args:
        reached: keys that rows of ``sampled_rows`` reach.
        allowed: keys that they may see.
        mean: keys that a row may see, over all rows.
    """
    count, keys, seen = len(reached) - 2, allowed[1:-1], reached[1:-1]
    off = keys - keys.mean()
    spread = float((off**2).sum())
    if count < _FEW_SAMPLES:
        # A line through nothing: that through few points may be any.
        slope = float(seen.sum() / keys.sum())
    else:
        slope = float((off * seen).sum()) / spread if spread else 0.0
    level = reached - slope * (allowed - mean)
    share = min(max(float(level[1:-1].mean()) / mean, 0.0), 1.0)
    pairs = level[1:-1].reshape(-1, 2)
    gaps = abs(pairs[:, 0] - pairs[:, 1])
    for at in (0, -1):
        gaps[at] = max(gaps[at], *abs(pairs[at] - level[at]))
    error = float((gaps**2).sum() ** 0.5) / (count * mean)
    # What rounding leaves is no error.
    return share, error if error > 1e-12 else 0.0


class _Step:
    """A layer, as what it makes of what was reached below it."""

    def __init__(self, sees: Mask) -> None:
        self.sees = sees
        self._key = None
        if np.count_nonzero(sees) <= _FEW * len(sees):
            query, self._key = sees.nonzero()
            # Every query sees itself, so that none is left out.
            self._begin = np.flatnonzero(np.diff(query, prepend=-1))

    def times(self, reached: Mask) -> Mask:
        """The product with a mask [n, n]."""
        if self._key is None:
            return _times(self.sees, reached)
        bits = np.packbits(reached, axis=1)[self._key]
        found = np.bitwise_or.reduceat(bits, self._begin, axis=0)
        return np.unpackbits(found, axis=1, count=len(reached)).view(bool)


def _with_self(union: Mask) -> Mask:
    return union | np.eye(len(union), dtype=bool)


def _times(a: Mask, b: Mask) -> Mask:
    return (a.astype(np.float32) @ b.astype(np.float32)) > 0.5
