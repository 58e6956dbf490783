"""The Triton kernel of ``turn``; imported only where there is a GPU.

Offsets are 64-bit: a million rows of 32 heads hold more numbers than 32 bits can count.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def turn_rows(
    x,
    cos,
    sin,
    out,
    rows,
    heads,
    x_batch,
    x_head,
    x_row,
    table_batch,
    sign,
    half: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    plane = tl.program_id(1).to(tl.int64)
    b, h = plane // heads, plane % heads
    r = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    d = tl.arange(0, wide)[None, :]
    inside = (d < half) & (r < rows)[:, None]
    at = x + b * x_batch + h * x_head + r[:, None] * x_row + d
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    angle = b * table_batch + r[:, None] * half + d
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0) * sign
    to = out + (plane * rows + r)[:, None] * (2 * half) + d
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
