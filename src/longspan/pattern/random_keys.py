"""Random keys: drawn once and for all by seed, head and query block.

    RandomBlocks   a query of block a sees r blocks of b tokens, without repetition   O(N r b)
    Random         the same with blocks of one token                                  O(N r)

Paper: BigBird (Zaheer et al. 2020, arXiv 2007.14062). The draw is a pure function of (seed, head,
block): no global generator is touched, and training, evaluation and decoding agree. Causal draws
are made among past blocks only and do not change when the sequence grows; two-sided draws are made
among all blocks of the sequence, so they follow its length.

How ours differs: Hugging Face's BigBird draws anew in every training step, and in evaluation
attends to its first block r more times instead.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from longspan.pattern.algebra import END, At, Atom, Interval, Mask, Positions, flag, keep_whole


@dataclass(frozen=True, repr=False)
class RandomBlocks(Atom):
    """Blocks drawn at random for each block of queries and each head.

    Args:
        size: tokens b in a block.
        count: blocks r that each query block sees; all eligible ones where there are fewer.
        seed: chooses the draw.
        apart: blocks nearer than this to the query's own are not drawn; 0 allows its own.
        skip: this many blocks at the start of the sequence, and at its end if two-sided, are not
            drawn.
        causal: draw among past blocks, and look back only (default).
    """

    size: int
    count: int
    seed: int = 0
    apart: int = 0
    skip: int = 0
    causal: bool = True
    name: ClassVar[str] = "random_blocks"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        keep_whole(self, owner, "size", 1)
        keep_whole(self, owner, "count", 1)
        for field in ("seed", "apart", "skip"):
            keep_whole(self, owner, field, 0)
        flag(owner, "causal", self.causal)

    @property
    def is_causal(self) -> bool:
        return self.causal

    @property
    def needs_length(self) -> bool:
        return not self.causal

    def head_class(self, at: At) -> Hashable:
        return at.head

    def _drawn(self, query: Positions, at: At) -> tuple[Any, Any]:
        """Blocks drawn for each query [count, ...], and which of them there are."""
        own = np.asarray(query) // self.size
        # Eligible blocks are [skip, stop) but for the hole around the query's own block.
        if self.causal:
            stop = own - self.apart + 1
            hole, after = stop, stop
        else:
            stop = np.asarray(-(-at.length // self.size)) - self.skip
            hole = np.clip(own - self.apart + 1, self.skip, np.maximum(stop, self.skip))
            after = np.clip(own + self.apart, hole, np.maximum(stop, hole))
        eligible = np.maximum(0, stop - self.skip - (after - hole))
        # No more turns than some query has blocks: the others would not be real.
        count = min(self.count, int(eligible.max(initial=0)))
        drawn = np.empty((count, *own.shape), np.int64)
        # Floyd's sampling: the t-th draw is from one more candidate, and a repetition becomes the
        # new candidate.
        for t in range(count):
            newest = np.maximum(eligible - count, 0) + t
            number = _mix(self.seed, at.head, own, t) % (newest + 1).astype(np.uint64)
            drawn[t] = number.astype(np.int64)
            drawn[t] = np.where((drawn[:t] == drawn[t]).any(axis=0), newest, drawn[t])
        block = drawn + self.skip
        real = np.arange(count).reshape(-1, *[1] * own.ndim) < eligible
        return np.where(block < hole, block, block + (after - hole)), real

    def _runs(self, query: Positions, at: At) -> tuple[Positions, Positions, At]:
        """Where neighbours that draw the same begin, how many they are, and what they draw at."""
        length = np.broadcast_to(at.length, query.shape)
        new = np.diff(query // self.size, prepend=-1) != 0
        begins = np.flatnonzero(new | (np.diff(length, prepend=-1) != 0))
        return begins, np.diff(begins, append=len(query)), replace(at, length=length[begins])

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        block, real = self._drawn(query, at)
        met = ((np.asarray(key) // self.size == block) & real).any(axis=0)
        return met & (key <= query) if self.causal else met

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        # Queries of a block draw the same: once for neighbours of one block.
        begins, times, at = self._runs(query, at)
        block, real = self._drawn(query[begins], at)
        block = np.where(real, block, END)
        # What no neighbour shares is put in order where all of it is.
        edges = (block, block + 1) if self.size == 1 else _side_by_side(block)
        lo, hi = (
            np.repeat(np.where(edge < END, edge * self.size, END), times, axis=1) for edge in edges
        )
        if self.causal:
            hi = np.minimum(hi, query + 1)
        return list(zip(lo, hi, strict=True))


@dataclass(frozen=True, repr=False, init=False)
class Random(RandomBlocks):
    """Single keys drawn at random for each query and head.

    Args:
        count: keys that each query sees.
        seed: chooses the draw.
        causal: draw among past tokens (default), the query included.
    """

    name: ClassVar[str] = "random"

    def __init__(self, count: int, seed: int = 0, causal: bool = True) -> None:
        super().__init__(1, count, seed, causal=causal)

    def __str__(self) -> str:
        words = [str(self.count), *([f"seed={self.seed}"] if self.seed else [])]
        return f"{self.name}({', '.join([*words, *([] if self.causal else ['causal=false'])])})"

    __repr__ = __str__


def _side_by_side(block: Positions) -> tuple[Positions, Positions]:
    """First and last + 1 of blocks that follow each other, in order; END for none."""
    block = np.sort(block, axis=0)
    follows = block[1:] == block[:-1] + 1
    first, last = block, block + 1
    first[1:][follows], last[:-1][follows] = END, END
    return np.sort(first, axis=0), np.sort(last, axis=0)


def _mix(seed: int, head: int, block: Positions, turn: int) -> Any:
    """64 scrambled bits for each block (splitmix64 of the four numbers)."""
    state = np.array(block, np.uint64)
    with np.errstate(over="ignore"):
        for number in (turn, head, seed):
            state += np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                state ^= state >> np.uint64(shift)
                state *= np.uint64(factor)
            state ^= state >> np.uint64(31)
    return state
