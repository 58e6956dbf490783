"""What the kinds of warps of ``hopper``'s backward share, in Gluon; only where Triton is there.

What tasks, parts and entries are is in ``_hopper_backward``.
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports]
from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language import _core  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
    tma,
)

FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# Numbers that each thread of four warps has.
GROUP = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@_core.builtin
def _add_through_builder(desc, coord, tile, _semantic: Any = None):
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, tile.handle)


# Add a tile of shared memory to global memory, by the name that Gluon has for it from Triton 3.8
# on.
add_to = getattr(tma, "async_atomic_add", _add_through_builder)


@gluon.jit
def next_of_two(place, phase):
    return place ^ 1, phase ^ place


@gluon.jit
def task(tasks, t):
    at = tasks + 7 * t
    key, k_head, batch = gl.load(at), gl.load(at + 1), gl.load(at + 2)
    part = gl.load(at + 4)
    # With the end of its parts.
    return key, k_head, batch, part, part + gl.load(at + 5)


@gluon.jit
def part_of(parts, part):
    at = parts + 5 * part
    return gl.load(at), gl.load(at + 1), gl.load(at + 2)


@gluon.jit
def whose(parts, part):
    return gl.load(parts + 5 * part + 3), gl.load(parts + 5 * part + 4)


@gluon.jit
def told(room):
    return gl.max(room.load(GROUP), 0)


@gluon.jit
def by_thread(x):
    """64 rows of sums in the order of the threads that have them, as they are added up.

    Four numbers of a thread lie side by side, and those of a warp: no two want the same bank.
    """
    columns: gl.constexpr = x.shape[1]
    warp_half_row_column = x.reshape([4, 2, 8, columns // 8, 4, 2])
    return warp_half_row_column.permute((3, 0, 2, 4, 1, 5)).reshape([columns // 2, 128])
