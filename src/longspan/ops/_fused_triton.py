"""The Triton kernels of ``fused``; imported only where there is a GPU.

Offsets are 64-bit: a million rows of 32 heads hold more numbers than 32 bits can count.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def gather_rows(
    x,
    row,
    out,
    rows,
    places,
    heads,
    row_step,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    plane = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * tall + tl.arange(0, tall)
    d = tl.arange(0, wide)[None, :]
    source = tl.load(row + (plane // heads) * row_step + p, mask=p < places, other=0)
    used = (p < places)[:, None] & (d < width)
    found = tl.load(x + (plane * rows + source)[:, None] * width + d, mask=used)
    tl.store(out + (plane * places + p)[:, None] * width + d, found, mask=used)


@triton.jit
def merge_rows(
    outs, lses, out, lse, rows, width: tl.constexpr, wide: tl.constexpr, tall: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    d = tl.arange(0, wide)[None, :]
    live = r < rows
    used = live[:, None] & (d < width)
    at = r[:, None] * width + d
    top = tl.full([tall], float("-inf"), tl.float32)
    for i in tl.static_range(len(outs)):
        top = tl.maximum(top, tl.load(lses[i] + r, mask=live, other=float("-inf")))
    # Rows that see nothing anywhere keep weights of 0.
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([tall], tl.float32)
    sums = tl.zeros([tall, wide], tl.float32)
    for i in tl.static_range(len(outs)):
        weight = tl.exp(tl.load(lses[i] + r, mask=live, other=float("-inf")) - top)
        total += weight
        sums += weight[:, None] * tl.load(outs[i] + at, mask=used, other=0.0).to(tl.float32)
    share = tl.where(total > 0.0, 1.0 / total, 0.0)
    tl.store(out + at, (sums * share[:, None]).to(out.dtype.element_ty), mask=used)
    tl.store(lse + r, tl.where(total > 0.0, top + tl.log(total), float("-inf")), mask=live)


@triton.jit
def merge_gradients(
    outs,
    lses,
    lse,
    d_out,
    d_lse,
    d_outs,
    d_lses,
    rows,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    d = tl.arange(0, wide)[None, :]
    live = r < rows
    used = live[:, None] & (d < width)
    at = r[:, None] * width + d
    total = tl.load(lse + r, mask=live, other=float("-inf"))
    total = tl.where(total == float("-inf"), 0.0, total)
    slope = tl.load(d_out + at, mask=used, other=0.0).to(tl.float32)
    mean = tl.zeros([tall], tl.float32)
    for i in tl.static_range(len(outs)):
        weight = tl.exp(tl.load(lses[i] + r, mask=live, other=float("-inf")) - total)
        own = tl.load(outs[i] + at, mask=used, other=0.0).to(tl.float32)
        mean += weight * tl.sum(slope * own, axis=1)
    change = tl.load(d_lse + r, mask=live, other=0.0) - mean
    for i in tl.static_range(len(outs)):
        weight = tl.exp(tl.load(lses[i] + r, mask=live, other=float("-inf")) - total)
        own = tl.load(outs[i] + at, mask=used, other=0.0).to(tl.float32)
        tl.store(
            d_outs[i] + at,
            (weight[:, None] * slope).to(d_outs[i].dtype.element_ty),
            mask=used,
        )
        tl.store(d_lses[i] + r, weight * (tl.sum(slope * own, axis=1) + change), mask=live)
