"""``coverage``: how much of a sequence a pattern sees, per head, with all heads, over the layers.

    p = ls.SCCA.flow(8)
    print(ls.coverage(p, 64, heads=8, layers=2))

Up to ``exact_up_to`` tokens every figure is exact, from the dense mask. Beyond, densities are
still exact, from the plan; reach is estimated from sampled queries and carries its standard error,
of what differs between neighbours and at the ends (see ``reach.share_and_error``).
Nothing of size N x N is built then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.analysis import reach as walk
from longspan.analysis.relation import Relation, keys_per_query
from longspan.errors import PlanError
from longspan.pattern.algebra import At, Mask, Pattern
from longspan.pattern.local import Dense
from longspan.pattern.text import parse
from longspan.planning import Plan, plan

# Shares of all queries and layers are kept; no model is deeper.
_MOST_LAYERS = 100_000


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What is reached after some layers.

    Attributes:
        layers: number of layers.
        share: share of the legal pairs (causal: keys up to the query), 0 to 1.
        error: standard error of ``share``; 0 if exact.
    """

    layers: int
    share: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a pattern covers; ``print`` it or take ``to_dict()``.

    Attributes:
        pattern: text form.
        n: tokens.
        heads: query heads.
        layers: layers that were looked at.
        causal: whether legal pairs are those with the key up to the query, or all.
        density: pairs of all heads and layers / (heads * layers * n * n).
        legal_density: the same, / legal pairs.
        keys_min: fewest keys that a query has in a head.
        keys_mean: mean over queries, heads and layers.
        keys_max: most keys.
        union: share of legal pairs that some head sees, mean over the layers.
        union_error: standard error of ``union``; 0 if exact.
        blind_rows: tokens after the first whose predecessor no head of any layer sees.
        reach: after 1, 2, ... layers.
        complete: layers after which every token has reached all that it may; None if ``layers``
            are not enough. Where reach is sampled: of the sampled queries and those at the ends.
        depth: layers until nothing new is reached; None where reach is sampled.
        never: legal pairs that no number of layers connects; None where reach is sampled.
        never_examples: a few of them, as (query, key).
        samples: sampled queries; 0 if everything is exact.
    """

    pattern: str
    n: int
    heads: int
    layers: int
    causal: bool
    density: float
    legal_density: float
    keys_min: int
    keys_mean: float
    keys_max: int
    union: float
    union_error: float
    blind_rows: int
    reach: tuple[Reach, ...]
    complete: int | None
    depth: int | None
    never: int | None
    never_examples: tuple[tuple[int, int], ...]
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        found = {**vars(self), "reach": [dict(vars(one)) for one in self.reach]}
        return {**found, "never_examples": [list(pair) for pair in self.never_examples]}

    def __str__(self) -> str:
        legal = "causal pairs" if self.causal else "all pairs"
        heads = f"{self.heads} head" + "s" * (self.heads > 1)
        lines = [
            f"coverage of {self.pattern}",
            f"  {self.n:,} tokens, {heads}, {'causal' if self.causal else 'both directions'}",
            f"  each head    {self.legal_density:.2%} of {legal}; keys per query "
            f"{self.keys_min:,} to {self.keys_max:,}, mean {self.keys_mean:,.1f}",
            f"  all heads    {_share(self.union, self.union_error)} of {legal} in one layer",
        ]
        for one in self.reach:
            name = "reach" if one.layers == 1 else ""
            share = _share(one.share, one.error)
            lines.append(f"  {name:<12} {share} after {_layers(one.layers)}")
        if self.samples:
            lines.append(f"  {'':<12} (from {self.samples} sampled queries)")
        elif self.never:
            query, key = self.never_examples[0]
            lines.append(
                f"  {'never':<12} {self.never:,} pairs, such as token {query} to {key}; "
                f"nothing new after {_layers(self.depth)}"
            )
        else:
            lines.append(f"  {'complete':<12} after {_layers(self.depth)}")
        blind = (
            "seen by every token"
            if self.blind_rows == 0
            else f"not seen by {self.blind_rows:,} tokens"
        )
        lines.append(f"  predecessor  {blind}")
        return "\n".join(lines)


def coverage(
    pattern: Pattern | str,
    n: int,
    *,
    heads: int = 1,
    layers: int = 4,
    exact_up_to: int = 1024,
    samples: int = 256,
    seed: int = 0,
) -> Coverage:
    """Measure what a pattern covers.

    Args:
        pattern: where each query may look: a pattern or its text form.
        n: tokens.
        heads: query heads.
        layers: layers to follow.
        exact_up_to: largest n for dense masks, O(heads n^2) memory and O(layers n^3) time.
        samples: queries to follow for larger n, two for each of equal parts of the sequence.
        seed: of the sampled queries.

    Raises:
        PatternError: if the pattern does not parse or does not fit the number of heads.
        PlanError: if a number is too small.
    """
    for name, value, least in (
        ("layers", layers, 1),
        ("samples", samples, 2),
        ("seed", seed, 0),
        ("exact_up_to", exact_up_to, 0),
    ):
        number = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not number or value < least:
            raise PlanError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if layers > _MOST_LAYERS:
        raise PlanError(
            f"layers must be at most {_MOST_LAYERS:,}, got {layers:,}: what is reached after each "
            "of them is kept"
        )
    if not isinstance(pattern, Pattern):
        pattern = parse(pattern)
    plans = _plans(pattern, n, heads, layers)
    # Numbers of numpy are no JSON.
    n, heads, layers = int(n), int(heads), int(layers)
    causal = all(one.pattern.is_causal for one in plans)
    if n <= exact_up_to:
        return _exact(pattern, n, heads, layers, causal)
    return _sampled(pattern, plans, layers, causal, samples, seed)


def _plans(pattern: Pattern, n: int, heads: int, layers: int) -> list[Plan]:
    """One plan for each layer of a period, in which each pair counts once."""
    found = []
    for layer in range(min(layers, walk.period(pattern))):
        own = pattern.at_layer(layer)
        # A mixture counts pairs of several parts as often; meeting everything makes it a set.
        found.append(plan(own if len(own.branches()) == 1 else own & Dense(), n, heads))
    return found


def _exact(pattern: Pattern, n: int, heads: int, layers: int, causal: bool) -> Coverage:
    masks = [pattern.mask(n, heads, layer) for layer in range(walk.period(pattern))]
    unions = [np.logical_or.reduce(mask) for mask in masks]
    used = [layer % len(masks) for layer in range(layers)]
    counts = [mask.sum(axis=-1) for mask in masks[:layers]]
    pairs = [int(count.sum()) for count in counts]
    mean = sum(pairs[at] for at in used) / (layers * heads * n)
    legal: Mask = np.tri(n, dtype=bool) if causal else np.ones((n, n), bool)
    all_legal = int(np.count_nonzero(legal))
    sizes: list[int] = []
    reached = unions[0]
    for mask in walk.reach_exact(unions, layers):
        sizes.append(sizes[-1] if mask is reached else int(np.count_nonzero(mask)))
        reached = mask
    if layers > len(unions) and sizes[-1] == sizes[-1 - len(unions)]:
        # A whole period added nothing. Tokens that see themselves alone need no layer.
        whole, depth = reached, sizes.index(sizes[-1]) + (sizes[-1] > n)
    else:
        whole, depth = walk.closure(unions)
    never = np.argwhere(legal & ~whole)
    together = np.logical_or.reduce(unions[:layers])
    union = [int(np.count_nonzero(one)) for one in unions]
    return Coverage(
        pattern=str(pattern),
        n=n,
        heads=heads,
        layers=layers,
        causal=causal,
        density=mean / n,
        legal_density=mean * n / all_legal,
        keys_min=min(int(count.min()) for count in counts),
        keys_mean=mean,
        keys_max=max(int(count.max()) for count in counts),
        union=sum(union[at] for at in used) / (layers * all_legal),
        union_error=0.0,
        blind_rows=int((~np.diagonal(together, -1)).sum()),
        reach=tuple(
            Reach(layers=at, share=size / all_legal, error=0.0)
            for at, size in enumerate(sizes, start=1)
        ),
        complete=_first([size == all_legal for size in sizes]),
        depth=depth,
        never=len(never),
        never_examples=tuple((int(i), int(j)) for i, j in never[:5]),
        samples=0,
    )


def _sampled(
    pattern: Pattern, plans: list[Plan], layers: int, causal: bool, samples: int, seed: int
) -> Coverage:
    n, heads = plans[0].n, plans[0].heads
    relations = [Relation(one) for one in plans]
    legal = n * (n + 1) // 2 if causal else n * n
    used = [at % len(plans) for at in range(layers)]
    counts = [keys_per_query(one) for one in plans]
    mean = float(np.mean([counts[at].mean() for at in used]))
    rows = walk.sampled_rows(n, samples, seed)
    allowed = rows + 1 if causal else np.full_like(rows, n)
    reached = np.empty((len(rows), layers))
    alone = np.empty((len(rows), len(plans)))
    for index, row in enumerate(rows.tolist()):
        reached[index] = _sizes(walk.reach_of_row(relations, row, layers))
        alone[index] = [one.keys(np.arange(n) == row).sum() for one in relations]
    # Of the ends, too: what lies farthest away is seldom among the samples.
    whole = (reached == allowed[:, None]).all(axis=0)
    in_one_layer = alone[:, used].mean(axis=1)
    union, union_error = walk.share_and_error(in_one_layer, allowed, legal / n)
    reach = []
    for at in range(layers):
        share, error = walk.share_and_error(reached[:, at], allowed, legal / n)
        reach.append(Reach(layers=at + 1, share=share, error=error))
    return Coverage(
        pattern=str(pattern),
        n=n,
        heads=heads,
        layers=layers,
        causal=causal,
        density=mean / n,
        legal_density=mean * n / legal,
        keys_min=min(int(count.min()) for count in counts),
        keys_mean=mean,
        keys_max=max(int(count.max()) for count in counts),
        union=union,
        union_error=union_error,
        blind_rows=_blind_rows(plans),
        reach=tuple(reach),
        complete=_first(whole.tolist()),
        depth=None,
        never=None,
        never_examples=(),
        samples=len(rows) - 2,
    )


def _sizes(masks: list[Mask]) -> NDArray[np.int64]:
    """Number of flags that are set in each; what is there many times is counted once."""
    alone = {id(mask): mask for mask in masks}
    sizes = {name: np.count_nonzero(mask) for name, mask in alone.items()}
    return np.array([sizes[id(mask)] for mask in masks])


def _first(flags: list[bool]) -> int | None:
    """Number, from 1, of the first flag that is set."""
    return flags.index(True) + 1 if True in flags else None


def _blind_rows(plans: list[Plan]) -> int:
    """Queries after the first whose predecessor no head of any layer sees."""
    query = np.arange(1, plans[0].n)
    seen = np.zeros(len(query), bool)
    for one in plans:
        for head in range(one.heads):
            at = At(head=head, heads=one.heads, length=one.n)
            seen |= one.pattern.allows(query, query - 1, at)
    return int((~seen).sum())


def _share(share: float, error: float) -> str:
    return f"{share:.2%} +- {error:.2%}" if error else f"{share:.2%}"


def _layers(count: int | None) -> str:
    return f"{count} layer" + "s" * (count != 1)
