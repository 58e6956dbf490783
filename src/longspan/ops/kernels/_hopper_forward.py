"""The kernel of ``hopper`` in Gluon; imported only where Triton is there.

    s_ij = scale q_i . k_j     lse_i = log sum_j exp(s_ij)     out_i = sum_j exp(s_ij - lse_i) v_j

FlashAttention-3 (Shah et al., arXiv 2407.08608): in each program one warp loads tiles, and two
groups of four warps multiply, each 64 of a task's 128 queries. The product of the weights of a
tile of keys with their values runs beside the scores of the next tile and their softmax. Where
rows are short, what happens once for a task decides, and that is where this one differs:

* Programs persist and go through a list of tasks. Queries have two places, keys and values a ring
  of places, so that the next task is loaded while the last one is computed and written.
* What the next task needs to begin (where it lies, the bounds in its first tile) is read before
  the last product of this one.
* Outputs leave through the place of their own queries, and nobody waits for them until the next
  task has its first scores.

A task is int32 [8]: first query, query head, batch row, first entry, entries with a mask, entries,
and the first entry itself. An entry is int32 [2]: the first of 128 keys, which may be any, and the
row of ``lo`` and ``hi`` that says which of them each query sees. Entries with a mask, at least
one, come first; the others do not read the bounds. 4 D flops for each pair of a tile.

Tiles have 128 queries or keys and ``width`` columns, 64 or 128: beyond the end of a tensor, zeros
are read and nothing is written. Offsets of rows are 64-bit.
"""

from __future__ import annotations

from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language.nvidia import (  # pyright: ignore[reportMissingImports]
    hopper,
)
from triton.experimental.gluon.language.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
    mbarrier,
    tma,
)

_LN_2 = gl.constexpr(0.6931471805599453)
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, _SCORES.value, 2))
_BY_ROW = gl.constexpr(gl.SliceLayout(1, _SCORES.value))
_BY_KEY = gl.constexpr(gl.SliceLayout(0, _SCORES.value))


@gluon.jit(
    do_not_specialize=["count", "rows", "heads", "group"],
    do_not_specialize_on_alignment=["lse", "tasks", "entries", "lo", "hi"],
)
def forward(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse,
    tasks,
    entries,
    lo,
    hi,
    count,
    rows,
    heads,
    group,
    scale,
    places: gl.constexpr,
    width: gl.constexpr,
):
    queries = _ring(q_desc, 2, 2, 64, width)
    keys = _ring(k_desc, places, 1, 128, width)
    work = (tasks, entries, count)
    results = (out_desc, lse, rows, heads)
    bounds = (lo, hi, rows)
    gl.warp_specialize(
        [
            (_multiply, (0, queries, keys, work, bounds, results, scale)),
            (_multiply, (1, queries, keys, work, bounds, results, scale)),
            (_load, (q_desc, k_desc, v_desc, queries, keys, work, group)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _ring(
    desc, places: gl.constexpr, tiles: gl.constexpr, rows: gl.constexpr, width: gl.constexpr
):
    """Places of some tiles each, with a barrier for full and one for empty."""
    room = gl.allocate_shared_memory(desc.dtype, [places * tiles, 1, 1, rows, width], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(places):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return room, full, empty


@gluon.jit
def _next(ring, place, phase):
    turn = place + 1 == ring[2].shape[0]
    return gl.where(turn, 0, place + 1), gl.where(turn, phase ^ 1, phase)


@gluon.jit
def _task(tasks, t):
    at = tasks + t * 8
    row, head, batch, first = gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)
    masked, tiles, key, plane = gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7)
    return row, head, batch, first, masked, tiles, key, plane


# One warp loads.


@gluon.jit
def _load(q_desc, k_desc, v_desc, queries, keys, work, group):
    tasks, entries, count = work
    room, full, empty = queries
    place, phase, q_place, q_phase = 0, 0, 0, 0
    t = gl.program_id(0)
    while t < count:
        row, head, batch, first, _, tiles, key, _ = _task(tasks, t)
        k_head = head // group
        mbarrier.wait(empty.index(q_place), q_phase ^ 1)
        mbarrier.expect(full.index(q_place), 128 * room.shape[4] * 2)
        for half in gl.static_range(2):
            at = [batch, head, row + 64 * half, 0]
            to = room.index(2 * q_place + half)
            tma.async_copy_global_to_shared(q_desc, at, full.index(q_place), to)
        q_place, q_phase = _next(queries, q_place, q_phase)
        # The keys of a tile are needed before the values of the tile before it.
        place, phase = _bring(k_desc, batch, k_head, key, keys, place, phase)
        for j in range(1, tiles):
            after = gl.load(entries + 2 * (first + j))
            place, phase = _bring(k_desc, batch, k_head, after, keys, place, phase)
            place, phase = _bring(v_desc, batch, k_head, key, keys, place, phase)
            key = after
        place, phase = _bring(v_desc, batch, k_head, key, keys, place, phase)
        t += gl.num_programs(0)


@gluon.jit
def _bring(desc, batch, head, row, ring, place, phase):
    room, full, empty = ring
    mbarrier.wait(empty.index(place), phase ^ 1)
    mbarrier.expect(full.index(place), 128 * room.shape[4] * 2)
    at = [batch, head, row, 0]
    tma.async_copy_global_to_shared(desc, at, full.index(place), room.index(place))
    return _next(ring, place, phase)


# Two groups of warps multiply.


@gluon.jit
def _multiply(half: gl.constexpr, queries, keys, work, bounds, results, scale):
    width: gl.constexpr = queries[0].shape[4]
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    tasks, entries, count = work
    room, full, empty = queries
    place, phase, q_place, q_phase = 0, 0, 0, 0
    t = gl.program_id(0)
    step = gl.num_programs(0)
    row, head, batch, first, masked, tiles, key, plane = _task(tasks, t)
    begin, end = _seen(bounds, plane, row + 64 * half)
    while t < count:
        # The next task and the next entry are read long before they are needed.
        ahead = _task(tasks, gl.minimum(t + step, count - 1))
        key1, plane1 = _entry(entries, first + 1)
        mbarrier.wait(full.index(q_place), q_phase)
        q_room = room.index(2 * q_place + half)
        q = q_room.reshape([64, width])
        scores = _times_keys(q, keys, place, phase)
        # The output of the last task has left: its place is free.
        tma.store_wait(0)
        mbarrier.arrive(empty.index(q_place ^ 1), count=1, pred=t >= step)
        s = hopper.warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(keys[2].index(place), count=1)
        place, phase = _next(keys, place, phase)
        top = gl.full([64], float("-inf"), gl.float32, _BY_ROW)
        total = gl.zeros([64], gl.float32, _BY_ROW)
        p, _, top, total = _softmax(_mask(s, key, begin, end), top, total, scale)
        flow = place, phase, gl.zeros([64, width], gl.float32, sums), _weights(p, q), top, total
        for j in range(1, masked):
            key, plane = key1, plane1
            begin, end = _seen(bounds, plane, row + 64 * half)
            key1, plane1 = _entry(entries, first + j + 1)
            flow = _step(q, keys, flow, scale, key, begin, end, True)
        for _ in range(masked, tiles):
            flow = _step(q, keys, flow, scale, key, begin, end, False)
        place, phase, acc, p, top, total = flow
        out_batch, out_head, out_row = batch, head, row + 64 * half
        row, head, batch, first, masked, tiles, key, plane = ahead
        begin, end = _seen(bounds, plane, row + 64 * half)
        product = _plus_values(p, acc, keys, place, phase)
        acc = hopper.warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(keys[2].index(place), count=1)
        place, phase = _next(keys, place, phase)
        # A row without keys is 0, whatever the keys hold that it was masked from.
        weight = gl.convert_layout(total, gl.SliceLayout(1, sums))
        share = 1.0 / weight
        acc = gl.where(weight[:, None] == 0.0, 0.0, acc * share[:, None])
        q.store(acc.to(q.dtype))
        hopper.fence_async_shared()
        _put(results, out_batch, out_head, out_row, q_room, top, total)
        q_place, q_phase = _next(queries, q_place, q_phase)
        t += step
    tma.store_wait(0)


@gluon.jit
def _step(q, keys, flow, scale, key, begin, end, masked: gl.constexpr):
    """Scores and weights of a tile, while the weights of the last one meet their values."""
    place, phase, acc, p, top, total = flow
    empty = keys[2]
    scores = _times_keys(q, keys, place, phase)
    v_place, v_phase = _next(keys, place, phase)
    product = _plus_values(p, acc, keys, v_place, v_phase)
    s = hopper.warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(empty.index(place), count=1)
    if masked:
        s = _mask(s, key, begin, end)
    p, shrink, top, total = _softmax(s, top, total, scale)
    acc = hopper.warpgroup_mma_wait(0, deps=(product,))
    mbarrier.arrive(empty.index(v_place), count=1)
    place, phase = _next(keys, v_place, v_phase)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))
    return place, phase, acc * shrink[:, None], _weights(p, q), top, total


@gluon.jit
def _times_keys(q, keys, place, phase):
    room, full, _ = keys
    mbarrier.wait(full.index(place), phase)
    k = room.index(place).reshape([128, room.shape[4]])
    zero = gl.zeros([64, 128], gl.float32, _SCORES)
    return hopper.warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _plus_values(p, acc, keys, place, phase):
    room, full, _ = keys
    mbarrier.wait(full.index(place), phase)
    v = room.index(place).reshape([128, room.shape[4]])
    return hopper.warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def _weights(p, q):
    """As the left side of a product."""
    return gl.convert_layout(p.to(q.dtype), _WEIGHTS)


@gluon.jit
def _entry(entries, at):
    return gl.load(entries + 2 * at), gl.load(entries + 2 * at + 1)


@gluon.jit
def _seen(bounds, plane, row):
    """From where to where 64 queries see keys of a range."""
    lo, hi, rows = bounds
    i = row + gl.arange(0, 64, _BY_ROW)
    at = plane.to(gl.int64) * rows + i
    return gl.load(lo + at, mask=i < rows, other=0), gl.load(hi + at, mask=i < rows, other=0)


@gluon.jit
def _mask(s, key, begin, end):
    j = key + gl.arange(0, 128, _BY_KEY)[None, :]
    return gl.where((j >= begin[:, None]) & (j < end[:, None]), s, float("-inf"))


@gluon.jit
def _softmax(s, top, total, scale):
    """Weights, what earlier weights shrink by, and the greatest logit and the sum so far.

    In powers of two. A row that has seen no key yet has the greatest logit -inf and the sum 0.
    """
    new = gl.maximum(top, gl.max(s, 1) * scale)
    base = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(s * scale - base[:, None])
    shrink = gl.exp2(top - base)
    return p, shrink, new, total * shrink + gl.sum(p, 1)


@gluon.jit
def _put(results, batch, head, row, out_room, top, total):
    """Send an output on its way, and its log-sum-exp."""
    out_desc, lse, rows, heads = results
    tma.async_copy_shared_to_global(out_desc, [batch, head, row, 0], out_room)
    i = row + gl.arange(0, 64, _BY_ROW)
    found = gl.where(total == 0.0, float("-inf"), top * _LN_2 + gl.log(total))
    gl.store(lse + (batch.to(gl.int64) * heads + head) * rows + i, found, mask=i < rows)
