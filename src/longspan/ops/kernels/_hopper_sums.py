"""What ``hopper``'s backward begins and ends with, by row, in Triton; imported only where that is.

    first_i = -lse_i / log 2, -delta_i      delta_i = sum_d dout_id out_id - dlse_i
    dq_i = scale sums_i                     and dk, dv of keys whose tasks were cut

O(N D) for each head: bound by memory, reads what it needs once.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _own_rows(rows, heads, width: tl.constexpr, wide: tl.constexpr, tall: tl.constexpr):
    """The plane, batch row, head, rows and columns of a program, and which numbers there are."""
    # The other axes of a grid are short.
    parts = tl.cdiv(rows, tall)
    plane = (tl.program_id(0) // parts).to(tl.int64)
    i = (tl.program_id(0) % parts).to(tl.int64) * tall + tl.arange(0, tall)
    d = tl.arange(0, wide)[None, :]
    return plane, plane // heads, plane % heads, i, d, (i < rows)[:, None] & (d < width)


@triton.jit
def deltas(
    out,
    dout,
    lse,
    dlse,
    first,
    rows,
    across,
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
    """-lse_i / log 2 and -delta_i, [B, H, 2, across]; lse and dlse [B, H, N] in memory."""
    plane, b, h, i, d, inside = _own_rows(rows, heads, width, wide, tall)
    one = tl.load(
        out + b * out_batch + h * out_head + i[:, None] * out_row + d, mask=inside, other=0.0
    )
    other = tl.load(
        dout + b * dout_batch + h * dout_head + i[:, None] * dout_row + d, mask=inside, other=0.0
    )
    delta = tl.sum(one.to(tl.float32) * other.to(tl.float32), axis=1)
    at = plane * rows + i
    if has_dlse:
        delta -= tl.load(dlse + at, mask=i < rows, other=0.0)
    found = tl.load(lse + at, mask=i < rows, other=0.0)
    at = first + 2 * plane * across + i
    tl.store(at, -_LOG2_E * found, mask=i < rows)
    tl.store(at + across, -delta, mask=i < rows)


@triton.jit
def scaled(
    sums,
    out,
    cut,
    scale,
    turned,
    rows,
    heads,
    out_batch,
    out_head,
    out_row,
    out_column,
    few: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
):
    """out = scale sums, of tiles of 64 rows, in an order of their own (see ``_hopper_backward``).

    With ``few``, sums are those of tiles of 128 rows, int32 [C, 4]: first row, head, batch row,
    of which the bits are ``turned`` by -1 for the tensor whose batch rows are given as ~ of them.
    """
    tile = tl.program_id(0).to(tl.int64)
    if few:
        own = cut + tile // 2 * 4
        h, b = tl.load(own + 1).to(tl.int64), (tl.load(own + 2) ^ turned).to(tl.int64)
        i = tl.load(own).to(tl.int64) + tile % 2 * 64 + tl.arange(0, 64)
        d = tl.arange(0, wide)[None, :]
        inside = (i < rows)[:, None] & (d < width) & (b >= 0)
    else:
        _plane, b, h, i, d, inside = _own_rows(rows, heads, width, wide, 64)
    found = scale * tl.load(sums + tile * 64 * wide + tl.arange(0, 64 * wide))
    # Piece, columns, warp, rows, columns, half, columns.
    found = found.reshape([wide // 64, 8, 4, 8, 4, 2, 2])
    found = found.permute((2, 5, 3, 0, 1, 4, 6)).reshape([64, wide])
    at = out + b * out_batch + h * out_head + i[:, None] * out_row + d * out_column
    tl.store(at, found.to(out.dtype.element_ty), mask=inside)
