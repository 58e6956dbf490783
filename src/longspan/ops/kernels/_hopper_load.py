"""The warp of ``hopper``'s forward that loads, in Gluon; imported only where Triton is there.

It fetches tasks, leaves the numbers of each beside its queries, and brings the tiles of keys and
values that its entries name: the scores of a tile are computed before the values of the tile
before it are needed. What tasks and entries are is in ``_hopper_forward``.

Programs of a cluster have tasks that follow each other in the list and read the same tiles: those
of query heads, or of batch rows, that share keys. The first program copies all keys, to itself and
to the others, the second one all values. So a place is empty when all groups of warps of all of
them have said so, and each program expects what another one copies (see ``_hopper_cluster``). The
first one fetches tasks for all, a set ahead, so that no program waits for another one to fetch.

``fetched``, all zeros at first, begins with the number of tasks, or of sets of them, that have
been fetched. Each cluster has eight more numbers behind the first eight: how many of its programs
have begun, and from the fifth on the first tasks of four sets by turns. No set is forgotten before
all have seen it: a program has places for the queries of two tasks, and finishes none without what
the others copy, so that it is two sets ahead at most.
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
# Sets of tasks that a cluster remembers.
_TURNS = gl.constexpr(4)
# Of the task behind the last one.
_NO_ROW = gl.constexpr(1 << 30)


@gluon.jit
def begin(fetched, cluster: gl.constexpr):
    """Let no program of a cluster signal to another one whose barriers are not there yet."""
    if cluster > 1:
        # What is added comes out of the fence, so that no program is counted before it.
        code: gl.constexpr = (
            "fence.mbarrier_init.release.cluster; fence.proxy.async; mov.b32 $0, $1;"
        )
        one = gl.inline_asm_elementwise(code, "=r,r", [1], gl.int32, is_pure=False, pack=1)
        meet()
        begun = _board(fetched, cluster)
        seen = gl.atomic_add(begun, one) + 1
        while seen < cluster:
            seen = gl.atomic_add(begun, 0)


@gluon.jit
def _board(fetched, cluster: gl.constexpr):
    return fetched + 8 + 8 * (gl.program_id(0) // cluster)


@gluon.jit
def _is(rank: gl.constexpr, cluster: gl.constexpr):
    """Whether this is the program of its cluster with that number; one alone is all of them."""
    found = True
    if cluster > 1:
        found = gl.program_id(0) % cluster == rank
    return found


@gluon.jit
def _offer_task(fetched, turn, cluster: gl.constexpr):
    """Fetch the next tasks for all programs of a cluster.

    Once for each task, when its first keys are on their way: nothing of it waits for the number.
    """
    if cluster > 1 and gl.program_id(0) % cluster == 0:
        t = gl.num_programs(0) + cluster * gl.atomic_add(fetched, 1, sem="relaxed")
        gl.atomic_xchg(_board(fetched, cluster) + 4 + turn % _TURNS, t, sem="relaxed")


@gluon.jit
def _next_task(fetched, t, turn, cluster: gl.constexpr):
    if cluster > 1:
        # Those of a cluster go up, so that one of four turns ago is none.
        found = t
        while found <= t:
            found = gl.load(_board(fetched, cluster) + 4 + turn % _TURNS, volatile=True)
        found += gl.program_id(0) % cluster
    else:
        found = gl.num_programs(0) + gl.atomic_add(fetched, 1)
    return found


@gluon.jit
def _wait_for_readers(ring, place, phase, cluster: gl.constexpr):
    """Let all programs have said what they will, and all copies have arrived.

    A program that has ended has no barriers and no places. To be called when the others know that
    there is no further task: they hold their last place until then.
    """
    if cluster > 1:
        for _ in range(ring[2].shape[0]):
            mbarrier.wait(ring[2].index(place), phase ^ 1)
            place, phase = next_place(ring, place, phase)


@gluon.jit
def load(descs, rings, told, work, stretches, cluster: gl.constexpr):
    """Tiles of 128 keys."""
    q_desc, k_descs, v_descs = descs
    queries, keys, values = rings
    fetched, tasks, entries, count, group, step = work
    place, phase, v_place, v_phase, q_place, q_phase, turn = 0, 0, 0, 0, 0, 0, 0
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
        place, phase = _bring(k_descs, whose, k_head, key, keys, place, phase, 0, cluster)
        _offer_task(fetched, turn, cluster)
        for j in range(1, tiles):
            after = gl.load(entries + 2 * (first + j))
            whose_after, after = _lies(after, k_batch, stretches, len(k_descs))
            place, phase = _bring(
                k_descs, whose_after, k_head, after, keys, place, phase, 0, cluster
            )
            v_place, v_phase = _bring(
                v_descs, whose, k_head, key, values, v_place, v_phase, 1, cluster
            )
            whose, key = whose_after, after
        v_place, v_phase = _bring(
            v_descs, whose, k_head, key, values, v_place, v_phase, 1, cluster
        )
        t = _next_task(fetched, t, turn, cluster)
        turn += 1
    _end(queries, told, number, q_place, q_phase)
    _wait_for_readers(keys, place, phase, cluster)
    _wait_for_readers(values, v_place, v_phase, cluster)


@gluon.jit
def load_pairs(descs, rings, told, work, stretches, cluster: gl.constexpr):
    """Tiles of two times 64 keys, for two heads."""
    q_desc, k_descs, v_descs = descs
    queries, keys, values = rings
    fetched, tasks, entries, count, group, step = work
    place, phase, v_place, v_phase, q_place, q_phase, turn = 0, 0, 0, 0, 0, 0, 0
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
        whose = k_batch, k_head
        place, phase = _bring_pair(
            k_descs, stretches, whose, key, other, keys, place, phase, 0, cluster
        )
        _offer_task(fetched, turn, cluster)
        for j in range(1, tiles):
            next_entry = entries + 4 * (first + j)
            key1, other1 = gl.load(next_entry), gl.load(next_entry + 2)
            place, phase = _bring_pair(
                k_descs, stretches, whose, key1, other1, keys, place, phase, 0, cluster
            )
            v_place, v_phase = _bring_pair(
                v_descs, stretches, whose, key, other, values, v_place, v_phase, 1, cluster
            )
            key, other = key1, other1
        v_place, v_phase = _bring_pair(
            v_descs, stretches, whose, key, other, values, v_place, v_phase, 1, cluster
        )
        t = _next_task(fetched, t, turn, cluster)
        turn += 1
    _end(queries, told, number, q_place, q_phase)
    _wait_for_readers(keys, place, phase, cluster)
    _wait_for_readers(values, v_place, v_phase, cluster)


@gluon.jit
def _bring_queries(desc, at, queries, told, whole, place, phase):
    """Those of both groups of warps, which are some heads and rows apart, and their task."""
    room, full, empty = queries
    batch, head, row, heads_on, rows_on = at
    mbarrier.wait(empty.index(place), phase ^ 1)
    told.index(place).store(whole)
    # All threads have written before one of them says so.
    meet()
    mbarrier.expect(full.index(place), 128 * room.shape[4] * 2)
    for half in gl.static_range(2):
        from_row = [batch, head + heads_on * half, row + rows_on * half, 0]
        to = room.index(2 * place + half)
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
        behind = key >= border
        row = key - gl.where(behind, border, 0)
        more = (row.to(gl.uint32) // length.to(gl.uint32)).to(gl.int32)
        whose = gl.where(behind, ~(batch + more), batch)
        row -= gl.where(behind, more * length, 0)
    return whose, row


@gluon.jit
def _bring(descs, whose, head, row, ring, place, phase, rank: gl.constexpr, cluster: gl.constexpr):
    room, full, empty = ring
    mbarrier.wait(empty.index(place), phase ^ 1)
    mbarrier.expect(full.index(place), 128 * room.shape[4] * 2)
    own = _is(rank, cluster)
    copy(descs, whose, head, row, 0, full.index(place), room.index(place), own)
    return next_place(ring, place, phase)


@gluon.jit
def _bring_pair(
    descs,
    stretches,
    whose,
    row,
    other,
    ring,
    place,
    phase,
    rank: gl.constexpr,
    cluster: gl.constexpr,
):
    """Two times 64 rows, 64 columns at a time, where those of one tile would lie."""
    batch, head = whose
    room, full, empty = ring
    panels: gl.constexpr = room.shape[4] // 64
    mbarrier.wait(empty.index(place), phase ^ 1)
    mbarrier.expect(full.index(place), 128 * room.shape[4] * 2)
    rooms = room.index(place)._reinterpret(room.dtype, [2 * panels, 1, 1, 64, 64], room.layout)
    for panel in gl.static_range(panels):
        for half in gl.static_range(2):
            whose_key, key = batch, other if half else row
            if len(descs) > 1:
                whose_key, key = _lies(key, batch, stretches, 2)
            to = rooms.index(2 * panel + half)
            copy(
                descs, whose_key, head, key, 64 * panel, full.index(place), to, _is(rank, cluster)
            )
    return next_place(ring, place, phase)
