"""The warp of ``hopper``'s forward that loads, in Gluon; imported only where Triton is there.

It fetches tasks, leaves the numbers of each beside its queries, and brings the tiles of keys and
values that its entries name: the scores of a tile are computed before the values of the tile
before it are needed. What tasks and entries are is in ``_hopper_forward``.
"""

from __future__ import annotations

from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
    mbarrier,
    tma,
)

from longspan.ops.kernels._hopper_tiles import copy, meet, next_place

# Numbers that each thread of one warp has.
_EIGHT = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
# Of the task behind the last one.
_NO_ROW = gl.constexpr(1 << 30)


@gluon.jit
def load(descs, rings, told, work, stretches):
    """Tiles of 128 keys."""
    q_desc, k_descs, v_descs = descs
    queries, keys, values = rings
    fetched, tasks, entries, count, group, step = work
    place, phase, v_place, v_phase, q_place, q_phase = 0, 0, 0, 0, 0, 0
    number = gl.arange(0, 8, _EIGHT)
    t = gl.program_id(0)
    while t < count:
        at = tasks + t * 8
        row, head, batch, first = gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)
        tiles, key = gl.load(at + 5), gl.load(at + 6)
        # That of the output says which part of the keys it is of, too. With a sign, the division
        # takes more registers than this warp has.
        batch = (batch.to(gl.uint32) % q_desc.shape[0].to(gl.uint32)).to(gl.int32)
        whole = gl.load(at + number)
        k_head, k_batch = head // group, batch * step
        q_at = batch, head, row, 0, 64
        q_place, q_phase = _bring_queries(q_desc, q_at, queries, told, whole, q_place, q_phase)
        # The keys of a tile are needed before the values of the tile before it.
        whose, key = _lies(key, k_batch, stretches, len(k_descs))
        place, phase = _bring(k_descs, whose, k_head, key, keys, place, phase)
        for j in range(1, tiles):
            after = gl.load(entries + 2 * (first + j))
            whose_after, after = _lies(after, k_batch, stretches, len(k_descs))
            place, phase = _bring(k_descs, whose_after, k_head, after, keys, place, phase)
            v_place, v_phase = _bring(v_descs, whose, k_head, key, values, v_place, v_phase)
            whose, key = whose_after, after
        v_place, v_phase = _bring(v_descs, whose, k_head, key, values, v_place, v_phase)
        t = gl.num_programs(0) + gl.atomic_add(fetched, 1)
    _end(queries, told, number, q_place, q_phase)


@gluon.jit
def load_pairs(descs, rings, told, work, stretches):
    """Tiles of two times 64 keys, for one head or two."""
    q_desc, k_descs, v_descs = descs
    queries, keys, values = rings
    fetched, tasks, entries, count, group, step = work
    place, phase, v_place, v_phase, q_place, q_phase = 0, 0, 0, 0, 0, 0
    number = gl.arange(0, 16, _EIGHT)
    t = gl.program_id(0)
    while t < count:
        at = tasks + t * 16
        row, head, batch, first = gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)
        tiles, key, other = gl.load(at + 5), gl.load(at + 6), gl.load(at + 8)
        whole = gl.load(at + number)
        k_head, k_batch = head // group, batch * step
        q_at = batch, head, row, 1, 0
        q_place, q_phase = _bring_queries(q_desc, q_at, queries, told, whole, q_place, q_phase)
        pair = _lie(key, other, k_batch, stretches, len(k_descs))
        place, phase = _bring_pair(k_descs, pair, k_head, keys, place, phase)
        for j in range(1, tiles):
            next_entry = entries + 4 * (first + j)
            after, other = gl.load(next_entry), gl.load(next_entry + 2)
            after = _lie(after, other, k_batch, stretches, len(k_descs))
            place, phase = _bring_pair(k_descs, after, k_head, keys, place, phase)
            v_place, v_phase = _bring_pair(v_descs, pair, k_head, values, v_place, v_phase)
            pair = after
        v_place, v_phase = _bring_pair(v_descs, pair, k_head, values, v_place, v_phase)
        t = gl.num_programs(0) + gl.atomic_add(fetched, 1)
    _end(queries, told, number, q_place, q_phase)


@gluon.jit
def _bring_queries(desc, at, queries, told, whole, place, phase):
    """Those of each group of warps, which are some heads and rows apart, and their task."""
    room, full, empty = queries
    groups: gl.constexpr = room.shape[0] // 2
    batch, head, row, heads_on, rows_on = at
    mbarrier.wait(empty.index(place), phase ^ 1)
    told.index(place).store(whole)
    # All threads have written before one of them says so.
    meet()
    mbarrier.expect(full.index(place), 64 * groups * room.shape[4] * 2)
    for half in gl.static_range(groups):
        from_row = [batch, head + heads_on * half, row + rows_on * half, 0]
        to = room.index(groups * place + half)
        tma.async_copy_global_to_shared(desc, from_row, full.index(place), to)
    return next_place(queries, place, phase)


@gluon.jit
def _end(queries, told, number, place, phase):
    """Say that there is no further task."""
    _room, full, empty = queries
    mbarrier.wait(empty.index(place), phase ^ 1)
    told.index(place).store(gl.where(number == 0, _NO_ROW, 0))
    meet()
    mbarrier.arrive(full.index(place), count=1)


@gluon.jit
def _lies(key, batch, stretches, tensors: gl.constexpr):
    """The batch row of a key, and its row there; ~ of it in the second one of two tensors."""
    length, border = stretches
    if tensors == 1:
        more = (key.to(gl.uint32) // length.to(gl.uint32)).to(gl.int32)
        whose, row = batch + more, key - more * length
    else:
        whose, row = batch, key
        # Branches: a division takes long, and few keys need one.
        if key >= border:
            row = key - border
            if row >= length:
                more = (row.to(gl.uint32) // length.to(gl.uint32)).to(gl.int32)
                whose += more
                row -= more * length
            whose = ~whose
    return whose, row


@gluon.jit
def _lie(key, other, batch, stretches, tensors: gl.constexpr):
    """The same of both halves of a tile; of one tensor, as keys of a batch row are counted."""
    if tensors == 1:
        pair = (batch, key), (batch, other)
    else:
        pair = _lies(key, batch, stretches, 2), _lies(other, batch, stretches, 2)
    return pair


@gluon.jit
def _bring(descs, whose, head, row, ring, place, phase):
    room, full, empty = ring
    mbarrier.wait(empty.index(place), phase ^ 1)
    mbarrier.expect(full.index(place), 128 * room.shape[4] * 2)
    copy(descs, whose, head, row, 0, full.index(place), room.index(place))
    return next_place(ring, place, phase)


@gluon.jit
def _bring_pair(descs, pair, head, ring, place, phase):
    """Two times 64 rows, 64 columns at a time, where those of one tile would lie."""
    room, full, empty = ring
    panels: gl.constexpr = room.shape[4] // 64
    mbarrier.wait(empty.index(place), phase ^ 1)
    mbarrier.expect(full.index(place), 128 * room.shape[4] * 2)
    rooms = room.index(place)._reinterpret(room.dtype, [2 * panels, 1, 1, 64, 64], room.layout)
    for panel in gl.static_range(panels):
        for half in gl.static_range(2):
            whose, row = pair[half]
            to = rooms.index(2 * panel + half)
            copy(descs, whose, head, row, 64 * panel, full.index(place), to)
    return next_place(ring, place, phase)
