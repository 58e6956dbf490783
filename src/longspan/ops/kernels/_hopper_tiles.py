"""What the kernels of ``hopper`` share, in Gluon; imported only where Triton is there.

Tiles are copied to shared memory by the unit that does so (TMA), into places that are used in
turn: a ring, with a barrier of each place for full and one for empty.

Axes: B batch, H heads, N rows, D width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
    TensorDescriptor,
)

# Let the threads of a group of warps meet, by the name that Gluon has for it from Triton 3.7 on.
meet = getattr(gl, "barrier", None) or gl.thread_barrier


def described(x_BHND: Tensor | None, rows: int, width: int, swizzle: int = 128) -> Any:
    """A tensor [B, H, N, D] for the unit that copies tiles of some rows and columns of a head.

    None for None.
    """
    if x_BHND is None:
        return None
    known = _shaped(x_BHND.shape, x_BHND.stride(), x_BHND.dtype, rows, width, swizzle)
    # As copy.copy does it, which takes four times as long.
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(known.__dict__)
    found.base = x_BHND
    return found


# A description takes longer to make than a small tensor to attend to.
@functools.lru_cache(maxsize=1024)
def _shaped(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    rows: int,
    width: int,
    swizzle: int,
) -> Any:
    layout = gl.NVMMASharedLayout(swizzle, 8 * dtype.itemsize, 4)
    nothing = torch.empty(0, dtype=dtype, device="meta")
    return TensorDescriptor(nothing, list(shape), list(strides), [1, 1, rows, width], layout)


@gluon.jit
def ring_of(
    desc,
    places: gl.constexpr,
    tiles: gl.constexpr,
    rows: gl.constexpr,
    width: gl.constexpr,
    readers: gl.constexpr = 2,
):
    """Places of some tiles, with a barrier for full and one for empty, where readers arrive."""
    room = gl.allocate_shared_memory(desc.dtype, [places * tiles, 1, 1, rows, width], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(places):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=readers)
    return room, full, empty


@gluon.jit
def next_place(ring, place, phase):
    turn = place + 1 == ring[2].shape[0]
    return gl.where(turn, 0, place + 1), gl.where(turn, phase ^ 1, phase)


@gluon.jit
def copy(descs, whose, head, row, column, full, room):
    """From the first of some tensors, or the second one where the batch row is ~ of one there."""
    if len(descs) > 1 and whose < 0:
        tma.async_copy_global_to_shared(descs[1], [~whose, head, row, column], full, room)
    else:
        tma.async_copy_global_to_shared(descs[0], [whose, head, row, column], full, room)


@gluon.jit
def entry(entries, at):
    return gl.load(entries + 2 * at), gl.load(entries + 2 * at + 1)
