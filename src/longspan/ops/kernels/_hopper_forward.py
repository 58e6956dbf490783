"""The kernel of ``hopper`` in Gluon; imported only where Triton is there.

    s_ij = scale q_i . k_j     lse_i = log sum_j exp(s_ij)     out_i = sum_j exp(s_ij - lse_i) v_j

FlashAttention-3 (Shah et al., arXiv 2407.08608): in each program one warp loads tiles, and two
groups of four warps multiply, each 64 of a task's 128 queries. The product of the weights of a
tile of keys with their values runs beside the scores of the next tile and their softmax. Where
rows are short, what happens once for a task decides, and that is where this one differs:

* Programs persist and fetch tasks from a list as they finish (see ``_hopper_load``). Queries have
  two places, keys and values a ring of places each, so that the next task is loaded while the last
  one is computed and written; the warp that loads leaves the numbers of a task beside its queries.
* What the next task needs to begin (where it lies, the bounds in its first tile) is read before
  the last product of this one.
* Outputs leave through the place of their own queries, and nobody waits for them until the next
  task has its first scores.
* Weights do not wait for a maximum, which is looked for only where sums of weights tell that a
  logit may exceed that of the first tile by far (see ``_hopper_softmax``).
* Where ranges begin or end, each group of warps computes scores of the half of a tile that its own
  64 queries see, and compares keys with one bound.

A task is int32 [8]: first query, query head, batch row, first entry, how many entries come before
those that all queries see whole, the first one counted, entries, and the first entry itself. The
batch row is that of the output: several tasks may have the same queries and different keys, and
batch rows of the queries are repeated for their outputs. An entry is int32 [2]: the first of 128
keys, which may be any, and 64 times the row of ``lo`` and ``hi`` that says which of them each
query sees, with these bits: two for each group of warps (0 all keys, 1 masked, 2 only the first 64
keys, 3 only the last), 16 if only lower bounds cut, 32 if both do. The first entry is computed
whole. 4 D flops for each pair of a tile or half a tile.

With ``halves`` a task is 64 queries of so many heads, of one or of two neighbours that see the
same keys, and a tile of keys two halves that may lie anywhere (see ``_hopper_pairs``). A task is
then int32 [16], and an entry int32 [4]: the first key of a half and 64 times its row of bounds
with the same bits for either half, but of the first number of bits 1 that the tile has a mask, and
2 that there is no second half. For one head one group of warps multiplies, and a processor has two
programs: while one waits, the other one multiplies.

Tiles have 128 queries or keys and ``width`` columns, 64 or 128: beyond the end of a tensor, zeros
are read and nothing is written. Offsets of rows are 64-bit. Keys and values lie at ``step`` times
the batch row of the task, 0 where all batch rows share them. With more than ``length`` of them,
these are the keys of the first batch row, then those of the next one. With a second pair of
tensors, keys from ``border`` on are those of it, and ``length`` counts there.
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

from longspan.ops.kernels._hopper_load import load, load_pairs
from longspan.ops.kernels._hopper_softmax import first_weights, next_weights, shrunk
from longspan.ops.kernels._hopper_tiles import entry, next_place, ring_of

_LN_2 = gl.constexpr(0.6931471805599453)
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, _SCORES.value, 2))
_BY_ROW = gl.constexpr(gl.SliceLayout(1, _SCORES.value))
_HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# A number that each thread of four warps has.
_ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# Parts of a tile.
_WHOLE = gl.constexpr(0)
_FIRST = gl.constexpr(1)
_LAST = gl.constexpr(2)


@gluon.jit(
    do_not_specialize=["count", "rows", "heads", "group", "step", "length", "border"],
    do_not_specialize_on_alignment=["lse", "fetched", "tasks", "entries", "lo", "hi"],
)
def forward(
    q_desc,
    k_desc,
    v_desc,
    more_k_desc,
    more_v_desc,
    out_desc,
    lse,
    fetched,
    tasks,
    entries,
    lo,
    hi,
    count,
    rows,
    heads,
    group,
    step,
    length,
    border,
    scale,
    places: gl.constexpr,
    width: gl.constexpr,
    halves: gl.constexpr,
):
    # Groups of warps that multiply.
    groups: gl.constexpr = 1 if halves == 1 else 2
    queries = ring_of(q_desc, 2, groups, 64, width, groups)
    keys = ring_of(k_desc, places // 2, 1, 128, width, groups)
    values = ring_of(v_desc, places - places // 2, 1, 128, width, groups)
    told = gl.allocate_shared_memory(gl.int32, [2, 16 if halves else 8], _FLAT)
    results = (out_desc, lse, rows, heads)
    bounds = (lo, hi, rows)
    if more_k_desc is None:
        k_descs, v_descs = (k_desc,), (v_desc,)
    else:
        k_descs, v_descs = (k_desc, more_k_desc), (v_desc, more_v_desc)
    rings = (queries, keys, values)
    descs = (q_desc, k_descs, v_descs)
    work = (fetched, tasks, entries, count, group, step)
    stretches = (length, border)
    if groups == 1:
        gl.warp_specialize(
            [
                (_multiply, (0, halves, rings, told, entries, bounds, results, scale)),
                (load_pairs, (descs, rings, told, work, stretches)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, halves, rings, told, entries, bounds, results, scale)),
                (_multiply, (1, halves, rings, told, entries, bounds, results, scale)),
                (load_pairs if halves else load, (descs, rings, told, work, stretches)),
            ],
            [4, 1],
            [240, 24],
        )


@gluon.jit
def _multiply(
    half: gl.constexpr,
    halves: gl.constexpr,
    rings,
    told,
    entries,
    bounds,
    results,
    scale,
):
    queries, keys, values = rings
    groups: gl.constexpr = queries[0].shape[0] // 2
    width: gl.constexpr = queries[0].shape[4]
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    room, full, empty = queries
    place, phase, v_place, v_phase, q_place, q_phase, done = 0, 0, 0, 0, 0, 0, 0
    mbarrier.wait(full.index(0), 0)
    row, head, batch, first, edges, tiles, tile = _task(told, 0, halves)
    rows_on: gl.constexpr = 0 if halves else 64 * half
    bound = _bounds(bounds, tile, row + rows_on, _BY_ROW, halves)
    while row < bounds[2]:
        # The next entry is read long before it is needed.
        tile1 = _tile(entries, first + 1, halves)
        q_room = room.index(groups * q_place + half)
        q = q_room.reshape([64, width])
        scores = _times_keys(q, keys, place, phase, _WHOLE)
        # The output of the last task has left: its place is free.
        tma.store_wait(0)
        mbarrier.arrive(empty.index(q_place ^ 1), count=1, pred=done > 0)
        s = hopper.warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(keys[2].index(place), count=1)
        place, phase = next_place(keys, place, phase)
        own = row + rows_on
        if tile[1] & 15:
            s = _mask(s, tile, bound, bounds, own, _WHOLE, halves)
        p, total, base = first_weights(s, scale)
        acc = gl.zeros([64, width], gl.float32, sums)
        flow = place, phase, v_place, v_phase, acc, _weights(p, q, _WHOLE), base, total
        for j in range(1, edges):
            tile = tile1
            tile1 = _tile(entries, first + j + 1, halves)
            kind = tile[1] & 3 if halves else (tile[1] >> (2 * half)) & 3
            # Loops of one turn or none: of three branches, ptxas 12.8 has one read registers that
            # another one sets.
            for _ in range((kind < 2).to(gl.int32)):
                flow = _step(q, rings, flow, scale, tile, bounds, own, True, _WHOLE, halves)
            for _ in range((kind == 3 if halves else kind == 2).to(gl.int32)):
                flow = _step(q, rings, flow, scale, tile, bounds, own, True, _FIRST, halves)
            if not halves:
                for _ in range((kind == 3).to(gl.int32)):
                    flow = _step(q, rings, flow, scale, tile, bounds, own, True, _LAST, halves)
        for _ in range(edges, tiles):
            flow = _step(q, rings, flow, scale, tile, bounds, own, False, _WHOLE, halves)
        place, phase, v_place, v_phase, acc, p, base, total = flow
        out_batch, out_head, out_row = batch, head + (half if halves else 0), own
        product = _plus_values(p, acc, values, v_place, v_phase)
        q_place, q_phase = next_place(queries, q_place, q_phase)
        mbarrier.wait(full.index(q_place), q_phase)
        row, head, batch, first, edges, tiles, tile = _task(told, q_place, halves)
        bound = _bounds(bounds, tile, row + rows_on, _BY_ROW, halves)
        acc = hopper.warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(values[2].index(v_place), count=1)
        v_place, v_phase = next_place(values, v_place, v_phase)
        total = gl.convert_layout(gl.sum(total, 1), _BY_ROW)
        base = gl.convert_layout(gl.max(base, 1), _BY_ROW)
        # A row without keys is 0, whatever the keys hold that it was masked from.
        weight = gl.convert_layout(total, gl.SliceLayout(1, sums))
        share = 1.0 / weight
        acc = gl.where(weight[:, None] == 0.0, 0.0, acc * share[:, None])
        q.store(acc.to(q.dtype))
        hopper.fence_async_shared()
        _put(results, out_batch, out_head, out_row, q_room, base, total)
        done += 1
    tma.store_wait(0)


@gluon.jit
def _task(told, place, halves: gl.constexpr):
    """Its first six numbers, and its first entry."""
    room = told.index(place)
    row, head, batch, first = _told(room, 0), _told(room, 1), _told(room, 2), _told(room, 3)
    edges, tiles = _told(room, 4), _told(room, 5)
    if halves:
        tile = (_told(room, 6), _told(room, 7), _told(room, 8), _told(room, 9))
    else:
        tile = (_told(room, 6), _told(room, 7))
    return row, head, batch, first, edges, tiles, tile


@gluon.jit
def _told(room, number: gl.constexpr):
    return gl.max(room.slice(number, 1).load(_ONE), 0)


@gluon.jit
def _step(
    q,
    rings,
    flow,
    scale,
    tile,
    bounds,
    row,
    masked: gl.constexpr,
    part: gl.constexpr,
    halves: gl.constexpr,
):
    """Scores and weights of a tile, while the weights of the last one meet their values."""
    _queries, keys, values = rings
    place, phase, v_place, v_phase, acc, p, base, total = flow
    scored: gl.constexpr = _SCORES if part == _WHOLE else _HALF
    by_row: gl.constexpr = gl.SliceLayout(1, scored)
    # Read before it is needed.
    bound = _bounds(bounds, tile, row, by_row, halves and part == _WHOLE) if masked else 0
    scores = _times_keys(q, keys, place, phase, part)
    product = _plus_values(p, acc, values, v_place, v_phase)
    s = hopper.warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(keys[2].index(place), count=1)
    place, phase = next_place(keys, place, phase)
    if masked:
        s = _mask(s, tile, bound, bounds, row, part, halves)
    p, more, new = next_weights(s, base, scale, q.dtype)
    # Both may be -inf.
    shrink = gl.where(new == base, 1.0, gl.exp2(base - new))
    total = total * shrink + more
    # Waited for along with the product, weights need not be moved to where its own ones were.
    p = _weights(p, q, part)
    acc, p = hopper.warpgroup_mma_wait(0, deps=(product, p))
    mbarrier.arrive(values[2].index(v_place), count=1)
    v_place, v_phase = next_place(values, v_place, v_phase)
    acc = shrunk(acc, shrink)
    return place, phase, v_place, v_phase, acc, p, new, total


@gluon.jit
def _times_keys(q, keys, place, phase, part: gl.constexpr):
    room, full, _ = keys
    mbarrier.wait(full.index(place), phase)
    k = room.index(place).reshape([128, room.shape[4]])
    if part == _WHOLE:
        zero = gl.zeros([64, 128], gl.float32, _SCORES)
    else:
        k = k.slice(64 if part == _LAST else 0, 64)
        zero = gl.zeros([64, 64], gl.float32, _HALF)
    return hopper.warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _plus_values(p, acc, values, place, phase):
    room, full, _ = values
    mbarrier.wait(full.index(place), phase)
    v = room.index(place).reshape([128, room.shape[4]])
    return hopper.warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def _weights(p, q, part: gl.constexpr):
    """As the left side of a product, 0 for the keys that were left out."""
    if part != _WHOLE:
        none = gl.zeros([64, 64], p.dtype, _HALF)
        p = gl.join(p, none) if part == _FIRST else gl.join(none, p)
        p = p.permute((0, 2, 1)).reshape([64, 128])
    return gl.convert_layout(p.to(q.dtype), _WEIGHTS)


@gluon.jit
def _tile(entries, at, halves: gl.constexpr):
    if halves:
        first = entries + 4 * at
        found = (gl.load(first), gl.load(first + 1), gl.load(first + 2), gl.load(first + 3))
    else:
        found = entry(entries, at)
    return found


@gluon.jit
def _bounds(bounds, tile, row, by_row: gl.constexpr, halves: gl.constexpr):
    """Those that cut a tile, or each of its halves."""
    if halves:
        found = (_bound(bounds, tile[1], row, by_row), _bound(bounds, tile[3], row, by_row))
    else:
        found = (_bound(bounds, tile[1], row, by_row),)
    return found


@gluon.jit
def _bound(bounds, about, row, by_row: gl.constexpr):
    """The bound of 64 queries that cuts: the first key that they see, or the end of those."""
    lo, hi, rows = bounds
    i = row + gl.arange(0, 64, by_row)
    at = (about >> 6).to(gl.int64) * rows + i
    if about & 16:
        bound = gl.load(lo + at, mask=i < rows, other=0)
    else:
        bound = gl.load(hi + at, mask=i < rows, other=0)
    return bound


@gluon.jit
def _mask(s, tile, bound, bounds, row, part: gl.constexpr, halves: gl.constexpr):
    by_row: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    j = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
    # A column is that of a register, a number in the machine code, and that of a thread.
    fixed, own = j & ~6, j & 6
    key, about = tile[0] + (64 if part == _LAST else 0), tile[1]
    # Before the end, or not before the first one.
    if halves and part == _WHOLE:
        behind = j >= 64
        end = gl.where(behind, (bound[1] - tile[2] + 64)[:, None], (bound[0] - key)[:, None])
        turned = gl.where(behind, (tile[3] & 16) != 0, (about & 16) != 0)
        s = gl.where((fixed < end - own) ^ turned, s, float("-inf"))
        for _ in range(((about | tile[3]) >> 5) & 1):
            begin = (_first_key(bounds, about, row, by_row) - key)[:, None]
            other = (_first_key(bounds, tile[3], row, by_row) - tile[2] + 64)[:, None]
            s = gl.where(fixed >= gl.where(behind, other, begin) - own, s, float("-inf"))
    else:
        turned = (_by_thread(about) & 16) != 0
        s = gl.where((fixed < (bound[0] - key)[:, None] - own) ^ turned, s, float("-inf"))
        # A loop of one turn or none: a branch becomes a second comparison for all.
        for _ in range((about >> 5) & 1):
            if halves:
                begin = _first_key(bounds, about, row, by_row)
            else:
                # Written out: otherwise ptxas 12.8 joins the comparison above with its bit in an
                # instruction of its own for each score, which takes windows 2 % of their forward.
                lo, _, rows = bounds
                i = row + gl.arange(0, 64, by_row)
                at = (about >> 6).to(gl.int64) * rows + i
                begin = gl.load(lo + at, mask=i < rows, other=0)
            s = gl.where(fixed >= (begin - key)[:, None] - own, s, float("-inf"))
    return s


@gluon.jit
def _by_thread(x):
    """A number that all threads have, in a register of each.

    Otherwise ptxas 12.8 keeps what is compared with it in a uniform register, and moves that once
    for each score.
    """
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;",
        "=r,r",
        [x],
        gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _first_key(bounds, about, row, by_row: gl.constexpr):
    lo, _, rows = bounds
    i = row + gl.arange(0, 64, by_row)
    return gl.load(lo + (about >> 6).to(gl.int64) * rows + i, mask=i < rows, other=0)


@gluon.jit
def _put(results, batch, head, row, out_room, base, total):
    """Send an output on its way, and its log-sum-exp."""
    out_desc, lse, rows, heads = results
    tma.async_copy_shared_to_global(out_desc, [batch, head, row, 0], out_room)
    i = row + gl.arange(0, 64, _BY_ROW)
    found = gl.where(total == 0.0, float("-inf"), base * _LN_2 + gl.log(total))
    gl.store(lse + (batch.to(gl.int64) * heads + head) * rows + i, found, mask=i < rows)
