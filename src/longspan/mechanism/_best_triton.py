"""The Triton kernel of ``best_blocks``; imported only where there is a GPU.

A program holds the scores of one row, and takes the best of them again and again. A score and the
number of its block are one whole number, ordered as the scores are, lower blocks first among equal
ones.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit(do_not_specialize=["rows", "numbers", "blocks", "stop_step", "kv_heads", "count"])
def best_of_rows(
    score,
    stop,
    out,
    rows,
    numbers,
    blocks,
    stop_step,
    kv_heads,
    count,
    first: tl.constexpr,
    step: tl.constexpr,
    left: tl.constexpr,
    wide: tl.constexpr,
):
    plane = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0)
    end = tl.minimum(tl.load(stop + plane // kv_heads * stop_step + n), blocks)
    b = tl.arange(0, wide)
    open_ = (b >= first) & (b < end)
    total = tl.zeros([wide], tl.float32)
    for c in tl.static_range(step + left):
        s = b * step - left + c
        inside = open_ & (s >= 0) & (s < numbers)
        own = tl.load(score + (plane * rows + n) * numbers + s, mask=inside, other=0.0)
        total += own.to(tl.float32)
    bits = total.to(tl.int32, bitcast=True)
    # Negative floats descend as whole numbers.
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = (bits.to(tl.int64) << 32) | (wide - 1 - b).to(tl.int64)
    none = tl.full([wide], -0x7FFFFFFFFFFFFFFF, tl.int64)
    rank = tl.where(open_ & (total != float("-inf")), rank, none)
    for i in range(count):
        best = tl.max(rank, axis=0)
        found = tl.where(best == -0x7FFFFFFFFFFFFFFF, blocks, wide - 1 - (best & 0xFFFFFFFF))
        tl.store(out + (plane * rows + n) * count + i, found)
        rank = tl.where(rank == best, none, rank)
