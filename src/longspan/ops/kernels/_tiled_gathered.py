"""Jobs whose keys are a list instead of one span: for leaves that see many short segments.

Random blocks, selected blocks and single columns lie wherever they were drawn, so that no two
leaves see theirs at constant steps and every segment would be a call of its own, joined to the
others by lse. Here the segments of a leaf stand side by side, in whole blocks of ALIGN keys, and
one call does them all; leaves whose segments add up to the same shape share it.

The ranges are moved to where their keys stand then, behind all keys, and cut as any others are.

Axes: t leaves of T rows, m ranges per query, S segments, J jobs, P pieces, X blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from longspan.ops.kernels._tiled_jobs import ALIGN, Ints, Jobs, cut_pieces, segments

# Longer segments are read where they lie.
_WIDE = 1024


def find_gathered_jobs(
    row_t: Ints, lo_tTm: Ints, hi_tTm: Ints, keys: int, leaf: int, job: int
) -> Iterator[Jobs]:
    """All jobs of tiles, as of ``find_jobs``, one leaf high and with short segments gathered."""
    _, height, width = lo_tTm.shape
    leaf = min(leaf, height)
    row_t = (row_t[:, None] + np.arange(0, height, leaf)).ravel()
    lo_tTm, hi_tTm = (x.reshape(-1, leaf, width) for x in (lo_tTm, hi_tTm))
    seen_tTm = lo_tTm < hi_tTm
    tile_S, start_S, stop_S = segments(
        np.where(seen_tTm, lo_tTm // ALIGN * ALIGN, 0),
        np.where(seen_tTm, -(-hi_tTm // ALIGN) * ALIGN, 0),
        gap=0,
    )
    short_S = stop_S - start_S < _WIDE
    # One alone is a span as it is.
    short_S &= np.bincount(tile_S, short_S, len(row_t))[tile_S] > 1

    # Gathered keys stand behind the last key, and not right behind it.
    behind = (keys // ALIGN + 2) * ALIGN
    size_S = np.where(short_S, stop_S - start_S, 0)
    total_t = np.bincount(tile_S, size_S, len(row_t)).astype(np.int64)
    begin_t = np.cumsum(total_t) - total_t
    place_S = np.cumsum(size_S) - size_S
    shift_S = np.where(short_S, behind + place_S - begin_t[tile_S] - start_S, 0)
    lo_tTm, hi_tTm = _moved(lo_tTm, hi_tTm, tile_S, start_S, shift_S)

    tile_G = np.flatnonzero(total_t)
    tile_P = np.concatenate([tile_G, tile_S[~short_S]])
    start_P = np.concatenate([np.full_like(tile_G, behind), start_S[~short_S]])
    stop_P = np.concatenate([behind + total_t[tile_G], np.minimum(stop_S[~short_S], keys)])
    order_P = np.argsort(tile_P, kind="stable")
    tile_P, start_P, stop_P = (x_P[order_P] for x_P in (tile_P, start_P, stop_P))
    pieces = tile_P, start_P, stop_P, np.zeros_like(tile_P), np.ones_like(tile_P)

    block_X = np.arange(total_t.sum() // ALIGN)
    block_X += np.repeat((start_S - place_S) // ALIGN, size_S // ALIGN)
    for jobs in cut_pieces(row_t, lo_tTm, hi_tTm, pieces, leaf, job):
        for gathered in (False, True):
            own_J = (jobs.key_J >= behind) == gathered
            if not own_J.any():
                continue
            row_J, key_J = jobs.row_J[own_J], jobs.key_J[own_J]
            if gathered:
                begin_J = begin_t[np.searchsorted(row_t, row_J)]
                key_J = (begin_J + key_J - behind) // ALIGN
            yield Jobs(
                jobs.rows,
                row_J,
                key_J,
                jobs.shape_J4[own_J],
                jobs.bounds_JX[own_J],
                block_X if gathered else None,
            )


def _moved(
    lo_tTm: Ints, hi_tTm: Ints, tile_S: Ints, start_S: Ints, shift_S: Ints
) -> tuple[Ints, Ints]:
    """The ranges, moved with their segments; those that come to touch are joined.

    Returns:
        first key of each range, and one past its last one; as few ranges per row as that leaves.
    """
    width = lo_tTm.shape[2]
    seen_tTm = lo_tTm < hi_tTm
    # Tiles one after the other: one search for all.
    far = int(hi_tTm.max(initial=0)) + ALIGN
    tile_t11 = np.arange(len(lo_tTm))[:, None, None]
    segment_tTm = np.searchsorted(tile_S * far + start_S, tile_t11 * far + lo_tTm, "right") - 1
    shift_tTm = shift_S[segment_tTm] if len(shift_S) else 0
    # Ranges of a row are disjoint, so that first and last keys may be sorted apart.
    lo_tTm, hi_tTm = (
        np.sort(np.where(seen_tTm, x + shift_tTm, 0), axis=2) for x in (lo_tTm, hi_tTm)
    )
    for i in range(width - 1, 0, -1):
        lo_tT, hi_tT = lo_tTm[..., i], hi_tTm[..., i]
        joined_tT = (lo_tT == hi_tTm[..., i - 1]) & (lo_tTm[..., i - 1] < lo_tT)
        hi_tTm[..., i - 1] = np.where(joined_tT, hi_tT, hi_tTm[..., i - 1])
        lo_tT[joined_tT] = hi_tT[joined_tT] = 0
    used = max(1, int((lo_tTm < hi_tTm).sum(axis=2).max(initial=0)))
    return np.sort(lo_tTm, axis=2)[..., -used:], np.sort(hi_tTm, axis=2)[..., -used:]
