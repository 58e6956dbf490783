"""The Triton kernel of ``decode``; imported only where there is a GPU.

A program has one query row of the heads that share a key head, and one part of the keys that it
sees. Where these heads see other keys than each other, it takes them one after another.

Axes: H rows of a tile, which are query heads; S keys of a step; D columns.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _row(table, step, share, places, b, h, p, given: tl.constexpr):
    """Where the row at a place lies, -1 for nowhere."""
    row = p
    if given:
        row = tl.load(table + b * step + (h // share) * places + p)
    return row


@triton.jit(
    do_not_specialize=[
        "places",
        "count",
        "keys",
        "group_step",
        "q_row_step",
        "q_row_share",
        "k_row_step",
        "k_row_share",
        "first_part",
        "parts",
        "rows",
        "batch",
        "key_heads",
        "heads",
    ]
)
def decode(
    q,
    k,
    v,
    lo,
    hi,
    group,
    q_rows,
    k_rows,
    q_heads,
    k_heads,
    outs,
    lses,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_part,
    out_batch,
    out_head,
    out_row,
    places,
    count,
    keys,
    group_step,
    q_row_step,
    q_row_share,
    k_row_step,
    k_row_share,
    first_part,
    parts,
    rows,
    batch,
    key_heads,
    heads,
    scale_log2,
    q_moved: tl.constexpr,
    k_moved: tl.constexpr,
    q_picked: tl.constexpr,
    k_picked: tl.constexpr,
    share: tl.constexpr,
    tall: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    v_width: tl.constexpr,
    v_wide: tl.constexpr,
    step: tl.constexpr,
):
    part = tl.program_id(0)
    x = tl.program_id(1).to(tl.int64)
    p = x % places
    own_k = x // places % key_heads
    b = x // places // key_heads
    r = tl.arange(0, tall)
    d = tl.arange(0, wide)
    e = tl.arange(0, v_wide)
    # The heads of this program among those that take part, and among all.
    h = own_k * share + tl.minimum(r, share - 1)
    real = h
    if q_picked:
        real = tl.load(q_heads + h)
    real_k = own_k
    if k_picked:
        real_k = tl.load(k_heads + own_k)
    group_H = tl.load(group + b * group_step + h)
    at_row = _row(q_rows, q_row_step, q_row_share, places, b, h, p, q_moved)
    row_H = tl.zeros([tall], tl.int64) + at_row
    live_H = (r < share) & (row_H >= 0)
    at_q = q + b * q_batch + real[:, None] * q_head + row_H[:, None] * q_row + d[None, :]
    q_HD = tl.load(at_q, mask=live_H[:, None] & (d < width)[None, :], other=0.0)
    k0 = k + b * k_batch + real_k * k_head
    v0 = v + b * v_batch + real_k * v_head
    table = k_rows
    if k_moved:
        table = k_rows + b * k_row_step + (own_k // k_row_share) * keys
    top = tl.full([tall], float("-inf"), tl.float32)
    total = tl.zeros([tall], tl.float32)
    acc = tl.zeros([tall, v_wide], tl.float32)
    alike = tl.min(group_H, 0) == tl.max(group_H, 0)
    turns = tl.where(alike, 1, share)
    for turn in range(turns):
        own_H = live_H & (alike | (r == turn))
        own = tl.sum(tl.where(r == turn, group_H, 0), 0)
        first = (own * places + p) * count
        seen = tl.zeros([], tl.int32)
        for t in range(count):
            seen += tl.maximum(tl.load(hi + first + t) - tl.load(lo + first + t), 0)
        # Whole steps, so that of few keys the first parts have all.
        size = tl.cdiv(tl.cdiv(seen, parts), step) * step
        # Keys from the first one of a range to the end of the part, which begins ``size`` before.
        # A number of its own for that, which goes down with this one, stays as it was at first in
        # what Triton 3.6 compiles.
        stop = part * size + size
        for t in range(count):
            from_key, to_key = tl.load(lo + first + t), tl.load(hi + first + t)
            end = tl.minimum(to_key, from_key + stop)
            for j in range(from_key + tl.maximum(stop - size, 0), end, step):
                key = j + tl.arange(0, step)
                there = key < end
                row = key.to(tl.int64)
                if k_moved:
                    row = tl.load(table + key, mask=there, other=-1).to(tl.int64)
                    there = row >= 0
                k_DS = tl.load(
                    k0 + row[None, :] * k_row + d[:, None],
                    mask=there[None, :] & (d < width)[:, None],
                    other=0.0,
                )
                v_SD = tl.load(
                    v0 + row[:, None] * v_row + e[None, :],
                    mask=there[:, None] & (e < v_width)[None, :],
                    other=0.0,
                )
                s = tl.dot(q_HD, k_DS, input_precision="ieee") * scale_log2
                s = tl.where(own_H[:, None] & there[None, :], s, float("-inf"))
                new = tl.maximum(top, tl.max(s, 1))
                base = tl.where(new == float("-inf"), 0.0, new)
                weight = tl.exp2(s - base[:, None])
                shrink = tl.exp2(top - base)
                total = total * shrink + tl.sum(weight, 1)
                acc = acc * shrink[:, None] + tl.dot(
                    weight.to(v_SD.dtype), v_SD, input_precision="ieee"
                )
                top = new
            stop -= tl.maximum(to_key - from_key, 0)
    # NaN stays NaN.
    share_of = tl.where(total == 0.0, 0.0, 1.0 / total)
    found = tl.where(total == 0.0, float("-inf"), top * 0.6931471805599453 + tl.log(total))
    slot = (first_part + part).to(tl.int64)
    to = outs + slot * out_part + b * out_batch + real[:, None] * out_head
    to += row_H[:, None] * out_row + e[None, :]
    tl.store(
        to,
        (acc * share_of[:, None]).to(outs.dtype.element_ty),
        mask=live_H[:, None] & (e < v_width)[None, :],
    )
    at = ((slot * batch + b) * heads + real) * rows + row_H
    tl.store(lses + at, found, mask=live_H)
