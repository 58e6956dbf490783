"""The Triton kernels of ``_chosen``; imported only where there is a GPU.

Entry e of a list says which copy of a row (row ``copy // slots``) stands there; entries of one
block are neighbours. Each row of a list stands for ``group`` query rows, one for each head, which
lie side by side in a tile of ``tall`` rows. Offsets are 64-bit.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

# A kernel is not compiled anew where one of these is 1 or a multiple of 16: none is a step of an
# innermost axis.
_SIZES = ("rows", "keys", "slots", "blocks", "parts", "part", "part_rows", "pieces", "longest")


@triton.jit
def _entries(order, plane, first, last, rows, slots, group: tl.constexpr, tall: tl.constexpr):
    """Of each row of a tile: whether there is one, its copy, and its place among all queries."""
    m = tl.arange(0, tall)
    entry = first + m // group
    live = (m < tall // group * group) & (entry < last)
    copy = tl.load(order + plane * rows * slots + entry, mask=live, other=0).to(tl.int64)
    return live, copy, (plane * group + m % group) * rows + copy // slots


@triton.jit
def _tile(tile_block, tile_first, offset, plane, part, parts, blocks, tall, group):
    """The block of this program's tile, its first entry, and the end of the block's entries."""
    at = plane * parts + part
    block = tl.load(tile_block + at * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    there = block < blocks
    before = tl.load(tile_first + at * (blocks + 1) + block, mask=there, other=0)
    own = offset + plane * (blocks * parts + 1) + block * parts + part
    first = tl.load(own, mask=there, other=0)
    last = tl.load(own + 1, mask=there, other=0)
    return block, first + (tl.program_id(0) - before) * (tall // group), last


@triton.jit
def _rows(x, at, live, width: tl.constexpr, wide: tl.constexpr):
    d = tl.arange(0, wide)
    inside = live[:, None] & (d < width)[None, :]
    return tl.load(x + at[:, None] * width + d[None, :], mask=inside, other=0.0)


@triton.jit
def _put(x, at, value, live, width: tl.constexpr, wide: tl.constexpr):
    d = tl.arange(0, wide)
    inside = live[:, None] & (d < width)[None, :]
    tl.store(x + at[:, None] * width + d[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def attend(
    q,
    k,
    v,
    order,
    offset,
    tile_block,
    tile_first,
    out,
    out_lse,
    rows,
    keys,
    slots,
    blocks,
    parts,
    part,
    part_rows,
    scale,
    group: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    v_width: tl.constexpr,
    v_wide: tl.constexpr,
    tall: tl.constexpr,
    broad: tl.constexpr,
):
    """Attention of the rows of a tile to their block, written by copy of a row; ``scale`` has
    log2(e) in it."""
    plane = tl.program_id(1).to(tl.int64)
    block, first, last = _tile(
        tile_block, tile_first, offset, plane, part, parts, blocks, tall, group
    )
    if block >= blocks:
        return
    live, copy, row = _entries(order, plane, first, last, rows, slots, group, tall)
    query = _rows(q, row, live, width, wide)
    top = tl.full([tall], float("-inf"), tl.float32)
    total = tl.zeros([tall], tl.float32)
    sums = tl.zeros([tall, v_wide], tl.float32)
    for start in range(0, size, broad):
        j = start + tl.arange(0, broad)
        seen = (j < size) & (block * size + j < keys)
        key = _rows(k, plane * keys + block * size + j, seen, width, wide)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logit = tl.where(seen[None, :], logit, float("-inf"))
        # Finite: the first key of a block is always there.
        higher = tl.maximum(top, tl.max(logit, axis=1))
        weight = tl.exp2(logit - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, axis=1)
        value = _rows(v, plane * keys + block * size + j, seen, v_width, v_wide)
        sums = sums * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = higher
    head = tl.arange(0, tall) % group
    copies = part_rows * slots
    to = (plane * group + head) * copies + copy - part * copies
    _put(out, to, sums / total[:, None], live, v_width, v_wide)
    tl.store(out_lse + to, (top + tl.log2(total)) * 0.6931471805599453, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def query_gradients(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    order,
    offset,
    tile_block,
    tile_first,
    dq,
    rows,
    keys,
    slots,
    blocks,
    parts,
    part,
    part_rows,
    scale,
    group: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    v_width: tl.constexpr,
    v_wide: tl.constexpr,
    tall: tl.constexpr,
    broad: tl.constexpr,
):
    """What the block of a tile adds to the gradient of its queries, written by copy of a row."""
    plane = tl.program_id(1).to(tl.int64)
    block, first, last = _tile(
        tile_block, tile_first, offset, plane, part, parts, blocks, tall, group
    )
    if block >= blocks:
        return
    live, copy, row = _entries(order, plane, first, last, rows, slots, group, tall)
    query = _rows(q, row, live, width, wide)
    slope = _rows(d_out, row, live, v_width, v_wide)
    known = tl.load(lse + row, mask=live, other=0.0) * 1.4426950408889634
    less = tl.load(delta + row, mask=live, other=0.0)
    sums = tl.zeros([tall, wide], tl.float32)
    for start in range(0, size, broad):
        j = start + tl.arange(0, broad)
        seen = (j < size) & (block * size + j < keys)
        key = _rows(k, plane * keys + block * size + j, seen, width, wide)
        value = _rows(v, plane * keys + block * size + j, seen, v_width, v_wide)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee")
        weight = tl.exp2(logit * (scale * 1.4426950408889634) - known[:, None])
        weight = tl.where(seen[None, :], weight, 0.0)
        change = tl.dot(slope, tl.trans(value), input_precision="ieee") - less[:, None]
        sums += tl.dot((weight * change).to(key.dtype), key, input_precision="ieee")
    head = tl.arange(0, tall) % group
    copies = part_rows * slots
    to = (plane * group + head) * copies + copy - part * copies
    _put(dq, to, sums * scale, live, width, wide)


@triton.jit(do_not_specialize=_SIZES)
def key_gradients(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    order,
    offset,
    piece_block,
    piece_first,
    dk,
    dv,
    rows,
    keys,
    slots,
    blocks,
    parts,
    pieces,
    longest,
    scale,
    group: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    v_width: tl.constexpr,
    v_wide: tl.constexpr,
    tall: tl.constexpr,
    broad: tl.constexpr,
    stages: tl.constexpr,
):
    """Gradients of some keys of a block from at most ``longest`` of its entries, in float32."""
    plane = tl.program_id(1).to(tl.int64)
    tiles: tl.constexpr = (size + broad - 1) // broad
    piece = tl.program_id(0) // tiles
    block = tl.load(piece_block + plane * pieces + piece).to(tl.int64)
    if block >= blocks:
        return
    before = tl.load(piece_first + plane * (blocks + 1) + block)
    own = offset + plane * (blocks * parts + 1) + block * parts
    first = tl.load(own) + (piece - before) * longest
    last = tl.minimum(first + longest, tl.load(own + parts))
    j = tl.program_id(0) % tiles * broad + tl.arange(0, broad)
    seen = (j < size) & (block * size + j < keys)
    key = _rows(k, plane * keys + block * size + j, seen, width, wide)
    value = _rows(v, plane * keys + block * size + j, seen, v_width, v_wide)
    dk_sum = tl.zeros([broad, wide], tl.float32)
    dv_sum = tl.zeros([broad, v_wide], tl.float32)
    for entry in tl.range(first, last, tall // group, num_stages=stages):
        live, _, row = _entries(order, plane, entry, last, rows, slots, group, tall)
        query = _rows(q, row, live, width, wide)
        slope = _rows(d_out, row, live, v_width, v_wide)
        known = tl.load(lse + row, mask=live, other=0.0) * 1.4426950408889634
        less = tl.load(delta + row, mask=live, other=0.0)
        logit = tl.dot(key, tl.trans(query), input_precision="ieee")
        # Rows that are not there have slopes of 0, and add nothing.
        weight = tl.exp2(logit * (scale * 1.4426950408889634) - known[None, :])
        dv_sum += tl.dot(weight.to(slope.dtype), slope, input_precision="ieee")
        change = tl.dot(value, tl.trans(slope), input_precision="ieee") - less[None, :]
        dk_sum += tl.dot((weight * change).to(query.dtype), query, input_precision="ieee")
    to = (plane * pieces + piece) * size + j
    _put(dk, to, dk_sum * scale, seen, width, wide)
    _put(dv, to, dv_sum, seen, v_width, v_wide)


@triton.jit(do_not_specialize=_SIZES)
def add_pieces(
    x,
    piece_first,
    out,
    keys,
    blocks,
    pieces,
    size: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    """Gradients of keys, added up over the pieces of their block."""
    plane = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    block = n // size
    own = piece_first + plane * (blocks + 1) + block
    first = tl.load(own, mask=n < keys, other=0).to(tl.int64)
    count = tl.load(own + 1, mask=n < keys, other=0) - first
    total = tl.zeros([tall, wide], tl.float32)
    for i in range(tl.max(count, axis=0)):
        at = (plane * pieces + first + i) * size + n % size
        total += _rows(x, at, i < count, width, wide)
    _put(out, plane * keys + n, total, n < keys, width, wide)


@triton.jit(do_not_specialize=_SIZES)
def join(
    x,
    x_lse,
    block,
    out,
    lse,
    rows,
    slots,
    blocks,
    part,
    part_rows,
    group: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    """What the blocks of a row gave, merged by log-sum-exp."""
    plane = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    n = part * part_rows + r
    live = (r < part_rows) & (n < rows)
    top = tl.full([tall], float("-inf"), tl.float32)
    total = tl.zeros([tall], tl.float32)
    sums = tl.zeros([tall, wide], tl.float32)
    for c in range(slots):
        at = (plane // group * rows + n) * slots + c
        used = tl.load(block + at, mask=live, other=blocks) < blocks
        at = (plane * part_rows + r) * slots + c
        own = tl.load(x_lse + at, mask=used, other=float("-inf"))
        higher = tl.maximum(top, own)
        # Where nothing was seen so far both are -inf, and so is their difference to be.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp(top - safe)
        weight = tl.exp(own - safe)
        total = total * fade + weight
        sums = sums * fade[:, None] + weight[:, None] * _rows(x, at, used, width, wide).to(
            tl.float32
        )
        top = higher
    share = tl.where(total > 0.0, 1.0 / total, 0.0)
    _put(out, plane * rows + n, sums * share[:, None], live, width, wide)
    known = tl.where(total > 0.0, top + tl.log(total), float("-inf"))
    tl.store(lse + plane * rows + n, known, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def add_copies(
    x,
    block,
    out,
    rows,
    slots,
    blocks,
    part,
    part_rows,
    group: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    """Gradients of queries, added up over the blocks of a row."""
    plane = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    n = part * part_rows + r
    live = (r < part_rows) & (n < rows)
    sums = tl.zeros([tall, wide], tl.float32)
    for c in range(slots):
        at = (plane // group * rows + n) * slots + c
        used = tl.load(block + at, mask=live, other=blocks) < blocks
        sums += _rows(x, (plane * part_rows + r) * slots + c, used, width, wide).to(tl.float32)
    _put(out, plane * rows + n, sums, live, width, wide)


@triton.jit
def slopes(
    out,
    d_out,
    d_lse,
    delta,
    rows,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
):
    """delta = out . d_out - d_lse, for all rows of all heads."""
    n = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    live = n < rows
    product = _rows(out, n, live, width, wide).to(tl.float32)
    product *= _rows(d_out, n, live, width, wide).to(tl.float32)
    less = tl.load(d_lse + n, mask=live, other=0.0)
    tl.store(delta + n, tl.sum(product, axis=1) - less, mask=live)
