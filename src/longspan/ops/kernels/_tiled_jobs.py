"""The jobs of one range group: spans of keys that tiles of query rows have to look at.

Each tile's ranges are joined to a few segments. Where neighbouring tiles see mostly the same keys,
those are set apart and the tiles put on top of each other: taller jobs multiply faster and need no
mask. What remains at the edges stays low, so that little is computed in vain.

Axes: t tiles of T rows, m ranges per query, X = T m, S segments, J jobs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Spans begin and end at multiples of this where they can: whole vector registers, and equal
# shapes more often.
ALIGN = 16
# Keys that nobody in the tile sees are computed rather than skipped when they are fewer than this.
_GAP = 64
# Neighbouring tiles that are looked through for common keys.
_BLOCK = 4
# Masks of more numbers than this are not kept: what needs no mask then goes apart from this many
# keys on.
_MASKS = 1 << 22
_UNMASKED = 64
# Query rows of a job at most, bundled heads counted.
_TALLEST = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large jobs may be.

    Attributes:
        span: most keys, a multiple of ALIGN.
        area: most scores of a taller job.
        lines: rows that one tile has with all its heads.
        body: keys that neighbouring tiles must have in common to be multiplied together.
    """

    span: int
    area: int
    lines: int
    body: int


@dataclass(frozen=True, slots=True)
class Jobs:
    """Jobs of one group, unordered.

    Attributes:
        tile_J, key_J: first tile and first key.
        shape_J5: wave, height in tiles, span, left, right: every row sees every column from left
            up to right. Jobs of a wave belong to different tiles; waves of a tile go in order.
        bounds_JX: first and last columns of each row's ranges, in columns of the job [2, T, m];
            zero where there is nothing to mask.
    """

    tile_J: Ints
    key_J: Ints
    shape_J5: Ints
    bounds_JX: NDArray[np.int32]


def find_jobs(lo_tTm: Ints, hi_tTm: Ints, keys: int, limits: Limits) -> Jobs:
    """All jobs of tiles with the given ranges, over ``keys`` key rows."""
    tile_S, start_S, stop_S, left_S, right_S = _segments(lo_tTm, hi_tTm)
    start_S = start_S // ALIGN * ALIGN
    stop_S = np.minimum(-(-stop_S // ALIGN) * ALIGN, keys)

    # What neighbouring tiles all see goes first, then what is left of it and right of it.
    body_S, rest_S = _bodies(tile_S, start_S, stop_S, left_S, right_S, limits)
    first_P = np.stack([body_S, start_S, rest_S], axis=1).ravel()
    length_P = np.stack([rest_S, body_S, stop_S], axis=1).ravel() - first_P

    # Long pieces are cut into jobs of limited span.
    cuts_P = -(-length_P // limits.span)
    piece_J = np.repeat(np.arange(len(first_P)), cuts_P)
    cut_J = np.arange(len(piece_J)) - np.repeat(np.cumsum(cuts_P) - cuts_P, cuts_P)
    segment_J = piece_J // 3
    tile_J = tile_S[segment_J]
    key_J = first_P[piece_J] + cut_J * limits.span
    span_J = np.minimum(length_P[piece_J] - cut_J * limits.span, limits.span)
    left_J = np.clip(left_S[segment_J] - key_J, 0, span_J)
    right_J = np.clip(right_S[segment_J] - key_J, left_J, span_J)
    wave_J = np.arange(len(tile_J)) - np.searchsorted(tile_J, tile_J)

    tallest_J = np.maximum(1, np.minimum(limits.area // span_J, _TALLEST) // limits.lines)
    masked_J = (left_J > 0) | (right_J < span_J)
    first_J, height_J = _stack(tile_J, wave_J, key_J, span_J, ~masked_J, tallest_J)
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
    return Jobs(tile_J, key_J, shape_J5, bounds_JX)


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


def _bodies(
    tile_S: Ints,
    start_S: Ints,
    stop_S: Ints,
    left_S: Ints,
    right_S: Ints,
    limits: Limits,
) -> tuple[Ints, Ints]:
    """Keys that all rows of neighbouring tiles see, if that is much of what each sees.

    Returns:
        First of these keys and one past their last for each segment; the whole segment if none.
    """
    ordinal_S = np.arange(len(tile_S)) - np.searchsorted(tile_S, tile_S)
    order_S = np.lexsort((tile_S, ordinal_S, tile_S // _BLOCK))
    whose_S2 = np.stack([tile_S // _BLOCK, ordinal_S], axis=1)[order_S]
    heads = np.flatnonzero(np.r_[True, (whose_S2[1:] != whose_S2[:-1]).any(axis=1)][: len(tile_S)])
    if not len(heads):
        return start_S, stop_S
    size = np.diff(np.append(heads, len(tile_S)))
    first = -(-np.maximum.reduceat(left_S[order_S], heads) // ALIGN) * ALIGN
    last = np.minimum.reduceat(right_S[order_S], heads) // ALIGN * ALIGN
    longest = np.maximum.reduceat((stop_S - start_S)[order_S], heads)
    looks_S3 = np.stack([stop_S - start_S, left_S - start_S, right_S - start_S], axis=1)
    masks = np.unique(looks_S3, axis=0)[:, 0].sum() * limits.lines
    least = limits.body if masks <= _MASKS else _UNMASKED
    good = (size == _BLOCK) & (last - first >= np.maximum(least, longest / 2))
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
