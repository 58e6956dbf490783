"""Which tiles of the score matrix the ranges touch, and how to visit them in few batched calls.

A *job* pairs one tile of query rows with one contiguous span of keys that covers what those rows
see there. Jobs of equal shape and equal mask whose rows and keys advance by constant steps form
a *run*: a window, a chunk or a cache makes a handful of runs however long the sequence is, and a
batch of a run needs no gathered copy, only a strided view. Ranges without any regularity give
runs of one job, which is still only what they touch; where these are too many, the keys of a leaf
are gathered (_tiled_gathered).

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

from longspan.ops.kernels._tiled_gathered import find_gathered_jobs
from longspan.ops.kernels._tiled_jobs import ALIGN, LEAST, Ints, find_jobs
from longspan.ops.kernels._tiled_runs import Costs, Mask, Run, progressions, runs_of

# Gathering is tried from a few runs and this many per leaf on, which regular patterns never have.
_REGULAR, _FEW = 0.5, 8
# Most keys that a batch gathers: few enough to stay in cache, enough to outweigh its calls.
_GATHERED = 4096


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
        gathered_X: the key rows of all jobs side by side, where these are no strided view.
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
    gathered_X: Ints | None


@dataclass(frozen=True)
class Schedule:
    """Runs of each range group, and parts that touch disjoint heads.

    Attributes:
        runs: for each group its runs, waves ascending.
        parts: for each part and group the heads that follow it; no two parts share a key head.
        row_steps, key_steps: of the query rows and of the key rows.
        keys: key rows M of a key head.
        area: most scores (rows times keys) in one batch.
        covers: whether every query row has a job in wave 0, so that results need no initial value.
    """

    runs: list[list[Run]]
    parts: list[list[list[Lanes]]]
    row_steps: Steps
    key_steps: Steps
    keys: int
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
        if run.blocks_CB is not None:
            limit = min(limit, max(1, _GATHERED // run.span))
        down, along = min(limit, lanes.count), min(limit, -(-run.count // deals))
        # One or the other: a grid of both has no single step.
        if along >= down:
            down = 1
        else:
            along, deals = 1, 1
        for i in range(0, lanes.count, down):
            for deal in range(deals):
                for j in range(deal, run.count, along * deals):
                    jobs = (
                        min(down, lanes.count - i)
                        if down > 1
                        else min(along, -(-(run.count - j) // deals))
                    )
                    key = lanes.key + i * lanes.key_step
                    gathered_X = None
                    if run.blocks_CB is not None:
                        blocks_CB = run.blocks_CB[j : j + (1 if down > 1 else jobs)]
                        head_J = key + np.arange(jobs) * (lanes.key_step if down > 1 else 0)
                        gathered_X = self._rows(blocks_CB, head_J)
                    yield Batch(
                        group=group,
                        run=run,
                        heads=lanes.heads,
                        jobs=jobs,
                        row=lanes.row
                        + i * lanes.row_step
                        + (run.row + j * run.row_step) * self.row_steps.row,
                        key=key + (run.key + j * run.key_step) * self.key_steps.row,
                        row_step=lanes.row_step
                        if down > 1
                        else deals * run.row_step * self.row_steps.row,
                        key_step=lanes.key_step
                        if down > 1
                        else deals * run.key_step * self.key_steps.row,
                        row_steps=self.row_steps,
                        key_steps=self.key_steps,
                        gathered_X=gathered_X,
                    )

    def _rows(self, blocks_CB: NDArray[np.int32], head_J: Ints) -> Ints:
        """The rows of key blocks, one job after the other, in heads that begin at ``head_J``."""
        key_CBA = blocks_CB[..., None] * np.int64(ALIGN) + np.arange(ALIGN)
        # The last block may reach beyond the last key: it repeats that one, and nobody sees it.
        key_CS = np.minimum(key_CBA, self.keys - 1).reshape(len(blocks_CB), -1)
        return (head_J[:, None] + key_CS * self.key_steps.row).ravel()


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
    costs: Costs | None = None,
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
        costs: what decides whether keys in many short segments are gathered; None: they are not.

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
    masks: dict[tuple[int, bytes], Mask] = {}
    for group in used:
        for (first, stop), rows in zip(pairwise(cuts), (tile, leaf, queries % leaf), strict=True):
            if first < stop:
                shape = (-1, rows, lo_GNm.shape[2])
                lo_tTm = lo_GNm[group, first:stop].reshape(shape)
                hi_tTm = hi_GNm[group, first:stop].reshape(shape)
                row_t = np.arange(first, stop, rows)
                cases = (row_t, lo_tTm, hi_tTm, keys, leaf, lines)
                found = [run for jobs in find_jobs(*cases) for run in runs_of(jobs, masks)]
                leaves = (stop - first) / leaf
                if costs is not None and len(found) > _REGULAR * leaves + _FEW:
                    other = [
                        run for jobs in find_gathered_jobs(*cases) for run in runs_of(jobs, masks)
                    ]
                    found = min(found, other, key=lambda runs: costs.of(runs, heads))
                runs[group] += found
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
        keys=keys,
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
        for first, count in progressions(step_J2[:, 1] >= 0, step_J2):
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
