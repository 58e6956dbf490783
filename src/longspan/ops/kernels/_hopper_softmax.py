"""Weights of scores in the forward of ``hopper``, without a maximum in each tile.

    p_ij = 2^(s_ij - b_i)    l_i = sum_j p_ij    out_i = sum_j p_ij v_j / l_i
    lse_i = ln 2 b_i + ln l_i

Online softmax (Milakov & Gimelshein, arXiv 1805.02867) takes as b_i the greatest logit so far, and
so has to find it in each tile before the first weight, and to multiply all earlier sums by what it
grew. But any b_i gives the same result as long as no weight is too large for its type, and not all
of them vanish. So here b_i is the greatest logit of the first tile, never more than the greatest
one so far, and stays until a logit exceeds it by a slack. Weights are computed at once, and their
sums, which are needed anyway, tell whether one may. Only then, and where some row has seen no key
yet, does a warp look for maxima, moves the b_i of those rows, and computes its weights again;
outputs so far are multiplied only in warps where one moved.

FlashAttention-4 leaves sums as they are for the same reason, but looks for the maximum of each
tile. Of 472 instructions of a step 332 are left.

Whether b_i moves depends on the keys that row i sees and on nothing else (see ``_hopper_ptx``). So
no later key moves an earlier row by one bit.

Shapes: a thread has two of 64 rows, and of each group of 8 columns 2; sums and bases are [64, 4],
one number for each thread of a row, which for bases are all the same.
"""

from __future__ import annotations

from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]

from longspan.ops.kernels._hopper_ptx import shrinking, weighing

_PARTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
)
_weighing = gluon.constexpr_function(weighing)
_shrinking = gluon.constexpr_function(shrinking)


@gluon.jit
def first_weights(s, scale):
    """Weights of the first tile, their sums, and the greatest logits as bases."""
    by_row: gl.constexpr = gl.SliceLayout(1, _PARTS)
    top = gl.max(s, 1) * scale
    p = gl.exp2(s * scale - gl.where(top == float("-inf"), 0.0, top)[:, None])
    total = gl.sum(gl.sum(p.reshape([64, s.shape[1] // 8, 4, 2]), 3), 1)
    base = gl.convert_layout(top, by_row)[:, None].broadcast_to([64, 4])
    return p, gl.convert_layout(total, _PARTS), base


@gluon.jit
def next_weights(s, base, scale, dtype: gl.constexpr):
    """Weights for products in ``dtype``, their sums, and bases, -inf for rows without keys."""
    numbers: gl.constexpr = s.shape[1] // 2
    # Products are summed in float32, whose range bfloat16 has; float16 ends at 2^16.
    slack: gl.constexpr = 32 if dtype == gl.bfloat16 else 12
    code: gl.constexpr = _weighing(numbers, slack)
    # All threads of a warp have to come here together.
    p, found = gl.inline_asm_elementwise(
        code[0],
        code[1],
        [s, _spread(base, s), scale],
        (gl.float32, gl.float32),
        is_pure=True,
        pack=numbers,
    )
    # Sums are the first number of a thread's row, bases the second one.
    total, base = gl.split(found.reshape([64, s.shape[1] // 8, 4, 2]))
    return p, _first(total), _first(base)


@gluon.jit
def shrunk(acc, by):
    """Sums times numbers [64, 4]; a warp whose numbers are all 1 leaves its own as they are."""
    numbers: gl.constexpr = acc.shape[1] // 2
    code: gl.constexpr = _shrinking(numbers)
    return gl.inline_asm_elementwise(
        code[0], code[1], [acc, _spread(by, acc)], gl.float32, is_pure=True, pack=numbers
    )


@gluon.jit
def _spread(by, like):
    """Numbers [64, 4] for all that each thread has."""
    gl.static_assert(like.shape[0] == 64)
    groups: gl.constexpr = like.shape[1] // 8
    spread = by.reshape([64, 1, 4, 1]).broadcast_to([64, groups, 4, 2])
    return gl.convert_layout(spread.reshape([64, like.shape[1]]), like.type.layout)


@gluon.jit
def _first(x):
    """Of numbers [64, n, 4] those at the first of n, as _PARTS."""
    for _ in gl.static_range(4 if x.shape[1] == 16 else 3):
        x, _ = gl.split(x.reshape([64, 2, x.shape[1] // 2, 4]).permute((0, 2, 3, 1)))
    return gl.convert_layout(x.reshape([64, 4]), _PARTS)
