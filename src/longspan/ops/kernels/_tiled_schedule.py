"""Which tiles of the score matrix the ranges touch, and how to visit them in few batched calls.

A *job* pairs one tile of query rows with one contiguous span of keys that covers what those rows
see there. Jobs of equal shape and equal mask whose rows and keys advance by constant steps form
a *run*: a window, a chunk or a cache makes a handful of runs however long the sequence is, and a
batch of a run needs no gathered copy, only a strided view. Ranges without any regularity give
runs of one job, which is still only what they touch.

Heads that share a key head and its ranges become extra rows of one job (GQA without expanded
keys): a *lane* is such a bundle of heads, and lanes at constant steps form runs too.

Axes: G range groups, N query rows, m ranges per query, J jobs, T rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from longspan.ops.kernels._tiled_jobs import LEAST, Ints, Jobs, find_jobs

# A run whose keys advance by less than 1 / _OVERLAP of its span is left to single jobs, which on
# shared keys take turns anyway.
_OVERLAP = 32


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """What hides keys from the rows of a job; one object for all jobs that look alike.

    Attributes:
        lo_Tm, hi_Tm: ranges of each row, in columns of the job.
        span: columns of the job.
        left, right: every row sees every column from ``left`` up to ``right``.
    """

    lo_Tm: NDArray[np.int32]
    hi_Tm: NDArray[np.int32]
    span: int
    left: int
    right: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Equal jobs at constant steps.

    Job ``c`` has rows from ``row + c * row_step`` and keys from ``key + c * key_step``.

    Attributes:
        wave: 0 where the jobs are the first of their query tiles, more where they add to others.
        count: number of jobs.
        rows: query rows T of a job.
        span: key rows of a job.
        mask: None where every row sees every key.
    """

    wave: int
    count: int
    rows: int
    span: int
    row: int
    row_step: int
    key: int
    key_step: int
    mask: Mask | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Bundles of ``heads`` neighbouring query heads on one key head, at constant steps in rows."""

    count: int
    heads: int
    row: int
    row_step: int
    key: int
    key_step: int


@dataclass(frozen=True, slots=True)
class Steps:
    """Where rows lie in memory, counted in rows: how far it is from one batch row, head or row to
    the next."""

    batch: int
    head: int
    row: int

    def strides(self, width: int) -> tuple[int, int, int, int]:
        """Of a tensor [B, H, N, width]."""
        return self.batch * width, self.head * width, self.row * width, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Equal jobs for one call, at constant steps: of one run and one lane, or of all lanes.

    Attributes:
        group: range group of all its heads.
        run: the run, for what its jobs have in common.
        heads: query heads of a bundle.
        jobs: number of jobs.
        row, key: where the first row and the first key of the first job lie.
        row_step, key_step: how far it is from one job to the next.
        row_steps, key_steps: of all query rows and of all key rows.
    """

    group: int
    run: Run
    heads: int
    jobs: int
    row: int
    key: int
    row_step: int
    key_step: int
    row_steps: Steps
    key_steps: Steps


@dataclass(frozen=True)
class Schedule:
    """Runs of each range group, and parts that touch disjoint heads.

    Attributes:
        runs: for each group its runs, waves ascending.
        parts: for each part and group the heads that follow it; no two parts share a key head.
        row_steps, key_steps: of the query rows and of the key rows.
        area: most scores (rows times keys) in one batch.
        covers: whether every query row has a job in wave 0, so that results need no initial value.
    """

    runs: list[list[Run]]
    parts: list[list[list[Lanes]]]
    row_steps: Steps
    key_steps: Steps
    area: int
    covers: bool

    def batches(self, part: int, *, apart: bool) -> Iterator[Batch]:
        """Everything to compute in one part, in order.

        With ``apart`` the jobs of a batch have either all the same keys or none in common, so
        that gradients can be added to keys in one call.
        """
        for group, (runs, lanes) in enumerate(zip(self.runs, self.parts[part], strict=True)):
            for run in runs:
                for lane in lanes:
                    yield from self._cut(group, run, lane, apart)

    def _cut(self, group: int, run: Run, lanes: Lanes, apart: bool) -> Iterator[Batch]:
        # Jobs that overlap are dealt out to as many batches as lie on the same keys.
        deals = -(-run.span // run.key_step) if apart and run.key_step > 0 else 1
        deals = min(deals, run.count)
        limit = max(1, self.area // (lanes.heads * run.rows * run.span))
        down, along = min(limit, lanes.count), min(limit, -(-run.count // deals))
        # One or the other: a grid of both has no single step.
        if along >= down:
            down = 1
        else:
            along, deals = 1, 1
        for i in range(0, lanes.count, down):
            for deal in range(deals):
                for j in range(deal, run.count, along * deals):
                    yield Batch(
                        group=group,
                        run=run,
                        heads=lanes.heads,
                        jobs=min(down, lanes.count - i)
                        if down > 1
                        else min(along, -(-(run.count - j) // deals)),
                        row=lanes.row
                        + i * lanes.row_step
                        + (run.row + j * run.row_step) * self.row_steps.row,
                        key=lanes.key
                        + i * lanes.key_step
                        + (run.key + j * run.key_step) * self.key_steps.row,
                        row_step=lanes.row_step
                        if down > 1
                        else deals * run.row_step * self.row_steps.row,
                        key_step=lanes.key_step
                        if down > 1
                        else deals * run.key_step * self.key_steps.row,
                        row_steps=self.row_steps,
                        key_steps=self.key_steps,
                    )


def build_schedule(
    lo_GNm: Ints,
    hi_GNm: Ints,
    group_BH: Ints,
    *,
    keys: int,
    key_heads: int,
    tile: int,
    leaf: int,
    job: int,
    area: int,
    parts: int,
    row_steps: Steps | None = None,
    key_steps: Steps | None = None,
) -> Schedule:
    """Plan the jobs of one call.

    Args:
        lo_GNm: first key of each range.
        hi_GNm: one past its last key.
        group_BH: range group of each query head, for every batch row.
        keys: key rows M.
        key_heads: key heads K of each batch row.
        tile: most query rows of a job.
        leaf: query rows of the lowest jobs; a tile is this times a power of two.
        job: most scores of a job, as long as its keys are not too few to be worth it.
        area: most scores in one batch.
        parts: parts wanted; there are never more than key heads.
        row_steps, key_steps: of the query rows and of the key rows; default: laid end to end.

    Time and memory are O(G N m) and the Python loops run over runs and heads, never over rows.
    """
    groups, queries, _ = lo_GNm.shape
    row_steps = row_steps or Steps(group_BH.shape[1] * queries, queries, 1)
    key_steps = key_steps or Steps(key_heads * keys, keys, 1)
    bundles = _bundles(group_BH, row_steps, key_steps, key_heads)
    parts = min(parts, len(bundles))
    shares = [len(bundles) * i // parts for i in range(parts + 1)]
    lanes = [_lanes(bundles[start:stop], groups) for start, stop in pairwise(shares)]
    heads = max(bundle.heads for of_key_head in bundles for bundle in of_key_head)
    lines = job // heads
    # Tiles, then leaves, then what is left.
    cuts = [0, queries // tile * tile, queries // leaf * leaf, queries]
    used = {bundle.group for of_key_head in bundles for bundle in of_key_head}
    runs: list[list[Run]] = [[] for _ in range(groups)]
    masks: dict[bytes, Mask] = {}
    for group in used:
        for (first, stop), rows in zip(pairwise(cuts), (tile, leaf, queries % leaf), strict=True):
            if first < stop:
                shape = (-1, rows, lo_GNm.shape[2])
                lo_tTm = lo_GNm[group, first:stop].reshape(shape)
                hi_tTm = hi_GNm[group, first:stop].reshape(shape)
                row_t = np.arange(first, stop, rows)
                for jobs in find_jobs(row_t, lo_tTm, hi_tTm, keys, leaf, lines):
                    runs[group] += _runs(jobs, masks)
        runs[group].sort(key=lambda run: run.wave)
    covers = all(
        queries == sum(run.rows * run.count for run in runs[group] if run.wave == 0)
        for group in used
    )
    area = max(area, job + heads * tile * LEAST)
    return Schedule(
        runs=runs,
        parts=lanes,
        row_steps=row_steps,
        key_steps=key_steps,
        area=area,
        covers=covers,
    )


@dataclass(frozen=True, slots=True)
class _Bundle:
    """Neighbouring query heads of one key head that follow one range group."""

    group: int
    heads: int
    row: int
    key: int


def _bundles(
    group_BH: Ints, row_steps: Steps, key_steps: Steps, key_heads: int
) -> list[list[_Bundle]]:
    """The bundles of every key head of every batch row."""
    heads = group_BH.shape[1]
    share = heads // key_heads
    bundles: list[list[_Bundle]] = []
    for b, group_H in enumerate(group_BH.tolist()):
        for key_head in range(key_heads):
            first, stop = key_head * share, (key_head + 1) * share
            cuts = [h for h in range(first + 1, stop) if group_H[h] != group_H[h - 1]]
            key = b * key_steps.batch + key_head * key_steps.head
            bundles.append(
                [
                    _Bundle(
                        group_H[start],
                        end - start,
                        b * row_steps.batch + start * row_steps.head,
                        key,
                    )
                    for start, end in pairwise([first, *cuts, stop])
                ]
            )
    return bundles


def _lanes(bundles: list[list[_Bundle]], groups: int) -> list[list[Lanes]]:
    """For each group its bundles, those at constant steps together."""
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for bundle in chain.from_iterable(bundles):
        places.setdefault((bundle.group, bundle.heads), []).append((bundle.row, bundle.key))
    lanes: list[list[Lanes]] = [[] for _ in range(groups)]
    for (group, heads), found in places.items():
        # In memory's order steps are constant, whichever axis comes first there.
        place_J2 = np.array(sorted(found), dtype=np.int64)
        step_J2 = np.diff(place_J2, axis=0)
        # Keys may lie in another order of axes, but no strided view goes backwards.
        for first, count in _progressions(step_J2[:, 1] >= 0, step_J2):
            row, key = place_J2[first].tolist()
            row_step, key_step = step_J2[first].tolist() if count > 1 else (0, 0)
            lanes[group].append(
                Lanes(
                    count=count,
                    heads=heads,
                    row=row,
                    row_step=row_step,
                    key=key,
                    key_step=key_step,
                )
            )
    return lanes


def _runs(jobs: Jobs, masks: dict[bytes, Mask]) -> list[Run]:
    """Sort equal jobs together and cut them into runs of constant steps."""
    # The hash only brings equal masks together; whether neighbours are equal is decided on the
    # bounds themselves.
    odd_X = np.random.default_rng(0).integers(1 << 62, size=jobs.bounds_JX.shape[1]) * 2 + 1
    with np.errstate(over="ignore"):
        hash_J = (jobs.bounds_JX * odd_X).sum(axis=1)
    order_J = np.lexsort((jobs.row_J, hash_J, *jobs.shape_J4.T[::-1]))
    row_J, key_J, shape_J4 = jobs.row_J[order_J], jobs.key_J[order_J], jobs.shape_J4[order_J]
    bounds_JX = jobs.bounds_JX[order_J]
    equal = (shape_J4[1:] == shape_J4[:-1]).all(axis=1)
    equal &= (bounds_JX[1:] == bounds_JX[:-1]).all(axis=1)
    step_J2 = np.stack([np.diff(row_J), np.diff(key_J)], axis=1)
    # Steps that a strided view cannot take, or that overlap too much.
    equal &= (step_J2[:, 1] == 0) | (step_J2[:, 1] * _OVERLAP >= shape_J4[1:, 1])
    runs: list[Run] = []
    for first, count in _progressions(equal, step_J2):
        wave, span, left, right = shape_J4[first].tolist()
        row_step, key_step = step_J2[first].tolist() if count > 1 else (0, 0)
        mask = None
        if left > 0 or right < span:
            name = shape_J4[first, 1:].tobytes() + bounds_JX[first].tobytes()
            if name not in masks:
                lo_Tm, hi_Tm = bounds_JX[first].copy().reshape(2, jobs.rows, -1)
                masks[name] = Mask(lo_Tm, hi_Tm, span, left, right)
            mask = masks[name]
        runs.append(
            Run(
                wave=wave,
                count=count,
                rows=jobs.rows,
                span=span,
                row=int(row_J[first]),
                row_step=row_step,
                key=int(key_J[first]),
                key_step=key_step,
                mask=mask,
            )
        )
    return runs


def _progressions(equal: NDArray[np.bool_], step_J2: Ints) -> Iterator[tuple[int, int]]:
    """Cut a row of items into arithmetic progressions, greedily.

    Args:
        equal: whether item i and i + 1 may share a progression.
        step_J2: steps from item i to i + 1.

    Yields:
        first item and number of items; together they cover every item once, in order.
    """
    breaks = np.ones(len(equal), dtype=bool)
    breaks[1:] = ~equal[1:] | ~equal[:-1] | (step_J2[1:] != step_J2[:-1]).any(axis=1)
    first_stretch = np.flatnonzero(breaks)
    free = 0
    for first, stop in pairwise([*first_stretch.tolist(), len(equal)]):
        start = max(first, free)
        if equal[first] and stop > start:
            yield start, stop - start + 1
            free = stop + 1
        elif not equal[first]:
            if start == first:
                yield first, 1
            free = stop
    if free <= len(equal):
        yield free, 1
