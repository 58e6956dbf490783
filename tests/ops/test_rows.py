"""Moving rows into an order and back: values, fills and gradients; what a pass leaves out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import longspan as ls
from longspan.ops import rows as rows_module
from longspan.ops.loading import load
from longspan.ops.merge import Part, merge, merge_parts
from longspan.ops.rows import Order, spread

PERMUTED = np.array([[2, 0, 3, 1]], np.int32)
PER_ROW = np.array([[2, 0, 3, 1], [3, 2, 1, 0]], np.int32)
SOME = np.array([[3, 1]], np.int32)
REPEATED = np.array([[1, 1, 0, 3, 3]], np.int32)
# Six heads: each its own table, or three neighbours one.
PER_HEAD = np.array([[[0, 2], [1, -1], [3, 0], [-1, -1], [2, 1], [3, -1]]], np.int32)
SHARED = np.array([[[0, 2], [1, -1]], [[3, 1], [2, 0]]], np.int32)


# Row 2 stands at six places, row 0 at none.
OFTEN = np.array([[2, 1, 2, -1, 2, 3, 2, 2, -1, 2]], np.int32)


@pytest.fixture(params=["at once", "head by head"], autouse=True)
def way(request, monkeypatch):
    """Both ways of moving rows on a CPU, whatever their number."""
    monkeypatch.setattr(rows_module, "_WORTH_HEADS", 0 if request.param == "head by head" else 1e9)


def order(table):
    return Order.of(table, 4, torch.device("cpu"))


@pytest.mark.parametrize("table", [PER_ROW, PER_HEAD])
def test_a_table_may_lie_by_columns(table):
    # Searching in it would warn the user.
    torch.set_warn_always(True)
    try:
        found = order(np.asfortranarray(table))
    finally:
        torch.set_warn_always(False)
    x = torch.randn(2, 6, 4, 5)
    assert torch.equal(found.take(x), order(table).take(x))


def rows_of(table, b, h, heads):
    own = table[b % len(table)]
    return (own if own.ndim == 1 else own[h * len(own) // heads]).tolist()


@pytest.mark.parametrize("table", [PERMUTED, PER_ROW, SOME, REPEATED, PER_HEAD, SHARED, OFTEN])
def test_take(table):
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    found = order(table).take(x)
    for b in range(2):
        for h in range(6):
            for place, row in enumerate(rows_of(table, b, h, 6)):
                wanted = x[b, h, row] if row >= 0 else torch.zeros(5, dtype=torch.float64)
                torch.testing.assert_close(found[b, h, place], wanted)
    assert torch.autograd.gradcheck(order(table).take, x)


def test_who_asks_for_no_derivatives_does_not_pay_for_them(monkeypatch):
    found, x = order(PERMUTED), torch.randn(2, 6, 4, 5)
    wanted = found.take(x.clone().requires_grad_()).detach()
    asked = []
    monkeypatch.setattr(rows_module._Take, "apply", lambda *_: asked.append(1))
    # Forward mode and transforms, which autograd's function refuses by name.
    for where, name, value in (
        (forward_ad, "_current_level", 0),
        (torch._C, "_are_functorch_transforms_active", lambda: True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            found.take(x)
    assert asked == [1, 1]
    assert torch.equal(found.take(x), wanted)
    with torch.no_grad():
        assert torch.equal(found.take(x.requires_grad_()), wanted)
    assert asked == [1, 1]


def test_spread():
    tables = [None, PER_HEAD, SHARED, OFTEN]
    orders = [None if table is None else order(table) for table in tables]
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    found = spread(x, orders)
    for one, own in zip(found, orders, strict=True):
        torch.testing.assert_close(one, x if own is None else own.take(x))
    assert torch.autograd.gradcheck(lambda x: tuple(spread(x, orders)), x)


@pytest.mark.parametrize("table", [PERMUTED, PER_ROW, SOME, PER_HEAD, SHARED])
def test_put_undoes_take(table):
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    own = order(table)
    back, lse = own.put(own.take(x)), own.put_lse(own.take(x)[..., 0])
    for b in range(2):
        for h in range(6):
            rows = [row for row in rows_of(table, b, h, 6) if row >= 0]
            rest = sorted(set(range(4)) - set(rows))
            torch.testing.assert_close(back[b, h, rows], x[b, h, rows])
            torch.testing.assert_close(lse[b, h, rows], x[b, h, rows, 0])
            assert (back[b, h, rest] == 0).all()
            assert (lse[b, h, rest] == -torch.inf).all()
    places = torch.randn(2, 6, table.shape[-1], 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(own.put, places)
    assert torch.autograd.gradgradcheck(own.put, places)


@pytest.mark.parametrize("table", [PERMUTED, SOME, PER_HEAD, SHARED])
def test_add(table):
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 6, table.shape[-1], 5, dtype=torch.float64, requires_grad=True)
    own = order(table)
    torch.testing.assert_close(own.add(x.clone(), y), x + own.put(y))
    assert torch.autograd.gradcheck(lambda x, y: own.add(x.clone(), y), (x, y))


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_in_their_own_orders_merge_like_parts_in_place(parts):
    tables = [None, PER_HEAD, SHARED][:parts]
    outs, lses, placed = [], [], []
    for table in tables:
        places = 4 if table is None else table.shape[-1]
        outs.append(torch.randn(2, 6, places, 5, dtype=torch.float64, requires_grad=True))
        lses.append(torch.randn(2, 6, places, dtype=torch.float64, requires_grad=True))
        placed.append(Part(outs[-1], lses[-1], None if table is None else order(table)))
    leaves = [*outs, *lses]

    def grads(found):
        return torch.autograd.grad((found[0] ** 2).sum() + found[1].sin().sum(), leaves)

    found = merge_parts(placed)
    wanted = merge([part.placed() for part in placed])
    for a, b in zip((*found, *grads(found)), (*wanted, *grads(wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_pass_runs_only_the_heads_that_take_part():
    plan = ls.plan(ls.PerHead(ls.Window(4), ls.Strided(4)), 512, 8, orders="apart")
    assert [one.heads for one in plan.passes] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    q, k = torch.randn(1, 8, 512, 4), torch.randn(1, 2, 512, 4)
    for one, heads, kv in zip(plan.passes, ((0, 1, 2, 3), (4, 5, 6, 7)), (0, 1), strict=True):
        loaded = load(one, q, k)
        own_q, own_k, _ = loaded.inputs(q, k, k)
        table = np.arange(512) if one.key_order is None else one.key_order[0]
        torch.testing.assert_close(own_k, k[:, [kv]][:, :, table])
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
    assert [one.query_order.shape for one in alone] == [(1, 1, len(tokens))]
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
