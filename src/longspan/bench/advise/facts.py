"""What a candidate sees and costs, computed from the pattern and its plans; no clock is needed.

Everything is exact but for shares of pairs beyond 1,024 tokens, which come from sampled queries.
The samples are the same for all candidates of one length, so that they compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.analysis import coverage, kept_tokens
from longspan.bench.advise.candidates import layers_of, mean_keys
from longspan.bench.compare_reach import growth
from longspan.pattern import At, Pattern
from longspan.pattern.algebra import Positions

# Keys that count as near.
NEAR = 32
# Queries whose sight is followed beyond 1,024 tokens.
SAMPLES = 32


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a candidate before it is timed.

    Attributes:
        keys: mean keys per query, head and layer.
        keys_max: most keys of a query.
        one_layer: share of the legal keys that some head sees, mean over queries and layers.
        near: share of the ``NEAR`` nearest legal keys that a head sees, mean over heads.
        reached: share of the legal keys that are connected through all layers.
        complete: layers after which every token has reached all that it may; None if those of
            the model are not enough.
        blind: tokens whose predecessor no head of any layer sees.
        drop_in: whether every head of every layer sees each token's predecessor and the first
            token: what heads of pretrained models use most. Needed to do without fine-tuning;
            not enough to be sure of it.
        growth: exponent of the pairs, between half the length and the length.
        cache_tokens: tokens that decoding keeps before its last token, mean over key heads and
            layers; None if two-sided.
        samples: queries that shares were estimated from; 0 if they are exact.
    """

    keys: float
    keys_max: int
    one_layer: float
    near: float
    reached: float
    complete: int | None
    blind: int
    drop_in: bool
    growth: float | None
    cache_tokens: float | None
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def facts(
    pattern: Pattern, n: int, heads: int, kv_heads: int, layers: int, keys: float | None = None
) -> Facts:
    """Compute them.

    Args:
        pattern: where each query may look.
        n: tokens.
        heads: query heads.
        kv_heads: key heads, which divide them.
        layers: of the model.
        keys: mean keys per query, head and layer, where that is known.
    """
    seen = coverage(pattern, n, heads=heads, layers=layers, samples=SAMPLES)
    keys = mean_keys(pattern, n, heads) if keys is None else keys
    half = n // 2
    sizes = [(half, mean_keys(pattern, half, heads) * half), (n, keys * n)]
    return Facts(
        keys=keys,
        keys_max=seen.keys_max,
        one_layer=seen.union,
        near=_near(pattern, n, heads, seen.causal),
        reached=seen.reach[-1].share,
        complete=seen.complete,
        blind=seen.blind_rows,
        drop_in=_every_head_sees_what_models_use(pattern, n, heads),
        growth=growth([(at, size) for at, size in sizes if at > 1]),
        cache_tokens=kept_tokens(pattern, n - 1, heads, kv_heads) if seen.causal else None,
        samples=seen.samples,
    )


def _heads(pattern: Pattern, n: int, heads: int) -> list[tuple[At, int]]:
    """One head of each class, and how many there are of it."""
    found: dict[Any, tuple[At, int]] = {}
    for head in range(heads):
        at = At(head=head, heads=heads, length=n)
        own = pattern.head_class(at)
        found[own] = (at, found[own][1] + 1) if own in found else (at, 1)
    return list(found.values())


def _near(pattern: Pattern, n: int, heads: int, causal: bool) -> float:
    # At random places: regular ones would meet every chunk at the same place.
    rows: Positions = np.sort(np.random.default_rng(0).integers(0, n, size=min(n, 512)))
    apart = np.arange(NEAR) if causal else np.arange(NEAR) - NEAR // 2
    query, key = rows[:, None], rows[:, None] - apart
    legal = (key >= 0) & (key < n)
    key = key.clip(0, n - 1)
    shares = []
    for one in layers_of(pattern):
        for at, count in _heads(one, n, heads):
            seen = np.broadcast_to(one.allows(query, key, at), legal.shape)
            shares.append(count / heads * float(seen[legal].mean()))
    return sum(shares) / len(layers_of(pattern))


def _every_head_sees_what_models_use(pattern: Pattern, n: int, heads: int) -> bool:
    query: Positions = np.arange(1, n)
    wanted = (query - 1, np.zeros_like(query))
    return all(
        bool(np.all(one.allows(query, key, at)))
        for one in layers_of(pattern)
        for at, _ in _heads(one, n, heads)
        for key in wanted
    )
