"""Runs: equal jobs at constant steps, which a batch reads as strided views, and what they take.

Axes: J jobs, C jobs of a run, B blocks of its keys, T query rows of a job, m ranges per query,
X = 2 T m bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from longspan.ops.kernels._tiled_jobs import ALIGN, Ints, Jobs

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
        blocks_CB: blocks of ALIGN keys of each job, if its keys are gathered; ``key`` is 0 then.
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
    blocks_CB: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a pass takes, in nanoseconds.

    Attributes:
        call: a batch, however small it is.
        score: one more score.
        copy: one more key that is gathered.
    """

    call: float
    score: float
    copy: float

    def of(self, runs: list[Run], heads: int) -> float:
        """For one bundle of ``heads``."""
        scores = heads * sum(run.count * run.rows * run.span for run in runs)
        copied = sum(run.blocks_CB.size * ALIGN for run in runs if run.blocks_CB is not None)
        return self.call * len(runs) + self.score * scores + self.copy * copied


def runs_of(jobs: Jobs, masks: dict[tuple[int, bytes], Mask]) -> list[Run]:
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
    first_J = key_J
    if jobs.blocks_X is not None:
        key_J = np.zeros_like(key_J)
    step_J2 = np.stack([np.diff(row_J), np.diff(key_J)], axis=1)
    # Steps that a strided view cannot take, or that overlap too much.
    equal &= (step_J2[:, 1] == 0) | (step_J2[:, 1] * _OVERLAP >= shape_J4[1:, 1])
    runs: list[Run] = []
    for first, count in progressions(equal, step_J2):
        wave, span, left, right = shape_J4[first].tolist()
        row_step, key_step = step_J2[first].tolist() if count > 1 else (0, 0)
        mask = None
        if left > 0 or right < span:
            name = jobs.rows, shape_J4[first, 1:].tobytes() + bounds_JX[first].tobytes()
            if name not in masks:
                lo_Tm, hi_Tm = bounds_JX[first].copy().reshape(2, jobs.rows, -1)
                masks[name] = Mask(lo_Tm, hi_Tm, span, left, right)
            mask = masks[name]
        blocks_CB = None
        if jobs.blocks_X is not None:
            place_CB = first_J[first : first + count, None] + np.arange(span // ALIGN)
            blocks_CB = jobs.blocks_X[place_CB].astype(np.int32)
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
                blocks_CB=blocks_CB,
            )
        )
    return runs


def progressions(equal: NDArray[np.bool_], step_J2: Ints) -> Iterator[tuple[int, int]]:
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
