"""The machine code of Hopper's softmax, run by a small interpreter for the threads of a warp."""

from __future__ import annotations

import numpy as np
import pytest

from longspan.ops.kernels._hopper_ptx import shrinking, weighing

F32 = np.float32
LANES = np.arange(32)
SLACKS = (32, 12)


def number(text):
    if text.startswith("0f"):
        return np.full(32, np.uint32(int(text[2:], 16))).view(F32)
    return np.full(32, int(text, 16) if text.startswith("0x") else float(text), F32)


def executed(code, registers):
    """Registers after a run, and whether the branch was not taken.

    Args:
        code: as the kernel gets it.
        registers: values [32] of all that it reads, by name.
    """
    registers = dict(registers)

    def fma(a, b, c):
        wide = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
        return wide.astype(F32)

    def ex2(a):
        found = np.exp2(a)
        return np.where(found < F32(2.0**-126), F32(0), found)

    run = {
        "fma.rn.f32": fma,
        "ex2.approx.ftz.f32": ex2,
        "mov.f32": np.copy,
        "neg.f32": np.negative,
        "add.f32": np.add,
        "mul.f32": np.multiply,
        "max.f32": np.fmax,
        "selp.f32": lambda a, b, p: np.where(p, a, b),
        "setp.gtu.f32": lambda a, b: ~(a <= b),
        "setp.gtu.or.f32": lambda a, b, p: ~(a <= b) | p,
        "setp.gt.f32": np.greater,
        "setp.eq.f32": np.equal,
        "setp.neu.f32": lambda a, b: ~(a == b),
        "setp.neu.or.f32": lambda a, b, p: ~(a == b) | p,
        "vote.sync.any.pred": lambda p, _: np.full(32, p.any()),
        "shfl.sync.bfly.b32": lambda a, lane, _, __: a[LANES ^ int(lane[0])],
    }
    lines = code.split("\n")
    at, fell_through = 0, True
    with np.errstate(all="ignore"):
        while at < len(lines):
            line = lines[at]
            at += 1
            if line in "{}" or line.startswith(".reg") or line.endswith(":"):
                continue
            assert line.endswith(";")
            name, rest = line[:-1].split(" ", 1)
            if name.startswith("@!"):
                taken = ~registers[name[2:]]
                assert taken.all() or not taken.any()
                if taken[0]:
                    at, fell_through = lines.index(rest.removeprefix("bra.uni ") + ":"), False
                continue
            to, *operands = rest.split(", ")
            values = [registers[x] if x in registers else number(x) for x in operands]
            registers[to] = run[name](*values)
    return registers, fell_through


def where(i):
    """Row and column of a thread's number."""
    return (LANES >> 2) + 8 * ((i >> 1) & 1), 2 * (LANES & 3) + (i & 1) + 8 * (i >> 2)


def weights(s, base, scale, slack):
    """Weights of 16 rows, their sums and bases [16, 4], and whether the warp looked for maxima."""
    numbers = s.shape[1] // 2
    code, kinds = weighing(numbers, slack)
    assert kinds.split(",") == ["=f"] * 2 * numbers + ["f"] * 3 * numbers
    given = [s[where(i)] for i in range(numbers)]
    given += [base[where(i)[0]] for i in range(numbers)]
    given += [np.full(32, scale, F32)] * numbers
    # Behind the results.
    named = {f"${2 * numbers + i}": x for i, x in enumerate(given)}
    registers, looked = executed(code, named)
    p, (total, moved) = np.zeros_like(s), np.zeros((2, 16, 4), F32)
    for i in range(numbers):
        p[where(i)] = registers[f"${i}"]
    for row in (0, 1):
        at = (LANES >> 2) + 8 * row, LANES & 3
        total[at] = registers[f"${numbers + 2 * row}"]
        moved[at] = registers[f"${numbers + 2 * row + 1}"]
    return p, total, moved, looked


def warp(generator, columns, scale, slack):
    """Scores and bases of all kinds."""
    s = (generator.normal(size=(16, columns)) * generator.choice([1, 4]) / scale).astype(F32)
    base = (3 * generator.normal(size=16)).astype(F32)
    for row, kind in enumerate(generator.integers(0, 12, 16)):
        at = generator.integers(columns)
        if kind == 0:
            s[row, at] = (base[row] + slack * generator.uniform(0.9, 1.1)) / scale
        elif kind == 1:
            base[row] = -np.inf
        elif kind == 2:
            s[row] = base[row] = -np.inf
        elif kind == 3:
            s[row] = -np.inf
        elif kind == 4:
            s[row, : columns // 2] = base[row] = -np.inf
        elif kind == 5:
            s[row] = (base[row] + slack - 0.5) / scale
        elif kind == 6:
            base[row] = generator.choice([1e6, -1e5, 3e8])
            s[row] = (base[row] + generator.normal(size=columns)) / scale
    return s, base


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("slack", SLACKS)
def test_weights_sums_and_bases(slack, columns):
    generator, looks = np.random.default_rng(columns + slack), 0
    for scale in (F32(0.125 * 1.442695), F32(1), F32(3.3)) * 40:
        s, base = warp(generator, columns, scale, slack)
        p, total, moved, looked = weights(s, base, scale, slack)
        looks += looked
        assert (moved == moved[:, :1]).all()
        logits = s.astype(np.longdouble) * np.longdouble(scale)
        top, new = logits.max(1), moved[:, 0]
        # A base moves to the greatest logit, and where that is beyond the slack.
        near = 1e-6 * np.abs(top)
        np.testing.assert_allclose(new[new != base], top[new != base], rtol=1e-6)
        assert (new >= base).all()
        known = np.isfinite(base)
        stays, goes = known & (new == base), known & (new != base)
        assert (top[stays] <= base[stays] + slack + near[stays]).all()
        assert (top[goes] > base[goes] + slack - near[goes]).all()
        some = np.isfinite(new)
        assert (p[~some] == 0).all()
        assert (total[~some] == 0).all()
        expected = np.exp2(logits[some] - new[some, None])
        # A base is a rounded logit.
        off = 1e-5 + np.spacing(np.abs(new[some, None])) * 2
        assert (np.abs(p[some] - expected) <= off * expected + 1e-30).all()
        np.testing.assert_allclose(total.sum(1), p.sum(1), rtol=1e-5)
    assert looks


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("slack", SLACKS)
def test_no_row_moves_a_bit_of_another_one(slack, columns):
    generator = np.random.default_rng(columns - slack)
    scale = F32(0.125 * 1.442695)
    for _ in range(30):
        s, base = warp(generator, columns, scale, slack)
        # Around the slack, where a warp that looks moves a base and one that does not would not.
        s[5, 3], base[5] = (slack + generator.uniform(-0.6, 0.6)) / scale, 0
        alone = weights(s, base, scale, slack)
        for others in ("calm", "far above", "empty", "no numbers"):
            s1, base1 = np.zeros_like(s), np.zeros_like(base)
            if others == "far above":
                s1[:, 0] = 1000 / scale
            elif others == "empty":
                s1[:] = base1[:] = -np.inf
            elif others == "no numbers":
                s1[:] = np.nan
            for row in (5, generator.integers(16)):
                s2, base2 = s1.copy(), base1.copy()
                s2[row], base2[row] = s[row], base[row]
                for a, b in zip(weights(s2, base2, scale, slack)[:3], alone, strict=False):
                    assert a[row].tobytes() == b[row].tobytes()


def test_what_is_no_number_stays_one():
    for value in (np.nan, np.inf):
        s, base = np.zeros((16, 128), F32), np.zeros(16, F32)
        s[7, 40] = value
        p, total, _, looked = weights(s, base, F32(1), 32)
        assert looked
        assert np.isnan(total[7].sum())
        assert np.isnan(p[7]).any()
        assert np.isfinite(np.delete(total, 7, 0)).all()


def test_calm_rows_and_rows_below_the_slack_look_for_nothing():
    s = np.random.default_rng(0).normal(size=(16, 128)).astype(F32)
    for slack in SLACKS:
        assert not weights(s, s.max(1), F32(1), slack)[3]
        # As far above a base from a few keys as keys of another kind may lie.
        assert not weights(s + F32(5), s.max(1), F32(1), slack)[3]


@pytest.mark.parametrize("numbers", [32, 64])
def test_sums_are_multiplied_where_a_factor_is_not_1(numbers):
    generator = np.random.default_rng(numbers)
    code, kinds = shrinking(numbers)
    own = [str(i) for i in range(numbers)]
    assert kinds.split(",") == ["=f"] * numbers + own + ["f"] * numbers
    for factor in (1, 0.5, 0, np.nan):
        sums = [generator.normal(size=32).astype(F32) for _ in range(numbers)]
        by = np.ones((2, 32), F32)
        by[generator.integers(2), generator.integers(32)] = factor
        factors = [by[(i >> 1) & 1] for i in range(numbers)]
        # Sums lie in the registers of the results, and factors behind their own.
        named = {f"${i}": x for i, x in enumerate(sums)}
        named |= {f"${2 * numbers + i}": x for i, x in enumerate(factors)}
        registers, multiplied = executed(code, named)
        assert multiplied == (factor != 1)
        for i in range(numbers):
            np.testing.assert_array_equal(registers[f"${i}"], sums[i] * factors[i])
