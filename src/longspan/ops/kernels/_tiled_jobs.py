"""The jobs of one range group: spans of keys that tiles of query rows have to look at.

Each tile's ranges are joined to a few segments. What all rows of a tile look at, or nearly all, is
one job; what is left is looked at by each half of the tile, then by each quarter, down to leaves:
high jobs are few and multiply faster, low ones compute less in vain.

Axes: t tiles of T rows, m ranges per query, X = T m, r rows, S segments, L leaves of a tile, G
groups of l leaves, P pieces of segments, J jobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
# Tile, first key, one past the last key, first leaf and number of leaves of each piece.
Pieces = tuple[Ints, Ints, Ints, Ints, Ints]

# Spans begin and end at multiples of this where they can: whole vector registers, and equal
# shapes more often.
ALIGN = 16
# Jobs of this many keys are not split.
LEAST = 256
# Keys that nobody in the tile sees are computed rather than skipped when they are fewer than this.
_GAP = 64
# Leaves that look at nearly the same keys do it together: if that adds no more than this share.
_WASTE = 0.1
# Otherwise they share what they have in common from this many keys on: fewer are not worth a call
# of their own.
_COMMON = 640
# A tile is halved when its leaves would look at this many times the keys of their own segments.
_RAGGED = 1.25
_FAR = 1 << 40


@dataclass(frozen=True, slots=True)
class Jobs:
    """Jobs of one group with equally many rows, unordered.

    Attributes:
        rows: query rows T of each.
        row_J, key_J: first row and first key; if the keys are gathered, the place of the first one
            in ``blocks_X``.
        shape_J4: wave, span, left, right: every row sees every column from left up to right. Jobs
            of a wave have no rows in common; waves go in order.
        bounds_JX: first and last columns of each row's ranges, in columns of the job [2, T, m];
            zero where there is nothing to mask.
        blocks_X: blocks of ALIGN keys that jobs have side by side, if these are gathered.
    """

    rows: int
    row_J: Ints
    key_J: Ints
    shape_J4: Ints
    bounds_JX: NDArray[np.int32]
    blocks_X: Ints | None = None


def find_jobs(
    row_t: Ints, lo_tTm: Ints, hi_tTm: Ints, keys: int, leaf: int, job: int
) -> Iterator[Jobs]:
    """All jobs of tiles with the given first rows and ranges, over ``keys`` key rows.

    Args:
        leaf: rows of the lowest job; tiles are one leaf high, or 2, 4, 8, ... leaves.
        job: most scores of a job that has more than LEAST keys.
    """
    _, height, width = lo_tTm.shape
    if height > leaf:
        ragged_t = _ragged(lo_tTm, hi_tTm, keys, leaf)
        if ragged_t.any():
            half = height // 2
            row_h = (row_t[ragged_t, None] + np.array([0, half])).ravel()
            lo_hTm, hi_hTm = (x[ragged_t].reshape(-1, half, width) for x in (lo_tTm, hi_tTm))
            yield from find_jobs(row_h, lo_hTm, hi_hTm, keys, leaf, job)
            row_t, lo_tTm, hi_tTm = (x[~ragged_t] for x in (row_t, lo_tTm, hi_tTm))
    if len(row_t):
        yield from _jobs(row_t, lo_tTm, hi_tTm, keys, leaf, job)


def _jobs(
    row_t: Ints, lo_tTm: Ints, hi_tTm: Ints, keys: int, leaf: int, job: int
) -> Iterator[Jobs]:
    """The jobs of tiles that are as high as they should be."""
    leaf = min(leaf, lo_tTm.shape[1])
    return cut_pieces(row_t, lo_tTm, hi_tTm, _pieces(lo_tTm, hi_tTm, keys, leaf), leaf, job)


def cut_pieces(
    row_t: Ints, lo_tTm: Ints, hi_tTm: Ints, pieces: Pieces, leaf: int, job: int
) -> Iterator[Jobs]:
    """The jobs of pieces; those of equal height come together."""
    tiles, height, width = lo_tTm.shape
    tile_P, start_P, stop_P, first_P, leaves_P = pieces

    # Long pieces are cut into jobs of limited span.
    most_P = np.maximum(job // (leaves_P * leaf) // ALIGN * ALIGN, LEAST)
    cuts_P = -(-(stop_P - start_P) // most_P)
    piece_J = np.repeat(np.arange(len(tile_P)), cuts_P)
    cut_J = np.arange(len(piece_J)) - np.repeat(np.cumsum(cuts_P) - cuts_P, cuts_P)
    key_J = start_P[piece_J] + cut_J * most_P[piece_J]
    span_J = np.minimum(stop_P[piece_J] - key_J, most_P[piece_J])
    tile_J, first_J, leaves_J = tile_P[piece_J], first_P[piece_J], leaves_P[piece_J]
    wave_J = _waves(tile_J, first_J, leaves_J)
    place_J = tile_J * height + first_J * leaf

    lo_rm, hi_rm = lo_tTm.reshape(tiles * height, width), hi_tTm.reshape(tiles * height, width)
    for leaves in np.unique(leaves_P).tolist():
        own = leaves_J == leaves
        rows, key, span = leaves * leaf, key_J[own], span_J[own]
        row_JT = place_J[own, None] + np.arange(rows)
        lo_JTm, hi_JTm = (
            np.clip(x_rm[row_JT] - key[:, None, None], 0, span[:, None, None])
            for x_rm in (lo_rm, hi_rm)
        )
        seen_JTm = lo_JTm < hi_JTm
        left_J = np.where(seen_JTm, lo_JTm, 0).max(axis=(1, 2))
        right_J = np.where(seen_JTm, hi_JTm, _FAR).min(axis=(1, 2))
        # A row with no range here, or several, leaves nothing that all rows are known to see.
        none_J = (seen_JTm.sum(axis=2) != 1).any(axis=1) | (left_J >= right_J)
        left_J, right_J = np.where(none_J, span, left_J), np.where(none_J, span, right_J)
        keep_JTm = seen_JTm & ((left_J > 0) | (right_J < span))[:, None, None]
        bounds_J2Tm = np.stack([lo_JTm * keep_JTm, hi_JTm * keep_JTm], axis=1)
        yield Jobs(
            rows,
            row_t[tile_J[own]] + first_J[own] * leaf,
            key,
            np.stack([wave_J[own], span, left_J, right_J], axis=1),
            bounds_J2Tm.astype(np.int32).reshape(len(key), 2 * rows * width),
        )


def _pieces(lo_tTm: Ints, hi_tTm: Ints, keys: int, leaf: int) -> Pieces:
    """What has to be looked at: keys that all leaves of a tile look at, what is left of them for
    each half, and so on down to the leaves.

    Returns:
        For each piece, tiles ascending, high pieces before low ones: its tile, its first key, one
        past its last key, its first leaf and the number of its leaves.
    """
    tile_S, start_SL, stop_SL = _hulls(lo_tTm, hi_tTm, keys, leaf)
    leaves = start_SL.shape[1]

    found: list[Ints] = []
    # What higher pieces already look at.
    left_SG = right_SG = np.full((len(tile_S), 1), _FAR)
    for size in (leaves >> i for i in range(leaves.bit_length())):
        groups = (len(tile_S), leaves // size, size)
        start_SGl, stop_SGl = start_SL.reshape(groups), stop_SL.reshape(groups)
        first_SG, last_SG = start_SGl.min(axis=2), stop_SGl.max(axis=2)
        sum_SG = np.maximum(stop_SGl - start_SGl, 0).sum(axis=2)
        near_SG = size * (last_SG - first_SG) <= (1 + _WASTE) * sum_SG
        start_SG = np.where(near_SG, first_SG, start_SGl.max(axis=2))
        stop_SG = np.where(near_SG, last_SG, stop_SGl.min(axis=2))
        good_SG = (near_SG | (stop_SG - start_SG >= _COMMON)) & (start_SG < stop_SG)
        # Left and right of it, or all at once.
        lone_SG = left_SG == _FAR
        bounds = ((start_SG, np.where(lone_SG, stop_SG, left_SG)), (right_SG, stop_SG))
        for begin_SG, end_SG in bounds:
            used_SG = good_SG & (begin_SG < end_SG)
            segment_P, group_P = np.nonzero(used_SG)
            piece_P = (
                tile_S[segment_P],
                begin_SG[used_SG],
                end_SG[used_SG],
                group_P * size,
                np.full_like(group_P, size),
            )
            found.append(np.stack(piece_P))
        left_SG = np.where(good_SG, np.minimum(start_SG, left_SG), left_SG)
        right_SG = np.where(
            good_SG, np.where(lone_SG, stop_SG, np.maximum(stop_SG, right_SG)), right_SG
        )
        left_SG, right_SG = (np.repeat(x, 2, axis=1) for x in (left_SG, right_SG))
    found_5P = np.concatenate(found, axis=1)
    order_P = np.argsort(found_5P[0], kind="stable")
    tile_P, start_P, stop_P, first_P, leaves_P = found_5P[:, order_P]
    return tile_P, start_P, stop_P, first_P, leaves_P


def _hulls(lo_tTm: Ints, hi_tTm: Ints, keys: int, leaf: int) -> tuple[Ints, Ints, Ints]:
    """What each leaf sees of each segment of its tile, from the first key to the last.

    Returns:
        tile of each segment; first key [S, L], and one past the last one, which is less where a
        leaf sees nothing.
    """
    tile_S, start_S, stop_S = segments(lo_tTm, hi_tTm)
    leaves = lo_tTm.shape[1] // leaf
    lo_SLX, hi_SLX = (
        x_tTm[tile_S].reshape(len(tile_S), leaves, leaf * x_tTm.shape[2])
        for x_tTm in (lo_tTm, hi_tTm)
    )
    inside_SLX = (lo_SLX < hi_SLX) & (lo_SLX >= start_S[:, None, None])
    inside_SLX &= lo_SLX < stop_S[:, None, None]
    first_SL = np.where(inside_SLX, lo_SLX, _FAR).min(axis=2)
    # Where all rows begin at one key there is nothing to hide on the left, and shapes are equal as
    # counted from there.
    same_SL = first_SL == np.where(inside_SLX, lo_SLX, -_FAR).max(axis=2)
    start_SL = np.where(same_SL, first_SL, first_SL // ALIGN * ALIGN)
    wide_SL = np.where(inside_SLX, hi_SLX, -_FAR).max(axis=2) - start_SL
    stop_SL = np.minimum(start_SL + -(-wide_SL // ALIGN) * ALIGN, keys)
    return tile_S, start_SL, stop_SL


def _ragged(lo_tTm: Ints, hi_tTm: Ints, keys: int, leaf: int) -> NDArray[np.bool_]:
    """Whether the leaves of a tile see so little of its segments that they need their own."""
    tiles, height, width = lo_tTm.shape
    tile_S, start_SL, stop_SL = _hulls(lo_tTm, hi_tTm, keys, leaf)
    whole_S = np.maximum(stop_SL - start_SL, 0).sum(axis=1)
    whole_t = np.bincount(tile_S, whole_S, tiles)
    lo_lTm, hi_lTm = (x.reshape(-1, leaf, width) for x in (lo_tTm, hi_tTm))
    leaf_S, start_S, stop_S = segments(lo_lTm, hi_lTm)
    own_S = -(-stop_S // ALIGN) * ALIGN - start_S // ALIGN * ALIGN
    own_t = np.bincount(leaf_S // (height // leaf), own_S, tiles)
    return whole_t > _RAGGED * own_t


def _waves(tile_J: Ints, first_J: Ints, leaves_J: Ints) -> Ints:
    """How many jobs of a job's leaves come before it.

    Jobs go tile by tile, high ones before low ones: all leaves of a job have as many before it.
    """
    leaf_L = np.unique(first_J)
    on_JL = (first_J[:, None] <= leaf_L) & (leaf_L < (first_J + leaves_J)[:, None])
    before_JL = np.cumsum(on_JL, axis=0) - on_JL
    own_J = np.searchsorted(leaf_L, first_J)
    place_J = np.arange(len(tile_J))
    return before_JL[place_J, own_J] - before_JL[np.searchsorted(tile_J, tile_J), own_J]


def segments(lo_tTm: Ints, hi_tTm: Ints, gap: int = _GAP) -> tuple[Ints, Ints, Ints]:
    """The keys that a tile's rows see, as disjoint segments that lie more than ``gap`` apart.

    Returns:
        For each segment, tiles ascending: its tile, its first key, one past its last key.
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
    opens_tX[:, 1:] &= first_tX[:, 1:] > reach_tX[:, :-1] + gap
    tile_S, column_S = np.nonzero(opens_tX)
    last_S = used_t[tile_S] - 1
    same = tile_S[1:] == tile_S[:-1]
    last_S[:-1][same] = column_S[1:][same] - 1
    return tile_S, first_tX[tile_S, column_S], reach_tX[tile_S, last_S]
