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
def begun(
    out,
    dout,
    lse,
    dlse,
    first,
    zeros,
    numbers,
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
    at_once: tl.constexpr,
):
    """-lse_i / log 2 and -delta_i, [B, H, 2, across]; lse and dlse [B, H, N] in memory.

    And as many ``zeros`` of each program as ``numbers`` says.
    """
    plane, b, h, i, d, inside = _own_rows(rows, heads, width, wide, tall)
    one = tl.load(
        out + b * out_batch + h * out_head + i[:, None] * out_row + d, mask=inside, other=0.0
    )
    other = tl.load(
        dout + b * dout_batch + h * dout_head + i[:, None] * dout_row + d, mask=inside, other=0.0
    )
    from_zero = zeros + tl.program_id(0).to(tl.int64) * numbers
    for some in range(0, numbers, at_once):
        j = some + tl.arange(0, at_once)
        tl.store(from_zero + j, tl.zeros([at_once], tl.float32), mask=j < numbers)
    delta = tl.sum(one.to(tl.float32) * other.to(tl.float32), axis=1)
    at = plane * rows + i
    if has_dlse:
        delta -= tl.load(dlse + at, mask=i < rows, other=0.0)
    found = tl.load(lse + at, mask=i < rows, other=0.0)
    at = first + 2 * plane * across + i
    tl.store(at, -_LOG2_E * found, mask=i < rows)
    tl.store(at + across, -delta, mask=i < rows)


@triton.jit
def ended(
    sums,
    dq,
    scale,
    tiles,
    heads,
    cut_sums,
    cut,
    pieces,
    dk,
    dv,
    more_dk,
    more_dv,
    width: tl.constexpr,
    v_width: tl.constexpr,
    wide: tl.constexpr,
    adds: tl.constexpr,
):
    """dq = scale sums, and dk and dv of the keys that are cut: tiles of 64 rows.

    A gradient is its memory, rows, and four strides. Sums are in an order of their own (see
    ``_hopper_backward``).

    Args:
        sums: of dq, [B, H, Q 64 wide].
        dq: where it goes.
        scale: factor on its sums.
        tiles: B H Q of them.
        heads: of the queries.
        cut_sums: of dk, then of dv, [2, C, 128 wide].
        cut: [C, 4], the first row of each, head and batch row, which is ~ of one where the keys
            are in the second pair of tensors.
        pieces: 2 C.
        dk: where these go, as do ``dv``, ``more_dk`` and ``more_dv``; the last two may be None.
        adds: whether dk and dv are added to what is there.
    """
    tile = tl.program_id(0).to(tl.int64)
    if tile < tiles:
        _plane, b, h, i, _d, _inside = _own_rows(dq[1], heads, width, wide, 64)
        _put(dq, b, h, i, scale * _found(sums, tile, wide), width, False)
    else:
        piece = tile - tiles
        found = _found(cut_sums, piece, wide)
        of_values = piece >= pieces
        piece -= of_values.to(tl.int64) * pieces
        own = cut + piece // 2 * 4
        i = tl.load(own).to(tl.int64) + piece % 2 * 64 + tl.arange(0, 64)
        h, b = tl.load(own + 1).to(tl.int64), tl.load(own + 2).to(tl.int64)
        if b >= 0:
            if of_values:
                _put(dv, b, h, i, found, v_width, adds)
            else:
                _put(dk, b, h, i, found, width, adds)
        elif more_dk is not None:
            if of_values:
                _put(more_dv, ~b, h, i, found, v_width, adds)
            else:
                _put(more_dk, ~b, h, i, found, width, adds)


@triton.jit
def _found(sums, tile, wide: tl.constexpr):
    """The sums of a tile, by rows and columns."""
    found = tl.load(sums + tile * 64 * wide + tl.arange(0, 64 * wide))
    # Piece, columns, warp, rows, columns, half, columns.
    found = found.reshape([wide // 64, 8, 4, 8, 4, 2, 2])
    return found.permute((2, 5, 3, 0, 1, 4, 6)).reshape([64, wide])


@triton.jit
def _put(to, b, h, i, found, width: tl.constexpr, adds: tl.constexpr):
    d = tl.arange(0, found.shape[1])[None, :]
    at = to[0] + b * to[2] + h * to[3] + i[:, None] * to[4] + d * to[5]
    inside = (i < to[1])[:, None] & (d < width)
    found = found.to(to[0].dtype.element_ty)
    if adds:
        # Tiles of the same keys by remainder may come at the same time.
        tl.atomic_add(at, found, mask=inside, sem="relaxed")
    else:
        tl.store(at, found, mask=inside)
