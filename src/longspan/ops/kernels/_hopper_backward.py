"""The backward kernel of ``hopper`` in Gluon; imported only where Triton is there.

    P_ij = exp(s_ij - lse_i)               delta_i = dout_i . out_i - dlse_i
    dv_j = sum_i P_ij dout_i               dS_ij = P_ij (dout_i . v_j - delta_i)
    dk_j = scale sum_i dS_ij q_i           dq_i = scale sum_j dS_ij k_j

FlashAttention-3 (Shah et al., arXiv 2407.08608): a program keeps a tile of 128 keys, goes through
the tiles of 64 queries that see some of it, and sums dk and dv in registers; dq is added up in
memory, in float32. One warp loads, and two groups of four warps multiply, each 64 of the keys;
dq, a sum over all of them, they share by columns, each reading the dS of both from shared memory.

What differs: a task has all query heads of its key head, so that dk and dv are complete and leave
as they are, and programs persist.

A task is int32 [4]: first key, key head, batch row, nothing. A part is int32 [4] for each task and
query head of its key head: first entry, entries with a mask (they come first), entries, nothing.
An entry is int32 [2]: the first of 64 queries, and 64 times the row of ``lo`` and ``hi`` that says
which keys each of them sees, with 16 if only lower bounds cut and 32 if both do. 10 D flops for
each pair of a tile; of dq, 4 bytes a number are added in memory for each tile.

The log-sum-exp is finite, in rows that see no key as well, whose every entry has a mask.
"""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports]
from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language import _core  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language.nvidia import (  # pyright: ignore[reportMissingImports]
    hopper,
)
from triton.experimental.gluon.language.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
    mbarrier,
    tma,
)

_LOG2_E = gl.constexpr(1.4426950408889634)
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_BY_QUERY = gl.constexpr(gl.SliceLayout(0, _SCORES.value))
_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_BF16_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
_LANES = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))


@_core.builtin
def _add_through_builder(desc, coord, tile, _semantic: Any = None):
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, tile.handle)


# Add a tile of shared memory to global memory, and let the threads of a group meet, by the names
# that Gluon has for them from Triton 3.8 and 3.7 on.
_add_to = getattr(tma, "async_atomic_add", _add_through_builder)
_meet = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit(
    do_not_specialize=["count", "rows", "heads", "group"],
    do_not_specialize_on_alignment=["lse", "delta", "tasks", "parts", "entries", "lo", "hi"],
)
def backward(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    lse,
    delta,
    tasks,
    parts,
    entries,
    lo,
    hi,
    count,
    rows,
    heads,
    group,
    scale,
    scale_log2,
    width: gl.constexpr,
):
    q_room = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, width], q_desc.layout)
    dout_room = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, width], q_desc.layout)
    k_room = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, width], q_desc.layout)
    v_room = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, width], q_desc.layout)
    dq_room = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, width // 2], dq_desc.layout)
    ds_room = gl.allocate_shared_memory(q_desc.dtype, [4, 64, 64], _BF16_TILE)
    # Log-sum-exps and deltas of each place.
    row_room = gl.allocate_shared_memory(gl.float32, [4, 64], _FLAT)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(ds_full.index(i), count=2)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=2)
    tiles = (q_room, dout_room, row_room, full, empty)
    fixed = (k_room, v_room, kv_full, kv_empty)
    work = (tasks, parts, entries, count, group)
    own = (dq_room, ds_room, ds_full)
    bounds = (lo, hi, rows)
    results = (dq_desc, dk_desc, dv_desc)
    scales = (scale, scale_log2)
    gl.warp_specialize(
        [
            (_multiply, (0, tiles, fixed, own, work, bounds, results, scales)),
            (_multiply, (1, tiles, fixed, own, work, bounds, results, scales)),
            (
                _load,
                (
                    (q_desc, k_desc, v_desc, dout_desc),
                    tiles,
                    fixed,
                    work,
                    (lse, delta, rows, heads),
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


# One warp loads.


@gluon.jit
def _load(descs, tiles, fixed, work, by_row):
    k_room, v_room, kv_full, kv_empty = fixed
    tasks, parts, entries, count, group = work
    size: gl.constexpr = 128 * k_room.shape[4] * 2
    place, phase, kv_phase = 0, 0, 0
    t = gl.program_id(0)
    while t < count:
        key, k_head, batch = _task(tasks, t)
        mbarrier.wait(kv_empty, kv_phase ^ 1)
        mbarrier.expect(kv_full, 2 * size)
        for half in gl.static_range(2):
            at = [batch, k_head, key + 64 * half, 0]
            tma.async_copy_global_to_shared(descs[1], at, kv_full, k_room.index(half))
            tma.async_copy_global_to_shared(descs[2], at, kv_full, v_room.index(half))
        kv_phase ^= 1
        for x in range(group):
            first, _masked, length = _part(parts, t * group + x)
            head = k_head * group + x
            for j in range(length):
                row = gl.load(entries + 2 * (first + j))
                place, phase = _bring(descs, tiles, by_row, batch, head, row, place, phase)
        t += gl.num_programs(0)


@gluon.jit
def _bring(descs, tiles, by_row, batch, head, row, place, phase):
    q_desc, dout_desc = descs[0], descs[3]
    q_room, dout_room, row_room, full, empty = tiles
    lse, delta, rows, heads = by_row
    i = row + gl.arange(0, 64, _LANES)
    at = (batch.to(gl.int64) * heads + head) * rows + i
    own_lse = gl.load(lse + at, mask=i < rows, other=float("inf"))
    own_delta = gl.load(delta + at, mask=i < rows, other=0.0)
    mbarrier.wait(empty.index(place), phase ^ 1)
    row_room.index(2 * place).store(own_lse * _LOG2_E)
    row_room.index(2 * place + 1).store(own_delta)
    # All lanes have written before one of them says so.
    _meet()
    bar = full.index(place)
    mbarrier.expect(bar, 2 * 64 * q_room.shape[4] * 2)
    tma.async_copy_global_to_shared(q_desc, [batch, head, row, 0], bar, q_room.index(place))
    tma.async_copy_global_to_shared(dout_desc, [batch, head, row, 0], bar, dout_room.index(place))
    return place ^ 1, gl.where(place == 1, phase ^ 1, phase)


@gluon.jit
def _task(tasks, t):
    return gl.load(tasks + 4 * t), gl.load(tasks + 4 * t + 1), gl.load(tasks + 4 * t + 2)


@gluon.jit
def _part(parts, at):
    return gl.load(parts + 4 * at), gl.load(parts + 4 * at + 1), gl.load(parts + 4 * at + 2)


# Two groups of warps multiply.


@gluon.jit
def _multiply(half: gl.constexpr, tiles, fixed, own, work, bounds, results, scales):
    kv_full, kv_empty = fixed[2], fixed[3]
    tasks, parts, entries, count, group = work
    q_room, dq_room = tiles[0], own[0]
    width: gl.constexpr = q_room.shape[4]
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    place, phase, turn, ds_phase, kv_phase = 0, 0, 0, 0, 0
    t = gl.program_id(0)
    while t < count:
        key, k_head, batch = _task(tasks, t)
        mbarrier.wait(kv_full, kv_phase)
        kv_phase ^= 1
        dk = gl.zeros([64, width], gl.float32, sums)
        dv = gl.zeros([64, width], gl.float32, sums)
        flow = place, phase, turn, ds_phase, dk, dv
        for x in range(group):
            first, masked, length = _part(parts, t * group + x)
            head = k_head * group + x
            row, about = _entry(entries, first)
            for j in range(masked):
                row1, about1 = _entry(entries, first + j + 1)
                where = (batch, head, row, about, key + 64 * half)
                flow = _step(half, tiles, fixed, own, bounds, results, scales, flow, where, True)
                row, about = row1, about1
            for j in range(masked, length):
                row1, about1 = _entry(entries, first + j + 1)
                where = (batch, head, row, about, key + 64 * half)
                flow = _step(half, tiles, fixed, own, bounds, results, scales, flow, where, False)
                row, about = row1, about1
        place, phase, turn, ds_phase, dk, dv = flow
        mbarrier.arrive(kv_empty, count=1)
        at = [batch, k_head, key + 64 * half, 0]
        _put(results[2], at, dv, dq_room.index(half), q_room.dtype)
        _put(results[1], at, dk * scales[0], dq_room.index(half), q_room.dtype)
        t += gl.num_programs(0)
    tma.store_wait(0)


@gluon.jit
def _step(
    half: gl.constexpr,
    tiles,
    fixed,
    own,
    bounds,
    results,
    scales,
    flow,
    where,
    masked: gl.constexpr,
):
    """Gradients from a tile of queries."""
    q_room, dout_room, row_room, full, empty = tiles
    k_room, v_room = fixed[0], fixed[1]
    dq_room, ds_room, ds_full = own
    place, phase, turn, ds_phase, dk, dv = flow
    batch, head, row, about, key = where
    width: gl.constexpr = q_room.shape[4]
    dtype: gl.constexpr = q_room.dtype
    left: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    shared: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width // 2, 16])
    mbarrier.wait(full.index(place), phase)
    s_token = _times(k_room.index(half), q_room.index(place))
    dp_token = _times(v_room.index(half), dout_room.index(place))
    s = hopper.warpgroup_mma_wait(1, deps=(s_token,))
    own_lse = row_room.index(2 * place).load(_BY_QUERY)
    p = gl.exp2(s * scales[1] - own_lse[None, :])
    if masked:
        p = _mask(p, key, row, about, bounds)
    q, dout = q_room.index(place).reshape([64, width]), dout_room.index(place).reshape([64, width])
    p_left = gl.convert_layout(p.to(dtype), left)
    dv_token = hopper.warpgroup_mma(p_left, dout, dv, is_async=True)
    dp = hopper.warpgroup_mma_wait(1, deps=(dp_token,))
    own_delta = row_room.index(2 * place + 1).load(_BY_QUERY)
    ds = (p * (dp - own_delta[None, :])).to(dtype)
    # What the other group had read of this room it had read before the last exchange.
    ds_room.index(2 * turn + half).store(ds)
    hopper.fence_async_shared()
    mbarrier.arrive(ds_full.index(turn), count=1)
    ds_left = gl.convert_layout(ds, left)
    dk_token = hopper.warpgroup_mma(ds_left, q, dk, is_async=True)
    mbarrier.wait(ds_full.index(turn), ds_phase)
    dq_token = gl.zeros([64, width // 2], gl.float32, shared)
    for part in gl.static_range(2):
        keys = k_room.index(part).reshape([64, width]).slice(half * (width // 2), width // 2, 1)
        ds_part = ds_room.index(2 * turn + part).permute((1, 0))
        dq_token = hopper.warpgroup_mma(ds_part, keys, dq_token, use_acc=part > 0, is_async=True)
    dv, dk, dq, p_left, ds_left = hopper.warpgroup_mma_wait(
        0, deps=(dv_token, dk_token, dq_token, p_left, ds_left)
    )
    mbarrier.arrive(empty.index(place), count=1)
    tma.store_wait(0)
    dq_place = dq_room.index(half)
    dq_place.reshape([64, width // 2]).store(dq)
    hopper.fence_async_shared()
    _add_to(results[0], [batch, head, row, half * (width // 2)], dq_place)
    ds_phase = gl.where(turn == 1, ds_phase ^ 1, ds_phase)
    phase = gl.where(place == 1, phase ^ 1, phase)
    return place ^ 1, phase, turn ^ 1, ds_phase, dk, dv


@gluon.jit
def _times(keys, queries):
    """64 keys by 64 queries."""
    width: gl.constexpr = keys.shape[3]
    zero = gl.zeros([64, 64], gl.float32, _SCORES)
    a, b = keys.reshape([64, width]), queries.reshape([64, width]).permute((1, 0))
    return hopper.warpgroup_mma(a, b, zero, use_acc=False, is_async=True)


@gluon.jit
def _entry(entries, at):
    return gl.load(entries + 2 * at), gl.load(entries + 2 * at + 1)


@gluon.jit
def _mask(p, key, row, about, bounds):
    lo, hi, rows = bounds
    i = row + gl.arange(0, 64, _BY_QUERY)
    at = (about >> 6).to(gl.int64) * rows + i
    j = key + gl.arange(0, 64, gl.SliceLayout(1, _SCORES))[:, None]
    if about & 16:
        bound = gl.load(lo + at, mask=i < rows, other=0)
    else:
        bound = gl.load(hi + at, mask=i < rows, other=0)
    # Before the end, or not before the first one.
    p = gl.where((j < bound[None, :]) ^ ((about & 16) != 0), p, 0.0)
    for _ in range((about >> 5) & 1):
        begin = gl.load(lo + at, mask=i < rows, other=0)
        p = gl.where(j >= begin[None, :], p, 0.0)
    return p


@gluon.jit
def _put(desc, at, x, room, dtype: gl.constexpr):
    """Send a gradient on its way through a room of numbers twice as wide and half as many."""
    tma.store_wait(0)
    tile = room._reinterpret(dtype, [1, 1, 64, x.shape[1]], desc.layout)
    tile.reshape([64, x.shape[1]]).store(x.to(dtype))
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(desc, at, tile)


@triton.jit
def deltas(
    out,
    dout,
    dlse,
    delta,
    rows,
    heads,
    out_batch,
    out_head,
    out_row,
    dout_batch,
    dout_head,
    dout_row,
    has_dlse: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    """delta_i = dout_i . out_i - dlse_i, the last in memory as delta, [B, H, N]."""
    # The other axes of a grid are short.
    parts = tl.cdiv(rows, tall)
    plane = (tl.program_id(0) // parts).to(tl.int64)
    b, h = plane // heads, plane % heads
    i = (tl.program_id(0) % parts).to(tl.int64) * tall + tl.arange(0, tall)
    d = tl.arange(0, wide)[None, :]
    inside = (i < rows)[:, None] & (d < width)
    one = tl.load(
        out + b * out_batch + h * out_head + i[:, None] * out_row + d, mask=inside, other=0.0
    )
    other = tl.load(
        dout + b * dout_batch + h * dout_head + i[:, None] * dout_row + d, mask=inside, other=0.0
    )
    found = tl.sum(one.to(tl.float32) * other.to(tl.float32), axis=1)
    at = plane * rows + i
    if has_dlse:
        found -= tl.load(dlse + at, mask=i < rows, other=0.0)
    tl.store(delta + at, found, mask=i < rows)
