"""What context parallel attention moves, before it does: rows, bytes, and the work of each rank.

    rank 1 asks rank 0 for the rows that its queries see there; forward they come, with backward as
    many gradients go.

Counted from the plan, without processes, tensors or torch: the same lists that rows are sent by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longspan.errors import InputError, PatternError
from longspan.parallel.needs import Places, seen_keys
from longspan.parallel.shards import Shards, shards_of
from longspan.pattern import Pattern, parse


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """What each rank gets from each other in one forward call of one layer, per batch row.

    Attributes:
        pattern: where queries look.
        shards: which rows lie where.
        key_heads: number of key heads.
        rows: int64 [ranks, ranks], how many rows of rank s some head of rank r sees.
        vectors: int64 [ranks, ranks], how many keys move from s to r, each head's counted; as many
            values beside them; 0 on the diagonal.
        pairs: int64 [ranks], query-key pairs that each rank computes, summed over heads.
    """

    pattern: Pattern
    shards: Shards
    key_heads: int
    rows: NDArray[np.int64]
    vectors: NDArray[np.int64]
    pairs: NDArray[np.int64]

    @property
    def received(self) -> NDArray[np.int64]:
        """Rows of others that each rank gets [ranks]; a row counts once, whatever its heads."""
        return self.rows.sum(axis=1) - self.rows.diagonal()

    @property
    def peers(self) -> NDArray[np.int64]:
        """From how many others each rank gets any [ranks]."""
        return (self.vectors > 0).sum(axis=1)

    @property
    def share(self) -> float:
        """What moves, as a share of what moves if all ranks get all keys of all others."""
        whole = self.key_heads * self.shards.n * (self.shards.ranks - 1)
        return float(self.vectors.sum() / whole) if whole else 0.0

    @property
    def balance(self) -> float:
        """Pairs of the busiest rank over those of the mean rank: 1 if all work alike."""
        return float(self.pairs.max() / self.pairs.mean()) if self.pairs.any() else 1.0

    def nbytes(self, head_dim: int = 128, itemsize: int = 2) -> NDArray[np.int64]:
        """Bytes of keys and values that each rank gets [ranks]; with backward twice that."""
        return 2 * head_dim * itemsize * self.vectors.sum(axis=1)

    def __str__(self) -> str:
        """A line for each rank."""
        lines = [
            f"{self.pattern}: {self.shards.n:,} rows on {self.shards.ranks} ranks, "
            f"{self.key_heads} key heads",
            f"  moved    {self.share:.2%} of what all keys to all ranks would be",
            f"  balance  the busiest rank computes {self.balance:.2f} times the mean",
        ]
        size = self.nbytes()
        for rank, runs in enumerate(self.shards.runs):
            own = ", ".join(f"{a:,}-{b:,}" for a, b in runs if a < b) or "no rows"
            from_whom = ", ".join(
                f"{count:,} from {other}"
                for other, count in enumerate(self.rows[rank].tolist())
                if count and other != rank
            )
            lines.append(
                f"  rank {rank}   has {own}; gets {self.received[rank]:,} rows"
                + (f" ({from_whom}), {size[rank] / 2**20:,.1f} MiB" if from_whom else "")
                + f"; {self.pairs[rank]:,} pairs"
            )
        lines.append("  MiB of keys and values per batch row, head width 128, 2 bytes a number")
        return "\n".join(lines)


def explain(
    pattern: Pattern | str,
    n: int,
    ranks: int,
    *,
    heads: int = 1,
    key_heads: int | None = None,
    shards: Shards | str = "even",
    layer: int = 0,
    positions: ArrayLike | None = None,
    segments: ArrayLike | None = None,
) -> Traffic:
    """What ``longspan.parallel.attend`` would move, and how evenly ranks would work.

    Args:
        pattern: a pattern or its text form.
        n: rows of the whole sequence.
        ranks: number of ranks.
        heads: query heads.
        key_heads: key heads; default ``heads``.
        shards: ``"even"``, ``"zigzag"`` or ``Shards``.
        layer: for patterns that differ between layers.
        positions: as for ``attend``; of batch rows that differ, the mean is counted.
        segments: the same.

    Raises:
        InputError: if sizes or shards do not fit.
        PatternError: if the pattern does not parse or does not fit the heads.
        PlanError: if positions or segments do not fit.
    """
    if isinstance(pattern, str):
        pattern = parse(pattern)
    if not isinstance(pattern, Pattern):
        raise PatternError(f"expected a pattern or its text form, got {type(pattern).__name__}")
    lie = shards_of(shards, n, ranks)
    key_heads = heads if key_heads is None else key_heads
    for name, value in (("heads", heads), ("key_heads", key_heads)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a whole number from 1, got {value!r}")
    if heads % key_heads:
        raise InputError(f"the key heads must divide the query heads; got {key_heads}, {heads}")
    own = pattern.at_layer(layer)
    own.require(heads)
    places = Places(n, positions, segments)
    batch = len(places.segment_BN)
    rows, vectors = np.zeros((2, ranks, ranks), np.int64)
    pairs = np.zeros(ranks, np.int64)
    for rank in range(ranks):
        seen, pairs[rank] = seen_keys(own, lie, rank, heads, key_heads, places)
        for other in range(ranks):
            theirs = seen[:, :, lie.rows(other)]
            rows[rank, other] = theirs.any(axis=1).sum() // batch
            vectors[rank, other] = 0 if other == rank else theirs.sum() // batch
    return Traffic(
        pattern=own, shards=lie, key_heads=key_heads, rows=rows, vectors=vectors, pairs=pairs
    )
