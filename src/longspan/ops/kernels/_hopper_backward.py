"""The backward kernel of ``hopper`` in Gluon; imported only where Triton is there.

    P_ij = exp(s_ij - lse_i)               delta_i = dout_i . out_i - dlse_i
    dv_j = sum_i P_ij dout_i               dS_ij = P_ij (dout_i . v_j - delta_i)
    dk_j = scale sum_i dS_ij q_i           dq_i = scale sum_j dS_ij k_j

FlashAttention-3 (Shah et al., arXiv 2407.08608): a program keeps a tile of 128 keys, goes through
the tiles of 64 queries that see some of it, and sums dk and dv in registers; dq is added up in
memory, in float32.

What differs: a task has all query heads of its key head, in all batch rows that share these keys,
so that dk and dv are complete and leave as they are, but for keys that are cut; programs persist,
and fetch tasks as they finish; and four kinds of warps share the work. One warp loads (see
``_hopper_back_load``). Two groups of four warps, each 64 of the keys, multiply all but dq, and
leave dS in shared memory. A third group makes dq of it a step later (see ``_hopper_dq``), so that
neither of the others waits for dS of the other, for dq, or for dq to leave.

A task is int32 [7]: the row of its first key, key head, batch row of the keys, the tile of sums in
memory, in float32, that its dk and dv are added to (-1 where it has all queries of its keys),
first part, parts, one for each query head of a batch row that sees some of the keys, and the first
key as bounds count it. With a second pair of key tensors the batch row is ~ of one of these where
the keys are in them. A part is int32 [5]: first entry, entries with a mask (they come first),
entries, query head, batch row. An entry is int32 [2]: the first of 64 queries, and 16 times the
row of ``lo`` and ``hi`` that says which keys each of them sees, with two bits for either half of
the keys: 0 nobody sees any, 1 masked, 2 all see all. 10 D flops for each pair of a tile; of dq, 4
bytes a number are added in memory for each tile. Sums lie in the order of ``by_thread``, and are
turned at the end.

Where it ``adds``, dk and dv are added to what is there, in their dtype: to those of another pass,
or of the same keys by remainder.

P is rounded to the dtype of q, for dv and for dS, and dS once more: the error of dk and dq is 1.4
times that with P as it is.

The log-sum-exp is finite, in rows that see no key as well, whose every entry has a mask.
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

from longspan.ops.kernels._hopper_back_load import load
from longspan.ops.kernels._hopper_back_tiles import (
    FLAT,
    add_to,
    by_thread,
    next_of_two,
    part_of,
    task,
    told,
)
from longspan.ops.kernels._hopper_dq import add_up

_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_BY_QUERY = gl.constexpr(gl.SliceLayout(0, _SCORES.value))
_DS_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit(
    do_not_specialize=["count", "rows"],
    do_not_specialize_on_alignment=[
        "fetched",
        "tasks",
        "parts",
        "entries",
        "lo",
        "hi",
    ],
)
def backward(
    q_desc,
    k_desc,
    v_desc,
    more_k_desc,
    more_v_desc,
    dout_desc,
    rows_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    more_dk_desc,
    more_dv_desc,
    cut_desc,
    fetched,
    tasks,
    parts,
    entries,
    lo,
    hi,
    count,
    rows,
    scale,
    scale_log2,
    width: gl.constexpr,
    adds: gl.constexpr,
):
    q_room = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, width], q_desc.layout)
    dout_room = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, width], q_desc.layout)
    k_room = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, width], q_desc.layout)
    v_room = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, width], q_desc.layout)
    dq_room = gl.allocate_shared_memory(gl.float32, [width // 64, 1, 1, 32, 128], dq_desc.layout)
    ds_room = gl.allocate_shared_memory(q_desc.dtype, [4, 64, 64], _DS_TILE)
    # What exponents of a place lack, what its sums begin with, the keys that its queries see, and
    # how its tile is cut.
    row_room = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 2, 64], rows_desc.layout)
    seen_room = gl.allocate_shared_memory(gl.int32, [2, 64], FLAT)
    kind_room = gl.allocate_shared_memory(gl.int32, [2, 1], FLAT)
    task_room = gl.allocate_shared_memory(gl.int32, [1], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=1)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=3)
    tiles = (q_room, dout_room, row_room, seen_room, kind_room, full, empty)
    fixed = (k_room, v_room, task_room, kv_full, kv_empty)
    work = (tasks, parts, entries, count)
    own = (dq_room, ds_room, ds_full, ds_empty)
    if more_k_desc is None:
        k_descs, v_descs, dk_descs, dv_descs = (k_desc,), (v_desc,), (dk_desc,), (dv_desc,)
    else:
        k_descs, v_descs = (k_desc, more_k_desc), (v_desc, more_v_desc)
        dk_descs, dv_descs = (dk_desc, more_dk_desc), (dv_desc, more_dv_desc)
    results = (dk_descs, dv_descs, cut_desc)
    scales = (scale, scale_log2)
    gl.warp_specialize(
        [
            (_multiply, (0, adds, tiles, fixed, own, work, results, scales)),
            (_multiply, (1, adds, tiles, fixed, own, work, results, scales)),
            (add_up, (fixed, own, work, dq_desc)),
            (
                load,
                (
                    (q_desc, k_descs, v_descs, dout_desc, rows_desc),
                    tiles,
                    fixed,
                    work,
                    (lo, hi, rows),
                    fetched,
                ),
            ),
        ],
        [4, 4, 1],
        [216, 64, 24],
    )


@gluon.jit
def _multiply(half: gl.constexpr, adds: gl.constexpr, tiles, fixed, own, work, results, scales):
    k_room, v_room, task_room, kv_full, kv_empty = fixed
    tasks, parts, _entries, count = work
    q_room, kind_room, full, ds_empty = tiles[0], tiles[4], tiles[5], own[3]
    width: gl.constexpr = q_room.shape[4]
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    place, phase, step = 0, 0, 0
    mbarrier.wait(kv_full, 0)
    kv_phase = 1
    t = told(task_room)
    while t < count:
        key, k_head, batch, part, last = task(tasks, t)
        dk = gl.zeros([64, width], gl.float32, sums)
        dv = gl.zeros([64, width], gl.float32, sums)
        flow = place, phase, step, dk, dv
        for x in range(part, last):
            _first, masked, length = part_of(parts, x)
            for j in range(length):
                mbarrier.wait(full.index(flow[0]), flow[1])
                kind = 2
                if j < masked:
                    kind = (told(kind_room.index(flow[0])) >> (2 * half)) & 3
                seen = gl.minimum(kind, 1)
                # Loops of one turn or none: products stay apart from branches.
                for _ in range(seen):
                    flow = _step(half, tiles, fixed, own, scales[1], flow, kind == 1)
                for _ in range(1 - seen):
                    flow = _pass_by(tiles, own, flow)
        place, phase, step, dk, dv = flow
        # Gradients leave through the places of their keys and values.
        dk = dk * scales[0]
        cut = gl.load(tasks + 7 * t + 3)
        if cut < 0:
            at = batch, k_head, key + 64 * half
            _put(results[1], at, dv, v_room.index(half), adds)
            mbarrier.wait(ds_empty.index((step & 1) ^ 1), ((step - 1) >> 1) & 1)
            _put(results[0], at, dk, k_room.index(half), adds)
        else:
            mbarrier.wait(ds_empty.index((step & 1) ^ 1), ((step - 1) >> 1) & 1)
            _add(results[2], cut, half, dk, dv, k_room.index(half), v_room.index(half))
        tma.store_wait(0)
        mbarrier.arrive(kv_empty, count=1)
        mbarrier.wait(kv_full, kv_phase)
        kv_phase ^= 1
        t = told(task_room)


@gluon.jit
def _step(half: gl.constexpr, tiles, fixed, own, scale_log2, flow, masked):
    """What a tile of queries adds to dk and dv, and its dS."""
    q_room, dout_room, row_room, seen_room, _, _, empty = tiles
    k_room, v_room = fixed[0], fixed[1]
    place, phase, step, dk, dv = flow
    width: gl.constexpr = q_room.shape[4]
    dtype: gl.constexpr = q_room.dtype
    left: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    first = row_room.index(place)._reinterpret(gl.float32, [128], FLAT)
    # Read while the scores are computed.
    less = first.slice(0, 64).load(_BY_QUERY)[None, :]
    zero = gl.zeros([64, 64], gl.float32, _SCORES)
    s_token = _times(k_room.index(half), q_room.index(place), zero, False)
    s = hopper.warpgroup_mma_wait(0, deps=(s_token,))
    p = gl.exp2(s * scale_log2 + less)
    if masked:
        p = _mask(p, seen_room.index(place).load(_BY_QUERY), half)
    q, dout = q_room.index(place).reshape([64, width]), dout_room.index(place).reshape([64, width])
    p_small = p.to(dtype)
    p_left = gl.convert_layout(p_small, left)
    # Sums begin with what is to be subtracted.
    begun = gl.broadcast(first.slice(64, 64).load(_BY_QUERY)[None, :], zero)[0]
    dp_token = _times(v_room.index(half), dout_room.index(place), begun, True)
    dv_token = hopper.warpgroup_mma(p_left, dout, dv, is_async=True)
    dp = hopper.warpgroup_mma_wait(1, deps=(dp_token,))
    ds = (_wide(p_small) * dp).to(dtype)
    _leave(half, own, step, ds)
    ds_left = gl.convert_layout(ds, left)
    dk_token = hopper.warpgroup_mma(ds_left, q, dk, is_async=True)
    dv, dk, p_left, ds_left = hopper.warpgroup_mma_wait(
        0, deps=(dv_token, dk_token, p_left, ds_left)
    )
    mbarrier.arrive(empty.index(place), count=1)
    place, phase = next_of_two(place, phase)
    return place, phase, step + 1, dk, dv


@gluon.jit
def _pass_by(tiles, own, flow):
    """A tile of queries that see none of these 64 keys: nobody asks for its dS."""
    ds_full, ds_empty = own[2], own[3]
    place, phase, step, dk, dv = flow
    turn = step & 1
    mbarrier.wait(ds_empty.index(turn), ((step >> 1) & 1) ^ 1)
    mbarrier.arrive(ds_full.index(turn), count=1)
    mbarrier.arrive(tiles[6].index(place), count=1)
    place, phase = next_of_two(place, phase)
    return place, phase, step + 1, dk, dv


@gluon.jit
def _leave(half: gl.constexpr, own, step, ds):
    """A dS, for the group that makes dq of it."""
    ds_room, ds_full, ds_empty = own[1], own[2], own[3]
    turn = step & 1
    mbarrier.wait(ds_empty.index(turn), ((step >> 1) & 1) ^ 1)
    ds_room.index(2 * turn + half).store(ds)
    hopper.fence_async_shared()
    mbarrier.arrive(ds_full.index(turn), count=1)


@gluon.jit
def _times(keys, queries, acc, use_acc: gl.constexpr):
    """64 keys by 64 queries."""
    width: gl.constexpr = keys.shape[3]
    a, b = keys.reshape([64, width]), queries.reshape([64, width]).permute((1, 0))
    return hopper.warpgroup_mma(a, b, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def _wide(x):
    """To float32, both numbers of a register at a time.

    Otherwise each is rounded alone, by the slow unit that has the powers of two to do, and then
    moved to the side of its neighbour for the product.
    """
    if x.dtype == gl.bfloat16:
        asm: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    else:
        asm: gl.constexpr = (
            "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
        )
    return gl.inline_asm_elementwise(asm, "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def _mask(p, seen, half: gl.constexpr):
    j = 64 * half + gl.arange(0, 64, gl.SliceLayout(1, _SCORES))[:, None]
    # One comparison without a sign stands for both.
    behind = (j - (seen & 0xFFFF)[None, :]).to(gl.uint32, bitcast=True)
    inside = behind < (seen >> 16).to(gl.uint32, bitcast=True)[None, :]
    return gl.where(inside, p, 0.0)


@gluon.jit
def _put(descs, at, x, room, adds: gl.constexpr):
    """Send a gradient on its way, or add it to what is there."""
    batch, head, row = at
    room.reshape([64, x.shape[1]]).store(x.to(room.dtype))
    hopper.fence_async_shared()
    if len(descs) > 1 and batch < 0:
        _send(descs[1], [~batch, head, row, 0], room, adds)
    else:
        _send(descs[0], [batch, head, row, 0], room, adds)


@gluon.jit
def _send(desc, at, room, adds: gl.constexpr):
    if adds:
        add_to(desc, at, room)
    else:
        tma.async_copy_shared_to_global(desc, at, room)


@gluon.jit
def _add(desc, cut, half: gl.constexpr, dk, dv, k_room, v_room):
    """Add 64 rows of both gradients to their sums, half of the columns at a time."""
    width: gl.constexpr = dk.shape[1]
    tall: gl.constexpr = width // 4
    dk_room = k_room._reinterpret(gl.float32, [1, 1, tall, 128], desc.layout)
    dv_room = v_room._reinterpret(gl.float32, [1, 1, tall, 128], desc.layout)
    dk_halves, dv_halves = _halves(dk), _halves(dv)
    for piece in gl.static_range(2):
        tma.store_wait(0)
        dk_room.reshape([tall, 128]).store(by_thread(dk_halves[piece]))
        dv_room.reshape([tall, 128]).store(by_thread(dv_halves[piece]))
        hopper.fence_async_shared()
        row = tall * (2 * half + piece)
        add_to(desc, [0, cut, row, 0], dk_room)
        add_to(desc, [1, cut, row, 0], dv_room)


@gluon.jit
def _halves(x):
    """A tile of 64 rows by columns."""
    wide: gl.constexpr = x.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, wide, 16])
    first, last = x.reshape([64, 2, wide]).permute((0, 2, 1)).split()
    return gl.convert_layout(first, layout), gl.convert_layout(last, layout)
