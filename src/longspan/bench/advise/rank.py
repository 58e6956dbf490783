"""The order of candidates: who is beaten by whom, then what was preferred. No score is made up.

a beats b   if a sees no less than b, in one layer and nearby, and
            sees more and is no slower, or is faster; times within SLACK count as equal
front 1     those that nothing beats; front 2: those that only front 1 beats; and so on
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.bench.advise.facts import Facts

# Times closer than this share are equal: clocks are not better.
SLACK = 0.05


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What ranking looks at.

    Attributes:
        text: of the pattern.
        facts: what it sees.
        time: of dense attention's; None where nothing was timed.
    """

    text: str
    facts: Facts
    time: float | None

    @property
    def sight(self) -> tuple[float, float]:
        """Shares of what one layer sees, and of what is near; to a thousandth."""
        return round(self.facts.one_layer, 3), round(self.facts.near, 3)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a candidate stands.

    Attributes:
        front: from 1.
        beaten_by: text of the best candidate that beats it; None on front 1.
    """

    front: int
    beaten_by: str | None


def beats(a: Standing, b: Standing) -> bool:
    """Whether ``a`` is at least as good in everything and better in something."""
    one, other = _cost(a), _cost(b)
    if any(x < y for x, y in zip(a.sight, b.sight, strict=True)):
        return False
    if a.sight != b.sight:
        return one <= other * (1 + SLACK)
    return one * (1 + SLACK) < other


def ranked(standings: Sequence[Standing], prefer: str) -> list[tuple[Standing, Place]]:
    """Best first: by fronts, and inside a front by what is preferred.

    Args:
        standings: all candidates, dense attention among them.
        prefer: ``sight``: fewest layers until every token has reached all, most reached, most of
            what is near, least time; ``time``: least time first.
    """
    left = sorted(standings, key=lambda one: _key(one, prefer))
    found: list[tuple[Standing, Place]] = []
    front = 0
    while left:
        front += 1
        now = [one for one in left if not any(beats(other, one) for other in left)]
        for one in now:
            by = next((other.text for other, _ in found if beats(other, one)), None)
            found.append((one, Place(front=front, beaten_by=by)))
        left = [one for one in left if one not in now]
    return found


def _key(one: Standing, prefer: str) -> tuple[float, ...]:
    known = one.facts
    complete = math.inf if known.complete is None else known.complete
    sight = (complete, -round(known.reached, 3), -round(known.near, 3))
    return (_cost(one), *sight) if prefer == "time" else (*sight, _cost(one))


def _cost(one: Standing) -> float:
    """Time, or where nothing was timed what it mostly depends on."""
    return one.facts.keys if one.time is None else one.time
