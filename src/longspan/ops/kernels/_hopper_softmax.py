"""Weights of scores in the forward of ``hopper``, without a maximum in each tile.

    p_ij = 2^(s_ij - b_i)    l_i = sum_j p_ij    out_i = sum_j p_ij v_j / l_i
    lse_i = ln 2 b_i + ln l_i

Online softmax (Milakov & Gimelshein, arXiv 1805.02867) takes as b_i the greatest logit so far, and
so has to find it in each tile before the first weight, and to multiply all earlier sums by what it
grew. But any b_i gives the same result as long as no weight is too large for its type. So here b_i
is the greatest logit of the first tile, and stays until a logit exceeds it by a slack: weights are
computed at once, and their sums, which are needed anyway, tell whether one did. Only then does a
warp look for maxima, moves the b_i of those rows, and computes its weights again; earlier sums are
multiplied only in warps where one moved.

FlashAttention-4 leaves sums as they are for the same reason, but looks for the maximum of each
tile. Of 472 instructions of a step 332 are left.

Whether b_i moves depends on the keys that row i sees and on nothing else: any weight beyond the
slack makes a sum that is noticed, and a warp that looks on behalf of one row leaves the others as
they are. So no later key moves an earlier row by one bit.

Shapes: a thread has two of 64 rows, and of each group of 8 columns 2; sums and bases are [64, 4],
one number for each thread of a row, which for bases are all the same.
"""

from __future__ import annotations

from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]

PARTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
)


@gluon.jit
def first_weights(s, scale):
    """Weights of the first tile, their sums, and the greatest logits as bases."""
    by_row: gl.constexpr = gl.SliceLayout(1, PARTS)
    top = gl.max(s, 1) * scale
    p = gl.exp2(s * scale - gl.where(top == float("-inf"), 0.0, top)[:, None])
    total = gl.sum(gl.sum(p.reshape([64, s.shape[1] // 8, 4, 2]), 3), 1)
    base = gl.convert_layout(top, by_row)[:, None].broadcast_to([64, 4])
    return p, gl.convert_layout(total, PARTS), base


@gluon.jit
def next_weights(s, base, scale, dtype: gl.constexpr):
    """Weights that ``dtype`` can hold, their sums, and bases, -inf for rows without keys."""
    numbers: gl.constexpr = s.shape[1] // 2
    code: gl.constexpr = _weighing(numbers, dtype)
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
    groups: gl.constexpr = like.shape[1] // 8
    all = by.reshape([64, 1, 4, 1]).broadcast_to([64, groups, 4, 2])
    return gl.convert_layout(all.reshape([64, like.shape[1]]), like.type.layout)


@gluon.jit
def _first(x):
    """Of numbers [64, n, 4] those at the first of n, as PARTS."""
    for _ in gl.static_range(4 if x.shape[1] == 16 else 3):
        x, _ = gl.split(x.reshape([64, 2, x.shape[1] // 2, 4]).permute((0, 2, 3, 1)))
    return gl.convert_layout(x.reshape([64, 4]), PARTS)


@gluon.constexpr_function
def _weighing(numbers, dtype):
    """PTX of ``next_weights`` for a thread with numbers of two rows, two of each row by turns.

    Results are weights, then as many numbers as there were, of which the first two of each row are
    set: its sum and its base. Arguments are scores, bases and scales.
    """
    # Products are summed in float32, whose range bfloat16 has; float16 ends at 2^16.
    log_slack = 5 if dtype == gl.bfloat16 else 3
    most = _power(2**log_slack - 1)
    found, s, base, scale = (k * numbers for k in range(1, 5))
    rows = [[i for i in range(numbers) if (i >> 1) & 1 == row] for row in (0, 1)]

    # Two sums a row, which do not wait for each other.
    weights = []
    for i in range(numbers):
        row = (i >> 1) & 1
        total = f"{'uv'[i & 1]}{row}"
        weights += [
            f"fma.rn.f32 p{i}, ${s + i}, ${scale}, n{row};",
            f"ex2.approx.ftz.f32 p{i}, p{i};",
            f"mov.f32 {total}, p{i};" if i < 4 else f"add.f32 {total}, {total}, p{i};",
        ]
    weights += [f"add.f32 u{row}, u{row}, v{row};" for row in (0, 1)]

    lines = ["{", ".reg .pred some;", f".reg .f32 p<{numbers}>;"]
    lines += [".reg .f32 b<2>, n<2>, u<2>, v<2>;"]
    for row in (0, 1):
        lines += [f"mov.f32 b{row}, ${base + 2 * row};", f"neg.f32 n{row}, b{row};"]
    lines += weights
    # Unordered comparisons: what a base of -inf leads to is no number.
    lines += [
        f"setp.gtu.f32 some, u0, {most};",
        f"setp.gtu.or.f32 some, u1, {most}, some;",
        "vote.sync.any.pred some, some, 0xffffffff;",
        "@!some bra.uni done;",
    ]
    for row in (0, 1):
        lines += [f"max.f32 u{row}, ${s + rows[row][0]}, ${s + rows[row][1]};"]
        lines += [f"max.f32 u{row}, u{row}, ${s + i};" for i in rows[row][2:]]
        for lane in (1, 2):
            lines += [
                f"shfl.sync.bfly.b32 v{row}, u{row}, {lane}, 0x1f, 0xffffffff;",
                f"max.f32 u{row}, u{row}, v{row};",
            ]
        lines += [
            f"mul.f32 u{row}, u{row}, ${scale};",
            f"add.f32 v{row}, b{row}, {_power(log_slack)};",
            f"setp.gt.f32 some, u{row}, v{row};",
            f"selp.f32 b{row}, u{row}, b{row}, some;",
            f"neg.f32 n{row}, b{row};",
            f"setp.eq.f32 some, b{row}, 0fFF800000;",
            f"selp.f32 n{row}, 0f00000000, n{row}, some;",
        ]
    lines += [*weights, "done:"]
    lines += [f"mov.f32 ${i}, p{i};" for i in range(numbers)]
    for row in (0, 1):
        at = found + 2 * row
        lines += [f"mov.f32 ${at}, u{row};", f"mov.f32 ${at + 1}, b{row};"]
    kinds = ["=f"] * (2 * numbers) + ["f"] * (3 * numbers)
    return "\n".join([*lines, "}"]), ",".join(kinds)


@gluon.constexpr_function
def _shrinking(numbers):
    """PTX of ``shrunk``. Results take the places of the sums; arguments are these and factors."""
    by = [f"${2 * numbers + 2 * row}" for row in (0, 1)]
    lines = [
        "{",
        ".reg .pred some;",
        f"setp.neu.f32 some, {by[0]}, {_power(0)};",
        f"setp.neu.or.f32 some, {by[1]}, {_power(0)}, some;",
        "vote.sync.any.pred some, some, 0xffffffff;",
        "@!some bra.uni same;",
    ]
    lines += [f"mul.f32 ${i}, ${i}, {by[(i >> 1) & 1]};" for i in range(numbers)]
    kinds = ["=f"] * numbers + [str(i) for i in range(numbers)] + ["f"] * numbers
    return "\n".join([*lines, "same:", "}"]), ",".join(kinds)


@gluon.constexpr_function
def _power(exponent):
    """A power of two as PTX writes it."""
    return f"0f{(127 + exponent) << 23:08X}"
