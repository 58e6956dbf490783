"""Which keys a pattern makes each rank ask for, and of whom.

The plan of a rank's queries over all keys says which keys they see, per key head. What is not seen
is not asked for. Every rank works out the needs of all of them from the pattern alone, so that
both ends of a message agree on its rows without a word. O(N m) time for m ranges per query, as one
plan of the whole sequence; O(N) memory, kept for the next call.

Axes: B batch, H query heads, K key heads, N rows of the whole sequence, P rows of a rank, U rows
of all ranks that a rank uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longspan.parallel.shards import Shards
from longspan.pattern import Pattern
from longspan.pattern.algebra import Positions
from longspan.planning import Pass, Plan, plan
from longspan.planning.layout import layouts
from longspan.planning.trim import times_seen

Seen = NDArray[np.bool_]
Index = NDArray[np.int64]


class Places:
    """Positions and segments of all rows; equal ones are one key of a cache.

    Args:
        n: rows N.
        positions: [N] or [B, N], or None: counted inside each segment.
        segments: [N] or [B, N], or None: one segment.

    Raises:
        PlanError: if they do not fit.
    """

    def __init__(
        self, n: int, positions: ArrayLike | None = None, segments: ArrayLike | None = None
    ) -> None:
        found = layouts(n, n, positions, segments)
        self.position_BN = np.stack([one.key_position for one in found])
        self.segment_BN = np.stack([one.key_segment for one in found])
        self._name = (self.position_BN.tobytes(), self.segment_BN.tobytes())
        self._hash = hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and self._name == other._name

    def __hash__(self) -> int:
        return self._hash

    def plan(
        self,
        pattern: Pattern,
        heads: int,
        rows: Positions,
        keys: Positions | slice = slice(None),
    ) -> Plan:
        """The plan of some rows as queries over some, or all, as keys."""
        key_positions = self.position_BN[:, keys]
        return plan(
            pattern,
            len(rows),
            heads,
            keys=key_positions.shape[1],
            positions=self.position_BN[:, rows],
            segments=self.segment_BN[:, rows],
            key_positions=key_positions,
            key_segments=self.segment_BN[:, keys],
        )

    def last_rows(self) -> Positions:
        """The last row of each segment: it tells patterns how long the segment is."""
        found = []
        for segment in self.segment_BN:
            rows = np.flatnonzero(segment >= 0)
            ends = np.diff(segment[rows], append=-1) != 0
            found.append(rows[ends])
        return np.unique(np.concatenate(found))


def seen_keys(
    pattern: Pattern, shards: Shards, rank: int, heads: int, key_heads: int, places: Places
) -> tuple[Seen, int]:
    """The keys that a rank's queries see [B or 1, K, N], and the number of pairs per batch row."""
    batch, n, rows = len(places.segment_BN), shards.n, shards.rows(rank)
    seen = np.zeros((batch, key_heads, n), bool)
    if len(rows) == 0:
        return seen, 0
    laid = places.plan(pattern, heads, rows)
    for one in laid.passes:
        for b in range(batch):
            _mark(one, b, heads // key_heads, seen[b])
    return seen, laid.pairs


def _mark(one: Pass, b: int, share: int, seen_KN: Seen) -> None:
    """Mark the keys that one batch row of a pass sees, for each key head."""
    key = one.keys(b, seen_KN.shape[1])
    lo, hi = one.lo[b % len(one.lo)], one.hi[b % len(one.hi)]
    for c in range(len(lo)):
        rows = key[times_seen(lo[c], hi[c], len(key)) > 0]
        for k in {h // share for h, own in enumerate(one.head_class) if own == c}:
            seen_KN[k, rows[rows >= 0]] = True


@dataclass(frozen=True, eq=False)
class Route:
    """What one rank keeps, sends and gets, and the plan of its queries over what it then has.

    Indices are into rows laid out flat: ``(b K + head) P + row`` in the rank's own keys, ``(b K +
    head) U + row`` in what it uses; b is 0 where all batch rows are alike.

    Attributes:
        plan: of the rank's queries over the U rows that it uses; None without queries.
        batch: batch rows that differ; 1 if all are alike.
        used: number of rows U of all ranks together, at least 1.
        own: number of its own rows P.
        key_heads: number of key heads K.
        kept: where keys of its own that it uses lie, and where they go.
        send: for each rank, where the keys that it asks for lie.
        get: for each rank, where the keys go that it sends.
    """

    plan: Plan | None
    batch: int
    used: int
    own: int
    key_heads: int
    kept: tuple[Index, Index]
    send: tuple[Index, ...]
    get: tuple[Index, ...]


@lru_cache(maxsize=16)
def route_of(
    pattern: Pattern, shards: Shards, rank: int, heads: int, key_heads: int, places: Places
) -> Route:
    """The route of one rank; kept, as a training loop asks for the same in every layer and step.

    Args:
        pattern: of one layer.
        shards: which rows lie where.
        rank: whose route.
        heads: query heads H.
        key_heads: key heads K.
        places: where all rows stand.

    Raises:
        PatternError: if the pattern does not fit the heads, or cannot be planned.
    """
    pattern.require(heads)
    seen, _ = seen_keys(pattern, shards, rank, heads, key_heads, places)
    using: Seen = np.asarray(seen.any(axis=(0, 1)))
    if pattern.needs_length:
        using[places.last_rows()] = True
    if not using.any():
        # Kernels take no empty rows; nobody sees this one.
        using[0] = True
    used, mine = np.flatnonzero(using), shards.rows(rank)
    place = np.cumsum(using) - 1
    send, get = [], []
    for other in range(shards.ranks):
        theirs = shards.rows(other)
        asked = seen
        if other != rank:
            asked, _ = seen_keys(pattern, shards, other, heads, key_heads, places)
        send.append(np.flatnonzero(asked[:, :, mine]))
        b, head, row = np.nonzero(seen[:, :, theirs])
        get.append((b * key_heads + head) * len(used) + place[theirs[row]])
    kept = send[rank], get[rank]
    send[rank] = get[rank] = np.zeros(0, np.int64)
    return Route(
        plan=places.plan(pattern, heads, mine, used) if len(mine) else None,
        batch=len(seen),
        used=len(used),
        own=len(mine),
        key_heads=key_heads,
        kept=kept,
        send=tuple(send),
        get=tuple(get),
    )
