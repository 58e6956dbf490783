"""The Triton kernels of ``fused``; imported only where there is a GPU.

Offsets are 64-bit: a million rows of 32 heads hold more numbers than 32 bits can count. Layouts
come as flat tuples, for each part the steps of batch, head and row, and its number of places.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def gather_rows(
    x,
    row,
    out,
    places,
    heads,
    x_batch,
    x_head,
    x_row,
    table_step,
    batch_step,
    share,
    count: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    plane = tl.program_id(1).to(tl.int64)
    b, h = plane // heads, plane % heads
    p = tl.program_id(0) * tall + tl.arange(0, tall)
    d = tl.arange(0, wide)[None, :]
    inside = (d < width) & (p < places)[:, None]
    base = x + b * x_batch + h * x_head
    at = row + b * batch_step + (h // share) * places + p
    source = tl.load(at, mask=p < places, other=-1).to(tl.int64)
    found = tl.load(
        base + source[:, None] * x_row + d, mask=inside & (source >= 0)[:, None], other=0
    )
    if count > 1:
        total = found.to(tl.float32)
        for c in tl.static_range(1, count):
            source = tl.load(at + c * table_step, mask=p < places, other=-1).to(tl.int64)
            used = inside & (source >= 0)[:, None]
            total += tl.load(base + source[:, None] * x_row + d, mask=used, other=0).to(tl.float32)
        found = total.to(out.dtype.element_ty)
    tl.store(out + (plane * places + p)[:, None] * width + d, found, mask=inside)


@triton.jit
def _own(rows, heads, wide: tl.constexpr, tall: tl.constexpr):
    """The plane of a program, its batch row, head, rows and columns, and which rows there are."""
    plane = tl.program_id(1).to(tl.int64)
    b, h = plane // heads, plane % heads
    r = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    d = tl.arange(0, wide)[None, :]
    return plane, b, h, r, d, r < rows


@triton.jit
def _place(i: tl.constexpr, tables, steps, shares, used: tl.constexpr, b, h, r, live, rows):
    """Where the rows stand in part i, -1 for nowhere."""
    place = tl.where(live, r, -1)
    if (used >> i) & 1:
        at = tables[i] + b * steps[i] + (h // shares[i]) * rows + r
        place = tl.load(at, mask=live, other=-1).to(tl.int64)
    return place


@triton.jit
def add_rows(
    parts,
    tables,
    steps,
    shares,
    strides,
    used: tl.constexpr,
    out,
    rows,
    heads,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    plane, b, h, r, d, live = _own(rows, heads, wide, tall)
    total = tl.zeros([tall, wide], tl.float32)
    for i in tl.static_range(len(parts)):
        place = _place(i, tables, steps, shares, used, b, h, r, live, rows)
        base = parts[i] + b * strides[4 * i] + h * strides[4 * i + 1]
        inside = (place >= 0)[:, None] & (d < width)
        own = tl.load(base + place[:, None] * strides[4 * i + 2] + d, mask=inside, other=0.0)
        total += own.to(tl.float32)
    to = out + (plane * rows + r)[:, None] * width + d
    tl.store(to, total.to(out.dtype.element_ty), mask=live[:, None] & (d < width))


@triton.jit
def add_into(
    total,
    part,
    row,
    places,
    heads,
    total_batch,
    total_head,
    total_row,
    part_batch,
    part_head,
    part_row,
    batch_step,
    share,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    _plane, b, h, p, d, live = _own(places, heads, wide, tall)
    at = row + b * batch_step + (h // share) * places + p
    r = tl.load(at, mask=live, other=-1).to(tl.int64)
    inside = (live & (r >= 0))[:, None] & (d < width)
    at_total = total + b * total_batch + h * total_head + r[:, None] * total_row + d
    at_part = part + b * part_batch + h * part_head + p[:, None] * part_row + d
    x = tl.load(at_total, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(at_part, mask=inside, other=0.0).to(tl.float32)
    tl.store(at_total, x.to(total.dtype.element_ty), mask=inside)


@triton.jit
def merge_rows(
    outs,
    lses,
    tables,
    steps,
    shares,
    strides,
    used: tl.constexpr,
    out,
    lse,
    rows,
    heads,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    plane, b, h, r, d, live = _own(rows, heads, wide, tall)
    top = tl.full([tall], float("-inf"), tl.float32)
    for i in tl.static_range(len(outs)):
        place = _place(i, tables, steps, shares, used, b, h, r, live, rows)
        at = lses[i] + plane * strides[4 * i + 3] + place
        top = tl.maximum(top, tl.load(at, mask=place >= 0, other=float("-inf")))
    # Rows that see nothing anywhere keep weights of 0.
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([tall], tl.float32)
    sums = tl.zeros([tall, wide], tl.float32)
    for i in tl.static_range(len(outs)):
        place = _place(i, tables, steps, shares, used, b, h, r, live, rows)
        at = lses[i] + plane * strides[4 * i + 3] + place
        weight = tl.exp(tl.load(at, mask=place >= 0, other=float("-inf")) - top)
        total += weight
        base = outs[i] + b * strides[4 * i] + h * strides[4 * i + 1]
        inside = (place >= 0)[:, None] & (d < width)
        own = tl.load(base + place[:, None] * strides[4 * i + 2] + d, mask=inside, other=0.0)
        sums += weight[:, None] * own.to(tl.float32)
    share = tl.where(total > 0.0, 1.0 / total, 0.0)
    to = plane * rows + r
    inside = live[:, None] & (d < width)
    tl.store(
        out + to[:, None] * width + d,
        (sums * share[:, None]).to(out.dtype.element_ty),
        mask=inside,
    )
    tl.store(lse + to, tl.where(total > 0.0, top + tl.log(total), float("-inf")), mask=live)


@triton.jit
def merge_into(
    out,
    lse,
    part,
    part_lse,
    row,
    head,
    places,
    heads,
    all_heads,
    rows,
    out_batch,
    out_head,
    out_row,
    part_batch,
    part_head,
    part_row,
    batch_step,
    share,
    ordered: tl.constexpr,
    chosen: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    plane, b, h, p, d, live = _own(places, heads, wide, tall)
    r = p
    if ordered:
        at = row + b * batch_step + (h // share) * places + p
        r = tl.load(at, mask=live, other=-1).to(tl.int64)
        live = live & (r >= 0)
    to = h
    if chosen:
        to = tl.load(head + h)
    new = tl.load(part_lse + plane * places + p, mask=live, other=float("-inf"))
    # Rows that see nothing here stay as they are.
    live = live & (new != float("-inf"))
    at_lse = lse + (b * all_heads + to) * rows + r
    old = tl.load(at_lse, mask=live, other=float("-inf"))
    top = tl.where(live, tl.maximum(old, new), 0.0)
    old, new = tl.exp(old - top), tl.exp(new - top)
    total = old + new
    inside = live[:, None] & (d < width)
    at_out = out + b * out_batch + to * out_head + r[:, None] * out_row + d
    at_part = part + b * part_batch + h * part_head + p[:, None] * part_row + d
    x = tl.load(at_out, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(at_part, mask=inside, other=0.0).to(tl.float32)
    share_old, share_new = old / total, new / total
    x = share_old[:, None] * x + share_new[:, None] * y
    tl.store(at_out, x.to(out.dtype.element_ty), mask=inside)
    tl.store(at_lse, top + tl.log(total), mask=live)


@triton.jit
def merge_stacked(
    outs,
    lses,
    out,
    lse,
    parts,
    count,
    rows,
    heads,
    out_batch,
    out_head,
    out_row,
    width: tl.constexpr,
    deep: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    s = tl.arange(0, deep)[:, None]
    d = tl.arange(0, wide)[None, :]
    live = r < count
    there = live[None, :] & (s < parts)
    # A number that is 1 has no type: it is a constant.
    at = s.to(tl.int64) * count + r[None, :]
    own = tl.load(lses + at, mask=there, other=float("-inf"))
    top = tl.max(own, axis=0)
    # Rows that see nothing anywhere keep weights of 0.
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(own - top[None, :])
    total = tl.sum(weight, axis=0)
    inside = there[:, :, None] & (d < width)[None, :, :]
    x = tl.load(outs + at[:, :, None] * width + d[None, :, :], mask=inside, other=0.0)
    found = tl.sum(weight[:, :, None] * x.to(tl.float32), axis=0)
    # NaN stays NaN.
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    plane = r // rows
    to = plane // heads * out_batch + plane % heads * out_head + r % rows * out_row
    tl.store(
        out + to[:, None] + d,
        (found * share[:, None]).to(out.dtype.element_ty),
        mask=live[:, None] & (d < width),
    )
    tl.store(lse + r, tl.where(total == 0.0, float("-inf"), top + tl.log(total)), mask=live)


@triton.jit
def merge_gradients(
    outs,
    lses,
    tables,
    steps,
    shares,
    strides,
    used: tl.constexpr,
    lse,
    d_out,
    d_lse,
    d_outs,
    d_strides,
    d_lses,
    rows,
    heads,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    plane, b, h, r, d, live = _own(rows, heads, wide, tall)
    row = plane * rows + r
    total = tl.load(lse + row, mask=live, other=float("-inf"))
    total = tl.where(total == float("-inf"), 0.0, total)
    inside = live[:, None] & (d < width)
    slope = tl.load(d_out + row[:, None] * width + d, mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros([tall], tl.float32)
    for i in tl.static_range(len(outs)):
        place = _place(i, tables, steps, shares, used, b, h, r, live, rows)
        at = lses[i] + plane * strides[4 * i + 3] + place
        weight = tl.exp(tl.load(at, mask=place >= 0, other=float("-inf")) - total)
        base = outs[i] + b * strides[4 * i] + h * strides[4 * i + 1]
        there = (place >= 0)[:, None] & (d < width)
        own = tl.load(base + place[:, None] * strides[4 * i + 2] + d, mask=there, other=0.0)
        mean += weight * tl.sum(slope * own.to(tl.float32), axis=1)
    change = tl.load(d_lse + row, mask=live, other=0.0) - mean
    for i in tl.static_range(len(outs)):
        place = _place(i, tables, steps, shares, used, b, h, r, live, rows)
        at = plane * strides[4 * i + 3] + place
        weight = tl.exp(tl.load(lses[i] + at, mask=place >= 0, other=float("-inf")) - total)
        base = outs[i] + b * strides[4 * i] + h * strides[4 * i + 1]
        there = (place >= 0)[:, None] & (d < width)
        own = tl.load(base + place[:, None] * strides[4 * i + 2] + d, mask=there, other=0.0)
        to = d_outs[i] + b * d_strides[4 * i] + h * d_strides[4 * i + 1]
        tl.store(
            to + place[:, None] * d_strides[4 * i + 2] + d,
            (weight[:, None] * slope).to(d_outs[i].dtype.element_ty),
            mask=there,
        )
        own_slope = tl.sum(slope * own.to(tl.float32), axis=1)
        tl.store(d_lses[i] + at, weight * (own_slope + change), mask=place >= 0)
