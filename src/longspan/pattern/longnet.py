"""LongNet's dilated attention: several (segment, dilation) branches mixed by their denominators.

    branch (w, r)   i // w == j // w,  (i mod w) mod r = (j mod w) mod r = o_h
    LongNet         out_i = softmax_j(q_i . k_j scale + log c_ij) v_j,  c_ij branches hold ij
    LongNetSet      the same with c_ij cut to 1

    O(sum_b N w_b / r_b^2) pairs on the average head

Paper: LongNet (Ding et al. 2023, arXiv 2307.02486). Its mixture of branches by softmax
denominators is one softmax over a multiset: a key that two branches share counts twice.

How ours differs: gradients flow through the mixture (the popular implementation stops them in the
weights, so that query and key gradients are off by over 10 %); lengths need not divide; a query
that no branch selects (no branch with dilation 1) keeps itself instead of giving 0.

Causal dead zone: branches never cross their segments, so some pairs are never connected, at any
depth: the first token of every segment that starts a segment in all branches but the longest never
sees its predecessor. Add ``Window`` with ``Mixture`` where that matters.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from longspan.errors import PatternError
from longspan.pattern.algebra import (
    At,
    Atom,
    Mask,
    Pattern,
    Positions,
    Progression,
    flag,
    keep_whole,
)
from longspan.pattern.lattice import Residue


@dataclass(frozen=True, repr=False)
class LongNetBranch(Atom):
    """One branch: dilated queries and keys of one segment.

    Args:
        segment: tokens w in a segment; the last one may be shorter.
        dilation: r, at most ``segment``.
        causal: keys up to the query only (default).
        offsets: ``"paper"``: offset h mod r in head h; ``"torchscale"``: h // ceil(H / r), as in
            the authors' code.
    """

    segment: int
    dilation: int
    causal: bool = True
    offsets: str = "paper"
    name: ClassVar[str] = "longnet.branch"

    def __post_init__(self) -> None:
        keep_whole(self, "LongNet", "segment", 1)
        flag("LongNet", "causal", self.causal)
        if keep_whole(self, "LongNet", "dilation", 1) > self.segment:
            raise PatternError(
                f"LongNet: a dilation must not exceed its segment, got dilation {self.dilation} "
                f"with segment {self.segment}"
            )
        if self.offsets not in ("paper", "torchscale"):
            raise PatternError(
                f'LongNet: offsets must be "paper" or "torchscale", got {self.offsets!r}'
            )

    @property
    def is_causal(self) -> bool:
        return self.causal

    def head_class(self, at: At) -> Hashable:
        return self._offset(at)

    def _offset(self, at: At) -> int:
        if self.offsets == "paper":
            return at.head % self.dilation
        return at.head // -(-at.heads // self.dilation)

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        offset = self._offset(at)
        chosen = [(p % self.segment) % self.dilation == offset for p in (query, key)]
        met = chosen[0] & chosen[1] & (query // self.segment == key // self.segment)
        return met & (key <= query) if self.causal else met

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        offset = self._offset(at)
        start = query // self.segment * self.segment
        chosen = (query - start) % self.dilation == offset
        stop = np.where(chosen, query + 1 if self.causal else start + self.segment, start)
        return [(Residue.of(self.dilation, start + offset), [(start, stop)])]


@dataclass(frozen=True, repr=False)
class LongNetSet(Atom):
    """All branches, each pair once: not the published operator, which is ``LongNet``.

    Args:
        segments: tokens in a segment, for each branch.
        dilations: dilation of each branch; keep one that is 1.
        causal: keys up to the query only (default).
        offsets: see ``LongNetBranch``.
    """

    segments: tuple[int, ...]
    dilations: tuple[int, ...]
    causal: bool = True
    offsets: str = "paper"
    name: ClassVar[str] = "longnet_set"

    def __post_init__(self) -> None:
        for field in ("segments", "dilations"):
            value = getattr(self, field)
            if not isinstance(value, list | tuple) or not value:
                raise PatternError(f"LongNet: {field} must be a list of numbers, got {value!r}")
            object.__setattr__(self, field, tuple(value))
        if len(self.segments) != len(self.dilations):
            raise PatternError(
                f"LongNet: segments and dilations pair up, got {len(self.segments)} segments and "
                f"{len(self.dilations)} dilations"
            )
        parts = self.parts()
        object.__setattr__(self, "segments", tuple(part.segment for part in parts))
        object.__setattr__(self, "dilations", tuple(part.dilation for part in parts))

    @property
    def is_causal(self) -> bool:
        return self.causal

    def parts(self) -> tuple[LongNetBranch, ...]:
        """The branches."""
        pairs = zip(self.segments, self.dilations, strict=True)
        return tuple(LongNetBranch(w, r, self.causal, self.offsets) for w, r in pairs)

    def head_class(self, at: At) -> Hashable:
        return tuple(part.head_class(at) for part in self.parts())

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return np.logical_or.reduce([part.allows(query, key, at) for part in self.parts()])

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        return [form for part in self.parts() for form in part.progressions(query, at)]


@dataclass(frozen=True, repr=False)
class LongNet(LongNetSet):
    """LongNet as published: a key that several branches share counts as often.

    Operators work on sets of pairs: inside ``&``, ``|`` and ``-`` each pair counts once.
    """

    name: ClassVar[str] = "longnet"

    def counts(self, query: Positions, key: Positions, at: At) -> NDArray[np.int64]:
        return np.add.reduce([part.counts(query, key, at) for part in self.parts()])

    def branches(self) -> tuple[Pattern, ...]:
        return self.parts()
