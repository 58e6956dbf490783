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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Spans begin and end at multiples of this where they can: whole vector registers, and equal
# shapes more often.
_ALIGN = 16
# Keys that nobody in the tile sees are computed rather than skipped when they are fewer than this.
_GAP = 64
# A run whose keys advance by less than 1 / _OVERLAP of its span is left to single jobs: key
# gradients of overlapping spans are added slice by slice.
_OVERLAP = 32
# Query rows of a job at most, bundled heads counted.
_TALLEST = 1024


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
    """Equal jobs at constant steps: job ``c`` has rows from ``row + c * row_step`` and keys from
    ``key + c * key_step``.

    Attributes:
        wave: ordinal of the jobs among those of their query tile; 0 starts a tile, others add to
        it.
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
    """Bundles of ``heads`` neighbouring query heads on one key head, ``count`` of them at
    constant steps (in rows)."""

    count: int
    heads: int
    row: int
    row_step: int
    key: int
    key_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A grid of equal jobs computed in one call: ``lanes`` bundles of heads by ``count`` jobs of
    a run.

    Attributes:
        group: range group of all its heads.
        run: the run, for what its jobs have in common.
        heads: query heads of a bundle.
        row, key: first row and first key of the first job.
        lane_steps, steps: rows and keys from one lane, and from one job of the run, to the next.
    """

    group: int
    run: Run
    heads: int
    lanes: int
    count: int
    row: int
    key: int
    lane_steps: tuple[int, int]
    steps: tuple[int, int]


@dataclass(frozen=True)
class Schedule:
    """Runs of each range group, and parts that touch disjoint heads.

    Attributes:
        runs: for each group its runs, waves ascending.
        parts: for each part and group the heads that follow it; no two parts share a key head.
        area: most scores (rows times keys) in one batch.
        covers: whether every query tile has a job, so that results need no initial value.
    """

    runs: list[list[Run]]
    parts: list[list[list[Lanes]]]
    area: int
    covers: bool

    def batches(self, part: int, *, grid: bool) -> Iterator[Batch]:
        """Everything to compute in one part, in order; unless ``grid``, along one step at a
        time."""
        for group, (runs, lanes) in enumerate(zip(self.runs, self.parts[part], strict=True)):
            for run in runs:
                for lane in lanes:
                    yield from self._cut(group, run, lane, grid)

    def _cut(self, group: int, run: Run, lanes: Lanes, grid: bool) -> Iterator[Batch]:
        limit = max(1, self.area // (lanes.heads * run.rows * run.span))
        if run.count >= lanes.count:
            width = min(run.count, limit)
            height = min(lanes.count, limit // width) if grid else 1
        else:
            height = min(lanes.count, limit)
            width = min(run.count, limit // height) if grid else 1
        for i in range(0, lanes.count, height):
            for j in range(0, run.count, width):
                yield Batch(
                    group=group,
                    run=run,
                    heads=lanes.heads,
                    lanes=min(height, lanes.count - i),
                    count=min(width, run.count - j),
                    row=lanes.row + i * lanes.row_step + run.row + j * run.row_step,
                    key=lanes.key + i * lanes.key_step + run.key + j * run.key_step,
                    lane_steps=(lanes.row_step, lanes.key_step),
                    steps=(run.row_step, run.key_step),
                )


def build_schedule(
    lo_GNm: Ints,
    hi_GNm: Ints,
    group_BH: Ints,
    *,
    keys: int,
    key_heads: int,
    tile: int,
    span: int,
    area: int,
    parts: int,
    block: int,
) -> Schedule:
    """Plan the jobs of one call.

    Args:
        lo_GNm: first key of each range.
        hi_GNm: one past its last key.
        group_BH: range group of each query head, for every batch row.
        keys: key rows M.
        key_heads: key heads K of each batch row.
        tile: query rows of a job; those that share all their keys make a taller one.
        span: most keys of a job.
        area: most scores in one batch.
        parts: parts wanted; there are never more than key heads.
        block: neighbouring tiles to look for common keys in.

    Time and memory are O(G N m) and the Python loops run over runs and heads, never over rows.
    """
    groups, queries, _ = lo_GNm.shape
    bundles = _bundles(group_BH, queries, keys, key_heads)
    parts = min(parts, len(bundles))
    cuts = [len(bundles) * i // parts for i in range(parts + 1)]
    lanes = [_lanes(bundles[start:stop], groups) for start, stop in pairwise(cuts)]
    heads = max(bundle.heads for of_key_head in bundles for bundle in of_key_head)
    span = -(-span // _ALIGN) * _ALIGN

    def tallest(span_J: Ints) -> Ints:
        return np.maximum(1, np.minimum(area // span_J, _TALLEST) // (heads * tile))

    whole = queries // tile * tile
    used = {bundle.group for of_key_head in bundles for bundle in of_key_head}
    runs: list[list[Run]] = [[] for _ in range(groups)]
    masks: dict[bytes, Mask] = {}
    for group in used:
        for first, stop, rows in ((0, whole, tile), (whole, queries, queries - whole)):
            if first < stop:
                shape = (-1, rows, lo_GNm.shape[2])
                lo_tTm = lo_GNm[group, first:stop].reshape(shape)
                hi_tTm = hi_GNm[group, first:stop].reshape(shape)
                runs[group] += _runs(
                    _jobs(lo_tTm, hi_tTm, keys, span, tallest, block), rows, first, masks
                )
    covers = all(
        queries == sum(run.rows * run.count for run in runs[group] if run.wave == 0)
        for group in used
    )
    return Schedule(runs=runs, parts=lanes, area=max(area, heads * tile * span), covers=covers)


@dataclass(frozen=True, slots=True)
class _Bundle:
    """Neighbouring query heads of one key head that follow one range group."""

    group: int
    heads: int
    row: int
    key: int


def _bundles(group_BH: Ints, queries: int, keys: int, key_heads: int) -> list[list[_Bundle]]:
    """The bundles of every key head of every batch row."""
    heads = group_BH.shape[1]
    share = heads // key_heads
    bundles: list[list[_Bundle]] = []
    for b, group_H in enumerate(group_BH.tolist()):
        for key_head in range(key_heads):
            first, stop = key_head * share, (key_head + 1) * share
            cuts = [h for h in range(first + 1, stop) if group_H[h] != group_H[h - 1]]
            key = (b * key_heads + key_head) * keys
            bundles.append(
                [
                    _Bundle(group_H[start], end - start, (b * heads + start) * queries, key)
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
        place_J2 = np.array(found, dtype=np.int64)
        step_J2 = np.diff(place_J2, axis=0)
        for first, count in _progressions(np.ones(len(step_J2), dtype=bool), step_J2):
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


@dataclass(frozen=True, slots=True)
class _Jobs:
    """Jobs of tiles of equal height, unordered; what the columns of ``shape`` say is what a run
    must share."""

    tile_J: Ints
    key_J: Ints
    # wave, height in tiles, span, left, right
    shape_J5: Ints
    # Ranges of the rows relative to the job's first key, cut to its span; zero where the job
    # needs no mask.
    bounds_JX: NDArray[np.int32]


def _jobs(
    lo_tTm: Ints,
    hi_tTm: Ints,
    keys: int,
    max_span: int,
    tallest: Callable[[Ints], Ints],
    block: int,
) -> _Jobs:
    tile_S, start_S, stop_S, left_S, right_S = _segments(lo_tTm, hi_tTm)
    start_S = start_S // _ALIGN * _ALIGN
    stop_S = np.minimum(-(-stop_S // _ALIGN) * _ALIGN, keys)

    # What neighbouring tiles all see goes first, then what is left of it and right of it.
    body_S, rest_S = _bodies(tile_S, start_S, stop_S, left_S, right_S, block)
    first_P = np.stack([body_S, start_S, rest_S], axis=1).ravel()
    length_P = np.stack([rest_S, body_S, stop_S], axis=1).ravel() - first_P

    # Long pieces are cut into jobs of at most max_span keys.
    cuts_P = -(-length_P // max_span)
    piece_J = np.repeat(np.arange(len(first_P)), cuts_P)
    cut_J = np.arange(len(piece_J)) - np.repeat(np.cumsum(cuts_P) - cuts_P, cuts_P)
    segment_J = piece_J // 3
    tile_J = tile_S[segment_J]
    key_J = first_P[piece_J] + cut_J * max_span
    span_J = np.minimum(length_P[piece_J] - cut_J * max_span, max_span)
    left_J = np.clip(left_S[segment_J] - key_J, 0, span_J)
    right_J = np.clip(right_S[segment_J] - key_J, left_J, span_J)
    wave_J = np.arange(len(tile_J)) - np.searchsorted(tile_J, tile_J)

    masked_J = (left_J > 0) | (right_J < span_J)
    first_J, height_J = _stack(tile_J, wave_J, key_J, span_J, ~masked_J, tallest(span_J))
    shape_J5 = np.stack([wave_J, np.ones_like(wave_J), span_J, left_J, right_J], axis=1)[first_J]
    shape_J5[:, 1] = height_J
    tile_J, key_J, masked_J = tile_J[first_J], key_J[first_J], masked_J[first_J]

    bounds_JX = np.zeros((len(tile_J), 2 * lo_tTm[0].size), dtype=np.int32)
    masked = np.flatnonzero(masked_J)
    first, last = key_J[masked, None, None], shape_J5[masked, 2, None, None]
    lo_JTm = np.clip(lo_tTm[tile_J[masked]] - first, 0, last)
    hi_JTm = np.clip(hi_tTm[tile_J[masked]] - first, lo_JTm, last)
    bounds_J2Tm = np.stack([lo_JTm, hi_JTm], axis=1) * (lo_JTm < hi_JTm)[:, None]
    bounds_JX[masked] = bounds_J2Tm.reshape(len(masked), bounds_JX.shape[1])
    return _Jobs(tile_J, key_J, shape_J5, bounds_JX)


def _bodies(
    tile_S: Ints, start_S: Ints, stop_S: Ints, left_S: Ints, right_S: Ints, block: int
) -> tuple[Ints, Ints]:
    """Keys that all rows of ``block`` neighbouring tiles see, where they are most of what each
    sees.

    Returns:
        First of these keys and one past their last for each segment; the whole segment if none.
    """
    ordinal_S = np.arange(len(tile_S)) - np.searchsorted(tile_S, tile_S)
    order_S = np.lexsort((tile_S, ordinal_S, tile_S // block))
    whose_S2 = np.stack([tile_S // block, ordinal_S], axis=1)[order_S]
    heads = np.flatnonzero(np.r_[True, (whose_S2[1:] != whose_S2[:-1]).any(axis=1)][: len(tile_S)])
    if not len(heads):
        return start_S, stop_S
    size = np.diff(np.append(heads, len(tile_S)))
    first = -(-np.maximum.reduceat(left_S[order_S], heads) // _ALIGN) * _ALIGN
    last = np.minimum.reduceat(right_S[order_S], heads) // _ALIGN * _ALIGN
    longest = np.maximum.reduceat((stop_S - start_S)[order_S], heads)
    good = (size == block) & (block > 1) & (2 * (last - first) >= longest)
    body_S, rest_S = start_S.copy(), stop_S.copy()
    chosen = order_S[np.repeat(good, size)]
    body_S[chosen] = np.repeat(first, size)[np.repeat(good, size)]
    rest_S[chosen] = np.repeat(last, size)[np.repeat(good, size)]
    return body_S, rest_S


def _stack(
    tile_J: Ints,
    wave_J: Ints,
    key_J: Ints,
    span_J: Ints,
    open_J: NDArray[np.bool_],
    tallest_J: Ints,
) -> tuple[Ints, Ints]:
    """Put open (unmasked) jobs of neighbouring tiles on the same keys on top of each other.

    Returns:
        The jobs to keep, which are the first of each stack, and how many tiles high each now is.
    """
    order_J = np.lexsort((tile_J, span_J, key_J, wave_J))
    joins = open_J[order_J[1:]] & open_J[order_J[:-1]] & (np.diff(tile_J[order_J]) == 1)
    for x_J in (wave_J, key_J, span_J):
        joins &= np.diff(x_J[order_J]) == 0
    starts = np.flatnonzero(np.concatenate([[True], ~joins])) if len(order_J) else order_J
    # Stacks that are too tall are cut into equal ones and a rest.
    length = np.diff(np.append(starts, len(order_J)))
    tallest = tallest_J[order_J[starts]]
    cuts = -(-length // tallest)
    piece = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    tallest = np.repeat(tallest, cuts)
    height_J = np.minimum(np.repeat(length, cuts) - piece * tallest, tallest)
    return order_J[np.repeat(starts, cuts) + piece * tallest], height_J


def _segments(lo_tTm: Ints, hi_tTm: Ints) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """The keys that a tile's rows see, as disjoint segments that lie more than _GAP apart.

    Returns:
        For each segment, tiles ascending: its tile, its first key, one past its last key, and
        the keys [left, right) inside it that every row of the tile sees (left = right = its end
        when there are none).
    """
    tiles, width = len(lo_tTm), lo_tTm[0].size
    lo_tX, hi_tX = lo_tTm.reshape(tiles, width), hi_tTm.reshape(tiles, width)
    # One 64-bit number per range sorts by first key; empty ranges go last.
    empty_tX = lo_tX >= hi_tX
    code_tX = np.where(empty_tX, np.iinfo(np.int64).max, (lo_tX << 32) | hi_tX)
    if (code_tX[:, 1:] < code_tX[:, :-1]).any():
        code_tX = np.sort(code_tX, axis=1)
    used_t = width - empty_tX.sum(axis=1)
    first_tX = code_tX >> 32
    reach_tX = np.maximum.accumulate(code_tX & 0xFFFFFFFF, axis=1)
    opens_tX = np.arange(width) < used_t[:, None]
    opens_tX[:, 1:] &= first_tX[:, 1:] > reach_tX[:, :-1] + _GAP
    tile_S, column_S = np.nonzero(opens_tX)
    last_S = used_t[tile_S] - 1
    same = tile_S[1:] == tile_S[:-1]
    last_S[:-1][same] = column_S[1:][same] - 1
    start_S, stop_S = first_tX[tile_S, column_S], reach_tX[tile_S, last_S]

    lo_STm, hi_STm = lo_tTm[tile_S], hi_tTm[tile_S]
    inside_STm = (
        (lo_STm < hi_STm) & (lo_STm >= start_S[:, None, None]) & (lo_STm < stop_S[:, None, None])
    )
    left_S = np.where(inside_STm, lo_STm, -1).max(axis=(1, 2))
    right_S = np.where(inside_STm, hi_STm, np.iinfo(np.int64).max).min(axis=(1, 2))
    # A row with no range here, or several, leaves nothing that all rows are known to see.
    none_S = (inside_STm.sum(axis=2) != 1).any(axis=1) | (left_S >= right_S)
    return (
        tile_S,
        start_S,
        stop_S,
        np.where(none_S, stop_S, left_S),
        np.where(none_S, stop_S, right_S),
    )


def _runs(jobs: _Jobs, rows: int, base: int, masks: dict[bytes, Mask]) -> list[Run]:
    """Sort equal jobs together and cut them into runs of constant steps; share masks seen
    before."""
    if not len(jobs.tile_J):
        return []
    # The hash only brings equal masks together; whether neighbours are equal is decided on the
    # bounds themselves.
    odd_X = np.random.default_rng(0).integers(1 << 62, size=jobs.bounds_JX.shape[1]) * 2 + 1
    with np.errstate(over="ignore"):
        hash_J = (jobs.bounds_JX * odd_X).sum(axis=1)
    order_J = np.lexsort((jobs.tile_J, hash_J, *jobs.shape_J5.T[::-1]))
    tile_J, key_J, shape_J5 = jobs.tile_J[order_J], jobs.key_J[order_J], jobs.shape_J5[order_J]
    bounds_JX = jobs.bounds_JX[order_J]
    equal = (shape_J5[1:] == shape_J5[:-1]).all(axis=1)
    equal &= (bounds_JX[1:] == bounds_JX[:-1]).all(axis=1)
    step_J2 = np.stack([np.diff(tile_J) * rows, np.diff(key_J)], axis=1)
    # Steps that a strided view cannot take, or that overlap too much.
    equal &= (step_J2[:, 1] == 0) | (step_J2[:, 1] * _OVERLAP >= shape_J5[1:, 2])
    runs: list[Run] = []
    for first, count in _progressions(equal, step_J2):
        wave, height, span, left, right = shape_J5[first].tolist()
        row_step, key_step = step_J2[first].tolist() if count > 1 else (0, 0)
        mask = None
        if left > 0 or right < span:
            lo_Tm, hi_Tm = bounds_JX[first].reshape(2, rows, -1)
            name = shape_J5[first, 2:].tobytes() + bounds_JX[first].tobytes()
            mask = masks.setdefault(name, Mask(lo_Tm, hi_Tm, span, left, right))
        runs.append(
            Run(
                wave=wave,
                count=count,
                rows=height * rows,
                span=span,
                row=base + int(tile_J[first]) * rows,
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
