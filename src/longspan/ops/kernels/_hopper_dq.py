"""The group of warps of ``hopper``'s backward that makes dq, in Gluon; only where Triton is there.

    dq_i = sum_j dS_ij k_j

Both groups that multiply leave dS of a tile of queries in shared memory. This one makes dq of it a
step later, and adds it up in memory, in float32 and in the order of ``by_thread``.
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

from longspan.ops.kernels._hopper_back_tiles import add_to, by_thread, part_of, task, told, whose
from longspan.ops.kernels._hopper_tiles import entry


@gluon.jit
def add_up(fixed, own, work, dq_desc):
    k_room, _v_room, task_room, kv_full, kv_empty = fixed
    tasks, parts, entries, count = work
    step = 0
    mbarrier.wait(kv_full, 0)
    kv_phase = 1
    t = told(task_room)
    while t < count:
        _key, _k_head, _batch, part, last = task(tasks, t)
        for x in range(part, last):
            first, _masked, length = part_of(parts, x)
            head, batch = whose(parts, x)
            row, about = entry(entries, first)
            for j in range(length):
                row1, about1 = entry(entries, first + j + 1)
                _of_queries(k_room, own, dq_desc, (batch, head, row, about), step)
                step += 1
                row, about = row1, about1
        mbarrier.arrive(kv_empty, count=1)
        mbarrier.wait(kv_full, kv_phase)
        kv_phase ^= 1
        t = told(task_room)
    tma.store_wait(0)


@gluon.jit
def _of_queries(k_room, own, desc, where, step):
    """Add dq of a tile of queries up, of the half of the keys that they see or of both."""
    dq_room, ds_room, ds_full, ds_empty = own
    batch, head, row, about = where
    width: gl.constexpr = k_room.shape[4]
    pieces: gl.constexpr = width // 64
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    turn = step & 1
    # Which half comes first, and whether the other one does as well.
    one = ((about & 3) == 0).to(gl.int32)
    both = (1 - one) * ((about & 12) != 0).to(gl.int32)
    mbarrier.wait(ds_full.index(turn), (step >> 1) & 1)
    for piece in gl.static_range(pieces):
        dq = gl.zeros([64, 64], gl.float32, layout)
        ds = ds_room.index(2 * turn + one).permute((1, 0))
        keys = k_room.index(one).reshape([64, width]).slice(64 * piece, 64, 1)
        dq = hopper.warpgroup_mma(ds, keys, dq, use_acc=False, is_async=True)
        # A loop of one turn or none.
        for _ in range(both):
            ds = ds_room.index(2 * turn + 1).permute((1, 0))
            keys = k_room.index(1).reshape([64, width]).slice(64 * piece, 64, 1)
            dq = hopper.warpgroup_mma(ds, keys, dq, is_async=True)
        dq = hopper.warpgroup_mma_wait(0, deps=(dq,))
        if piece == pieces - 1:
            mbarrier.arrive(ds_empty.index(turn), count=1)
        room = dq_room.index(piece)
        tma.store_wait(pieces - 1)
        room.reshape([32, 128]).store(by_thread(dq))
        hopper.fence_async_shared()
        add_to(desc, [batch, head, row // 64 * 32 * pieces + 32 * piece, 0], room)
