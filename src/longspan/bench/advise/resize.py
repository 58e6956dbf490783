"""Find the size of a candidate that takes a share of dense attention's time, by measured sizes.

Time is nearly proportional to the keys, so the next size follows from the last one; between one
that fits and one that does not, it is their geometric mean.
"""

from __future__ import annotations

import math
from typing import Any

# A size whose time lies between this part of the share and the share is good enough.
ENOUGH = 0.75
# A measured time may be off: no step is larger than this.
_STEP = 2.0


class Sought:
    """The search of one family.

    Args:
        share: of dense attention's time, at most.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.fits: dict[str, Any] | None = None
        self.missed: dict[str, Any] | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """The largest entry that fits; without one, the smallest that does not."""
        return self.fits or self.missed

    def wanted(self, entry: dict[str, Any]) -> float | None:
        """Keys of the next size to measure, after an entry was measured; None to stop.

        Args:
            entry: with ``keys`` and ``of_dense_time``.
        """
        keys, taken = entry["keys"], entry["of_dense_time"]
        if taken is None:
            self.missed = self.missed or entry
            return None
        if taken <= self.share:
            if self.fits is None or keys > self.fits["keys"]:
                self.fits = entry
            if taken >= ENOUGH * self.share:
                return None
        elif self.missed is None or keys < self.missed["keys"]:
            self.missed = entry
        factor = min(_STEP, max(1 / _STEP, 0.95 * self.share / taken))
        if self.fits is None or self.missed is None:
            return keys * factor
        low, high = self.fits["keys"], self.missed["keys"]
        return math.sqrt(low * high) if high > 1.1 * low else None
