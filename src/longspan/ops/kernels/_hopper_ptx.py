"""Machine code of ``_hopper_softmax`` for one thread, as text; needs no Triton.

    p_i = 2^(s_i scale - b)     of two rows, two numbers of each by turns

A warp has 16 rows, four threads each. Its threads take a branch together or not at all.

A row moves its base where the exponent of its greatest weight, by the same instruction that makes
the weight, is beyond the slack. Such a weight is 2^slack or more, and a warp looks wherever a sum
is beyond half of that, so that no such row is missed: whether a base moves depends on its own row
alone, whichever row made the warp look.
"""

from __future__ import annotations


def weighing(numbers: int, slack: int) -> tuple[str, str]:
    """Code and constraints of ``next_weights``.

    Results are weights, then as many numbers as there were, of which the first two of each row are
    set: its sum and its base. Arguments are scores, bases and scales.

    Args:
        numbers: scores that a thread has.
        slack: what a logit may exceed the base of its row by, in powers of two.
    """
    found, s, base, scale = (k * numbers for k in range(1, 5))
    rows = [[i for i in range(numbers) if (i >> 1) & 1 == row] for row in (0, 1)]
    most = f"{2.0 ** (slack - 1):.1f}"

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
            f"fma.rn.f32 v{row}, u{row}, ${scale}, n{row};",
            f"setp.gt.f32 some, v{row}, {slack}.0;",
            f"mul.f32 u{row}, u{row}, ${scale};",
            f"selp.f32 b{row}, u{row}, b{row}, some;",
            f"neg.f32 n{row}, b{row};",
            f"setp.eq.f32 some, b{row}, 0fFF800000;",
            f"selp.f32 n{row}, 0.0, n{row}, some;",
        ]
    lines += [*weights, "done:"]
    lines += [f"mov.f32 ${i}, p{i};" for i in range(numbers)]
    for row in (0, 1):
        at = found + 2 * row
        lines += [f"mov.f32 ${at}, u{row};", f"mov.f32 ${at + 1}, b{row};"]
    kinds = ["=f"] * (2 * numbers) + ["f"] * (3 * numbers)
    return "\n".join([*lines, "}"]), ",".join(kinds)


def shrinking(numbers: int) -> tuple[str, str]:
    """Code and constraints of ``shrunk``.

    Results take the places of the sums; arguments are these and their factors.

    Args:
        numbers: sums that a thread has.
    """
    by = [f"${2 * numbers + 2 * row}" for row in (0, 1)]
    lines = [
        "{",
        ".reg .pred some;",
        f"setp.neu.f32 some, {by[0]}, 1.0;",
        f"setp.neu.or.f32 some, {by[1]}, 1.0, some;",
        "vote.sync.any.pred some, some, 0xffffffff;",
        "@!some bra.uni same;",
    ]
    lines += [f"mul.f32 ${i}, ${i}, {by[(i >> 1) & 1]};" for i in range(numbers)]
    kinds = ["=f"] * numbers + [str(i) for i in range(numbers)] + ["f"] * numbers
    return "\n".join([*lines, "same:", "}"]), ",".join(kinds)
