"""Moving rows into an order and back: values, fills and gradients; what a pass leaves out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import longspan as ls
from longspan.ops.rows import Order
from longspan.ops.run import load

PERMUTED = np.array([[2, 0, 3, 1]], np.int32)
PER_ROW = np.array([[2, 0, 3, 1], [3, 2, 1, 0]], np.int32)
SOME = np.array([[3, 1]], np.int32)
REPEATED = np.array([[1, 1, 0, 3, 3]], np.int32)


def order(table):
    return Order.of(table, 4, torch.device("cpu"))


@pytest.mark.parametrize("table", [PERMUTED, PER_ROW, SOME, REPEATED])
def test_take(table):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    found = order(table).take(x)
    for b in range(2):
        rows = table[b % len(table)].tolist()
        torch.testing.assert_close(found[b], x[b][:, rows])
    assert torch.autograd.gradcheck(order(table).take, x)


@pytest.mark.parametrize("table", [PERMUTED, PER_ROW, SOME])
def test_put_undoes_take_and_fills_the_rest(table):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    back = order(table).put(order(table).take(x), -7.0)
    for b in range(2):
        rows = table[b % len(table)].tolist()
        rest = sorted(set(range(4)) - set(rows))
        torch.testing.assert_close(back[b][:, rows], x[b][:, rows])
        assert (back[b][:, rest] == -7.0).all()
    places = torch.randn(2, 3, table.shape[1], 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: order(table).put(y, 0.0), places)


def test_a_pass_runs_only_the_heads_that_take_part():
    plan = ls.plan(ls.PerHead(ls.Window(4), ls.Strided(8)), 512, 8, orders="apart")
    assert [one.heads for one in plan.passes] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    q, k = torch.randn(1, 8, 512, 4), torch.randn(1, 2, 512, 4)
    for one, heads, kv in zip(plan.passes, ((0, 1, 2, 3), (4, 5, 6, 7)), (0, 1), strict=True):
        loaded = load(one, q, k)
        own_q, own_k, _ = loaded.inputs(q, k, k)
        torch.testing.assert_close(own_k.sum((0, 1, 2)), k[:, kv].sum((0, 1)))
        torch.testing.assert_close(own_q.sum((0, 2)), q[:, list(heads)].sum((0, 2)))
    # Unequal groups: all heads stay, so that every key head serves as many queries.
    uneven = ls.plan(ls.PerHead(ls.Window(4), ls.Strided(8)), 512, 2, orders="apart")
    assert (
        load(uneven.passes[0], q[:, :2], k[:, :1]).inputs(q[:, :2], k[:, :1], k[:, :1])[0].shape[1]
        == 1
    )


def test_wide_rows_get_a_pass_of_their_own():
    tokens = tuple(range(100, 8192, 700))
    plan = ls.plan(ls.longformer(128, tokens), 8192, 2)
    alone = [one for one in plan.passes if one.query_order is not None]
    assert [one.query_order.shape for one in alone] == [(1, len(tokens))]
    assert (
        plan.pairs
        == sum(
            8192
            if i in tokens
            else min(i, 64) + 1 + min(8191 - i, 64) + sum(abs(i - t) > 64 for t in tokens)
            for i in range(8192)
        )
        * 2
    )
    assert f"{len(tokens)} of the queries" in str(plan)
