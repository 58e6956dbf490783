"""The warp of ``hopper``'s backward that loads, in Gluon; imported only where Triton is there.

It fetches tasks, and brings keys and values once for each, then tile after tile of queries with
the gradients of their outputs. Where a tile has a mask it leaves the keys that each query sees.
"""

from __future__ import annotations

from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
    mbarrier,
    tma,
)

from longspan.ops.kernels._hopper_back_tiles import next_of_two, part_of, task, whose
from longspan.ops.kernels._hopper_tiles import copy, entry, meet

# Of one warp.
_WARP = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))


@gluon.jit
def load(descs, tiles, fixed, work, bounds, fetched):
    k_room, v_room, task_room, kv_full, kv_empty = fixed
    tasks, parts, entries, count = work
    size: gl.constexpr = 128 * k_room.shape[4] * 2
    place, phase, kv_phase = 0, 0, 0
    t = gl.program_id(0)
    while t < count:
        key, k_head, batch, part, last = task(tasks, t)
        mbarrier.wait(kv_empty, kv_phase ^ 1)
        _tell(task_room, t)
        mbarrier.expect(kv_full, 2 * size)
        for half in gl.static_range(2):
            row = key + 64 * half
            copy(descs[1], batch, k_head, row, 0, kv_full, k_room.index(half))
            copy(descs[2], batch, k_head, row, 0, kv_full, v_room.index(half))
        kv_phase ^= 1
        bound = gl.load(tasks + 7 * t + 6)
        for x in range(part, last):
            first, masked, length = part_of(parts, x)
            head, q_batch = whose(parts, x)
            row, about = entry(entries, first)
            for j in range(length):
                # Read before it is needed.
                row1, about1 = entry(entries, first + j + 1)
                where = (q_batch, head, row, about, bound)
                place, phase = _bring(descs, tiles, bounds, where, place, phase, j < masked)
                row, about = row1, about1
        t = gl.num_programs(0) + gl.atomic_add(fetched, 1)
    mbarrier.wait(kv_empty, kv_phase ^ 1)
    _tell(task_room, t)
    mbarrier.arrive(kv_full, count=1)


@gluon.jit
def _tell(room, t):
    room.store(gl.full([1], t, gl.int32, _WARP))
    meet()


@gluon.jit
def _bring(descs, tiles, bounds, where, place, phase, masked):
    q_desc, dout_desc, rows_desc = descs[0], descs[3], descs[4]
    q_room, dout_room, row_room, seen_room, kind_room, full, empty = tiles
    lo, hi, rows = bounds
    batch, head, row, about, key = where
    bar = full.index(place)
    mbarrier.wait(empty.index(place), phase ^ 1)
    at = [batch, head, row, 0]
    tma.async_copy_global_to_shared(q_desc, at, bar, q_room.index(place))
    at_rows = [batch, head, 0, row]
    tma.async_copy_global_to_shared(rows_desc, at_rows, bar, row_room.index(place))
    tma.async_copy_global_to_shared(dout_desc, at, bar, dout_room.index(place))
    if masked:
        i = row + gl.arange(0, 64, _WARP)
        at_i = (about >> 4).to(gl.int64) * rows + i
        begin = gl.load(lo + at_i, mask=i < rows, other=0) - key
        end = gl.load(hi + at_i, mask=i < rows, other=0) - key
        begin = gl.minimum(gl.maximum(begin, 0), 128)
        end = gl.minimum(gl.maximum(end, 0), 128)
        length = gl.maximum(end - begin, 0)
        seen_room.index(place).store(begin + (length << 16))
        kind_room.index(place).store(gl.full([1], about & 15, gl.int32, _WARP))
        # All threads have written before one of them says so.
        meet()
    mbarrier.expect(bar, 2 * 64 * q_room.shape[4] * 2 + 2 * 64 * 4)
    return next_of_two(place, phase)
