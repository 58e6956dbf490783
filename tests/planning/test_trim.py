"""Keys that no query sees leave an order: the same pairs, whole tiles, less to gather."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import longspan as ls
from longspan.planning.compiler import passes_of
from longspan.planning.layout import layouts
from longspan.planning.trim import trimmed


def untrimmed(text, n, heads):
    rows = layouts(n, n, None, None, None, None)
    return passes_of(ls.parse(text), rows, heads)


CASES = [
    ("ssa(64, 16)", 8192, 4),
    ("window(64) | strided(16)", 8192, 4),
    ("longnet([128, 8192], [1, 32])", 8192, 4),
    ("window(64) | strided(32) | sink(3)", 16384, 2),
]


@pytest.mark.parametrize(("text", "n", "heads"), CASES)
def test_ranges_hold_the_same_keys(text, n, heads):
    saved = 0
    for one in untrimmed(text, n, heads):
        less = trimmed(one)
        if less is one:
            continue
        old, new = one.keys(0, n), less.keys(0, n)
        saved += len(old) - len(new)
        assert (len(old) - len(new)) % 128 == 0
        assert less.pairs == one.pairs
        for c in range(one.lo.shape[1]):
            used = one.lo[0, c] < one.hi[0, c]
            assert np.array_equal(used, less.lo[0, c] < less.hi[0, c])
            for row in np.linspace(0, one.lo.shape[2] - 1, 40).astype(int):
                for t in np.flatnonzero(used[row]):
                    a, b = one.lo[0, c, row, t], one.hi[0, c, row, t]
                    x, y = less.lo[0, c, row, t], less.hi[0, c, row, t]
                    assert np.array_equal(old[a:b], new[x:y])
                    # Tiles are cut where they were.
                    assert (a - x) % 128 == 0
    assert saved > n // 4


@pytest.mark.parametrize(("text", "n", "heads"), CASES[:2])
def test_attention_is_the_same(text, n, heads):
    make = torch.Generator().manual_seed(0)
    n = 2048
    q, k, v = (
        torch.randn(1, h, n, 8, generator=make, dtype=torch.float64, requires_grad=True)
        for h in (heads, 2, 2)
    )
    plan = ls.plan(ls.parse(text), n, heads)
    whole = replace(plan, passes=untrimmed(text, n, heads))
    sizes = [sum(len(one.keys(0, n)) for one in each.passes) for each in (plan, whole)]
    assert sizes[0] < sizes[1]
    found, expected = (
        (out, *torch.autograd.grad(out.cos().sum(), (q, k, v)))
        for out in (ls.attend(q, k, v, each) for each in (plan, whole))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_is_seen_stays():
    n = 4096
    (one,) = untrimmed("window(64) | strided(8)", n, 8)
    assert trimmed(one) is one
    (one,) = untrimmed("window(64)", n, 8)
    assert trimmed(one) is one
    # Some keys must be left for a kernel to look at.
    (one,) = untrimmed("ssa(64, 16)", n, 4)
    nothing = replace(one, lo=np.zeros_like(one.lo), hi=np.zeros_like(one.hi))
    assert trimmed(nothing) is nothing
