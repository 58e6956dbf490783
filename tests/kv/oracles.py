"""Kept sets by the definitions, token by token in float64, one batch row at a time."""

from __future__ import annotations

import math

import torch

from longspan.kv import View


def view(batch=2, heads=4, groups=2, n=23, width=8, queries=12, seed=0, holes=True, **more):
    """A random layer: each head keeps other tokens, and has another number of them."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, groups, n, width, generator=draw, dtype=torch.float64)
    values = torch.randn(batch, groups, n, width, generator=draw, dtype=torch.float64)
    positions = torch.full((batch, groups, n), -1)
    seen = torch.tensor([n + 9 - 2 * b for b in range(batch)])
    for b in range(batch):
        for g in range(groups):
            count = n - (2 * b + g if holes else 0)
            old = torch.randperm(int(seen[b]) - 8, generator=draw)[: count - 8].sort().values
            newest = torch.arange(int(seen[b]) - 8, int(seen[b]))
            positions[b, g, :count] = torch.cat([old, newest])
    q = torch.randn(batch, heads, queries, width, generator=draw, dtype=torch.float64)
    at = seen[:, None] - queries + torch.arange(queries)
    return View(
        keys=keys,
        values=values,
        positions=positions,
        seen=seen,
        scale=width**-0.5,
        queries=q,
        query_positions=at,
        norms=torch.rand(batch, 1, n, generator=draw, dtype=torch.float64).expand(-1, groups, -1),
        sums=torch.rand(batch, groups, n, generator=draw, dtype=torch.float64),
        **more,
    )


def weights(seen, rows):
    """Attention of the last rows: {(b, h, position of query): {place: weight}}."""
    found = {}
    share = seen.queries.shape[1] // seen.keys.shape[1]
    for b in range(len(seen.keys)):
        for h in range(seen.queries.shape[1]):
            for r in range(seen.queries.shape[2] - rows, seen.queries.shape[2]):
                at = int(seen.query_positions[b, r])
                places = [
                    c
                    for c, p in enumerate(seen.positions[b, h // share].tolist())
                    if 0 <= p <= at and at >= 0
                ]
                logits = [
                    math.exp(
                        seen.scale * float(seen.queries[b, h, r] @ seen.keys[b, h // share, c])
                    )
                    for c in places
                ]
                found[b, h, at] = {c: x / sum(logits) for c, x in zip(places, logits, strict=True)}
    return found


def tokens(seen, b, g):
    """{position: place} of a head."""
    return {p: c for c, p in enumerate(seen.positions[b, g].tolist()) if p >= 0}


def choose(seen, scores, counts, protected):
    """The spec's select: protected tokens and the best of the others, as positions.

    Args:
        seen: the view.
        scores: (b, g, position) to number.
        counts: (b, g) to number.
        protected: (b, g, position) to bool.
    """
    kept = {}
    for b in range(len(seen.keys)):
        for g in range(seen.keys.shape[1]):
            own = tokens(seen, b, g)
            safe = {p for p in own if protected(b, g, p)}
            rest = sorted((p for p in own if p not in safe), key=lambda p: -scores(b, g, p))
            kept[b, g] = sorted(safe | set(rest[: counts(b, g)]))
    return kept


def as_positions(seen, keep):
    """A mask of places as positions."""
    return {
        (b, g): seen.positions[b, g][keep[b, g]].tolist()
        for b in range(len(seen.keys))
        for g in range(seen.keys.shape[1])
    }


def guard(seen, sinks=4, recent=32):
    """Sinks and recent tokens."""
    return lambda b, g, p: p < sinks or p >= int(seen.seen[b]) - recent
