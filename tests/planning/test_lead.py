"""Sinks in front of strided keys: the same pairs, fewer tiles, and only where it pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import longspan as ls
from longspan.planning.lead import led


def pairs(plan):
    return sum(one.counts(plan.n, plan.keys) for one in plan.passes)


@pytest.mark.parametrize(
    "text",
    [
        "window(64) | strided(8) | sink(3)",
        "ssa(40, 4)",
        "ssa(64, 8)",
        "window(33) | strided(4) | sink(1)",
        "heads(window(64) | strided(8) | sink(3), window(64) | strided(8))",
    ],
)
@pytest.mark.parametrize("n", [257, 1024])
def test_the_same_pairs(text, n):
    pattern = ls.parse(text)
    together, apart = ls.plan(pattern, n, 4), ls.plan(pattern, n, 4, orders="apart")
    assert np.array_equal(pairs(together), np.broadcast_to(pairs(apart), pairs(together).shape))


def test_a_sink_costs_no_tile_of_its_own():
    with_sink = ls.plan(ls.parse("window(512) | strided(16) | sink(4)"), 16384, 16)
    without = ls.plan(ls.parse("window(512) | strided(16)"), 16384, 16)
    (one,) = with_sink.passes
    assert one.lo.shape[3] == 2
    assert with_sink.tiles(128) < 1.02 * without.tiles(128)
    # Each class of heads has its own copy, and places in between hold no key.
    order = one.key_order[0]
    assert [(order == row).sum() for row in range(4)] == [2 + 16] * 4
    assert (order < 0).any()
    assert led(one) is one


def test_gradients_of_copied_sinks():
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 1024, 8, generator=make, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    pattern = ls.parse("window(64) | strided(8) | sink(3)")
    results = []
    for plan, impl in (
        (ls.plan(pattern, 1024, 4), "tiled"),
        (ls.plan(pattern, 1024, 4, orders="apart"), "reference"),
    ):
        out = ls.attend(q, k, v, plan, impl=impl)
        results.append([out, *torch.autograd.grad(out.cos().sum(), (q, k, v))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_left_alone():
    # No range in front, a wide one, and packed documents, whose first keys differ.
    packed = np.repeat([[0, 1]], 512, 1).reshape(2, 512).T.reshape(1, -1)
    for plan in (
        ls.plan(ls.parse("window(64) | strided(8)"), 1024, 4),
        ls.plan(ls.parse("window(64) | strided(8) | sink(200)"), 1024, 4),
        ls.plan(ls.parse("window(64) | strided(8) | sink(3)"), 1024, 4, segments=np.sort(packed)),
    ):
        for one in plan.passes:
            assert led(one) is one
