"""What a picture of a pattern shows, as small tables of cells: each head, all heads, the layers.

Up to ``cells`` tokens a cell is one pair. Beyond, a cell stands for a square of pairs; up to
``EXACT`` tokens all of them are looked at, and from there on a few random queries of each row of
cells. Nothing larger than ``EXACT x EXACT`` is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.analysis.reach import closure, period, reach_exact, reach_of_row
from longspan.analysis.relation import Relation
from longspan.errors import InputError
from longspan.pattern import At, Pattern
from longspan.planning import plan

EXACT = 1024
LARGEST = 1 << 17
ROWS_PER_CELL = 4

Cells = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """One picture.

    Attributes:
        title: for example ``heads 0-3``.
        heads: the heads that look like this.
        seen: share of the pairs of each cell that are seen [cells, cells], 0 to 1.
    """

    title: str
    heads: tuple[int, ...]
    seen: Cells


@dataclass(frozen=True, eq=False, kw_only=True)
class Views:
    """All pictures of a pattern.

    Attributes:
        pattern: what is shown.
        n: tokens.
        heads: query heads.
        layers: layers that reach looks at.
        causal: whether legal pairs are those with the key up to the query.
        exact: whether every pair was looked at.
        each: one picture for every kind of head; for patterns that differ between layers, of
            every layer of a period.
        together: share of the heads that see a pair, mean over each cell [cells, cells].
        reach: the first layer after which some pair of the cell is reached, 0 if none of
            ``layers``, -1 if no number of layers does (known up to ``EXACT`` tokens only).
    """

    pattern: Pattern
    n: int
    heads: int
    layers: int
    causal: bool
    exact: bool
    each: tuple[View, ...]
    together: Cells
    reach: NDArray[np.int64]

    @property
    def cells(self) -> int:
        """Cells on a side."""
        return len(self.together)

    def legal(self) -> NDArray[np.bool_]:
        """Cells that hold a pair that could be seen at all [cells, cells]."""
        cells = self.cells
        return np.tri(cells, dtype=bool) if self.causal else np.ones((cells, cells), bool)


def views(
    pattern: Pattern, n: int, *, heads: int = 1, layers: int = 3, cells: int = 256, seed: int = 0
) -> Views:
    """Look at a pattern.

    Args:
        pattern: where each query may look.
        n: tokens.
        heads: query heads.
        layers: layers for reach.
        cells: most cells on a side.
        seed: of the sampled queries, beyond ``EXACT`` tokens.

    Raises:
        InputError: if a number is out of bounds.
        PatternError: if the pattern does not fit the number of heads.
    """
    for name, value, most in (("n", n, LARGEST), ("heads", heads, 1024), ("layers", layers, 1024)):
        if not 1 <= value <= most:
            raise InputError(f"a picture needs {name} from 1 to {most:,}, got {value:,}")
    count = min(period(pattern), layers)
    own = [pattern.at_layer(layer) for layer in range(count)]
    for one in own:
        one.check(heads)
    cells = min(n, cells)
    rows = _rows(n, cells, seed)
    each: list[View] = []
    together = np.zeros((cells, cells))
    for layer, one in enumerate(own):
        for group in _alike(one, heads):
            seen = _seen(one, At(head=group[0], heads=heads, length=n), rows, n, cells)
            together += seen * (len(group) / heads / count)
            title = _title(group, heads)
            each.append(
                View(
                    title=title if count == 1 else f"layer {layer}, {title}",
                    heads=group,
                    seen=seen,
                )
            )
    return Views(
        pattern=pattern,
        n=n,
        heads=heads,
        layers=layers,
        causal=all(one.is_causal for one in own),
        exact=n <= EXACT,
        each=tuple(each),
        together=together,
        reach=_reach(pattern, n, heads, layers, cells, rows),
    )


def _rows(n: int, cells: int, seed: int) -> NDArray[np.int64]:
    """Queries to look at: all of them, or a few random ones for each row of cells."""
    if n <= EXACT:
        return np.arange(n)
    edge = np.arange(cells + 1) * n // cells
    random = np.random.default_rng(seed)
    picks = [
        np.sort(random.choice(np.arange(a, b), min(ROWS_PER_CELL, b - a), replace=False))
        for a, b in pairwise(edge)
    ]
    return np.concatenate(picks)


def _alike(pattern: Pattern, heads: int) -> list[tuple[int, ...]]:
    """Heads by class, in order."""
    groups: dict[Any, list[int]] = {}
    for head in range(heads):
        groups.setdefault(pattern.head_class(At(head=head, heads=heads)), []).append(head)
    return [tuple(group) for group in groups.values()]


def _seen(pattern: Pattern, at: At, rows: NDArray[np.int64], n: int, cells: int) -> Cells:
    """Share of pairs seen in each cell."""
    key = np.arange(n)
    found = np.broadcast_to(pattern.allows(rows[:, None], key, at), (len(rows), n))
    if pattern.is_causal:
        found = found | (~found.any(axis=1, keepdims=True) & (key == rows[:, None]))
    return _binned(found, rows, n, cells)


def _binned(found: NDArray[Any], rows: NDArray[np.int64], n: int, cells: int) -> Cells:
    """Means over cells of a table [rows, n]."""
    if n == cells:
        return found.astype(np.float64)
    start = -(-np.arange(cells) * n // cells)
    width = np.diff(start, append=n)
    by_key = np.add.reduceat(found, start, axis=1, dtype=np.float64) / width
    first = np.searchsorted(rows, start)
    return np.add.reduceat(by_key, first, axis=0) / np.diff(first, append=len(rows))[:, None]


def _reach(
    pattern: Pattern, n: int, heads: int, layers: int, cells: int, rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    if n <= EXACT:
        unions = [
            np.logical_or.reduce(pattern.mask(n, heads, layer)) for layer in range(period(pattern))
        ]
        reached = [*reach_exact(unions, layers), closure(unions)[0]]
        tables = [_binned(one, rows, n, cells) > 0 for one in reached]
    else:
        plans = [plan(pattern, n, heads, layer=at) for at in range(min(period(pattern), layers))]
        relations = [Relation(one) for one in plans]
        # One query for each row of cells: the walk is the slow part.
        some = rows[np.searchsorted(rows, -(-np.arange(cells) * n // cells))]
        walks = [reach_of_row(relations, int(row), layers) for row in some]
        tables = [
            _binned(np.stack([walk[layer] for walk in walks]), some, n, cells) > 0
            for layer in range(layers)
        ]
        tables.append(np.ones((cells, cells), bool))
    return _first(tables[:-1], tables[-1])


def _first(reached: Sequence[NDArray[np.bool_]], ever: NDArray[np.bool_]) -> NDArray[np.int64]:
    first = np.where(ever, 0, -1)
    for layer in reversed(range(len(reached))):
        first[reached[layer]] = layer + 1
    return first


def _title(group: tuple[int, ...], heads: int) -> str:
    if len(group) == heads:
        return "every head" if heads > 1 else "the head"
    runs: list[list[int]] = []
    for head in group:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"head{'s' * (len(group) > 1)} {', '.join(words)}"
