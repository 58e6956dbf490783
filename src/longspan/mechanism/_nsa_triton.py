"""The Triton kernel of ``_nsa_scores``; imported only where there is a GPU.

One program holds a tile of rows of one key head, and walks the compressed blocks that have ended
by then. Logits live in registers only: written out they would take N S numbers for every query
head.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def sum_weights(
    q,
    k,
    lse,
    ended,
    out,
    rows,
    blocks,
    kv_heads,
    step,
    scale,
    group: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    tall: tl.constexpr,
    broad: tl.constexpr,
):
    plane = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * tall + tl.arange(0, tall)
    d = tl.arange(0, wide)
    live = n < rows
    end = tl.load(ended + (plane // kv_heads) * step + n, mask=live, other=0)
    last = tl.max(end, axis=0)
    for start in range(0, last, broad):
        s = start + tl.arange(0, broad)
        key = tl.load(
            k + (plane * blocks + s)[None, :] * width + d[:, None],
            mask=(s < blocks)[None, :] & (d < width)[:, None],
            other=0.0,
        )
        total = tl.zeros([tall, broad], tl.float32)
        # A loop, not unrolled: the queries of every head in shared memory at once do not fit.
        for g in tl.range(group):
            row = (plane * group + g) * rows + n
            query = tl.load(
                q + row[:, None] * width + d[None, :],
                mask=live[:, None] & (d < width)[None, :],
                other=0.0,
            )
            known = tl.load(lse + row, mask=live, other=0.0)
            logit = tl.dot(query, key, input_precision="ieee") * scale
            total += tl.exp(logit - known[:, None])
        seen = s[None, :] < end[:, None]
        tl.store(
            out + (plane * rows + n)[:, None] * blocks + s[None, :],
            tl.where(seen, total, 0.0),
            mask=live[:, None] & (s < blocks)[None, :],
        )
