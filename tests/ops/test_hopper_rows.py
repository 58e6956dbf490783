"""Query heads as rows, where there are few rows: over the oracle in the place of the kernel."""

from __future__ import annotations

import importlib

import pytest
import torch
from tests.ops import cases
from tests.ops.cases import On
from tests.ops.test_flex import regrouped, scattered, tensors, window

from longspan.ops.empty import empty_rows
from longspan.ops.kernels import _hopper_rows
from longspan.ops.kernels._hopper_rows import HeadsAsRows, heads_as_rows
from longspan.ops.kernels.reference import reference
from longspan.ops.ranges import KeyRanges

module = importlib.import_module("longspan.ops.kernels.hopper")


class Oracle:
    """Halves of the reference kernel."""

    def __init__(self, ranges):
        self.ranges = ranges

    def forward(self, q, k, v, out=None):
        assert out is None
        return reference(q, k, v, self.ranges, 0.3)

    def backward(self, q, k, v, out, lse, dout, dlse, into=(), after=None):
        assert into[0] is after is None
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            found = reference(*leaves, self.ranges, 0.3)
        for x, y in zip(found, (out, lse), strict=True):
            torch.testing.assert_close(x, y)
        grads = [None if x is None else x.contiguous() for x in (dout, dlse)]
        asked = [(x, g) for x, g in zip(found, grads, strict=True) if g is not None]
        outputs, slopes = zip(*asked, strict=True)
        return torch.autograd.grad(outputs, leaves, slopes, allow_unused=True)


RANGES = {
    "one query": (lambda: window(1, 40, keys=70, heads=6), 2, 6, 2),
    "few": (lambda: scattered(17, 50, ranges=2, groups=1, batch=1, heads=4), 1, 4, 1),
    "batch rows differ": (
        lambda: regrouped(
            scattered(9, 40, ranges=2, groups=4, batch=1, heads=1),
            [[0, 0, 1, 1], [2, 2, 3, 3]],
        ),
        2,
        4,
        2,
    ),
    "some see nothing": (lambda: cases.segments(30, 1, 4, 0), 1, 4, 2),
}


@pytest.mark.parametrize("heads_first", [True, False], ids=["heads first", "rows first"])
@pytest.mark.parametrize("name", RANGES)
def test_gives_what_heads_give(name, heads_first):
    build, batch, heads, key_heads = RANGES[name]
    ranges = build()
    given = tensors(batch, heads, key_heads, ranges.queries, ranges.keys, 8, 8)
    q, k, v = (x.double() for x in given)
    if not heads_first:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    rows, empty = heads_as_rows(ranges, heads, key_heads), empty_rows(ranges, batch)
    assert heads_as_rows(ranges, heads, key_heads) is rows
    halves = HeadsAsRows(Oracle(rows), heads // key_heads, empty)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    expected = reference(*leaves, ranges, 0.3)
    out, lse = halves.forward(q, k, v)
    for x, y in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(x, y.detach())
    assert torch.empty_like(out).stride() == torch.empty_like(q).stride()
    unseen = torch.zeros_like(lse, dtype=torch.bool)
    if empty is not None:
        unseen[empty] = True
    assert torch.equal(unseen, lse.isneginf())

    slopes = torch.randn_like(out), torch.randn_like(lse)
    for dout, dlse in ((slopes[0], slopes[1]), (slopes[0], None), (None, slopes[1])):
        asked = [(x, g) for x, g in zip(expected, (dout, dlse), strict=True) if g is not None]
        outputs, given = zip(*asked, strict=True)
        wanted = torch.autograd.grad(outputs, leaves, given, retain_graph=True, allow_unused=True)
        found = halves.backward(q, k, v, out, lse, dout, dlse)
        for x, y in zip(found, wanted, strict=True):
            assert (x is None) == (y is None)
            if y is not None:
                torch.testing.assert_close(x, y)


def test_writes_where_it_is_told():
    ranges = window(5, 9, keys=20, heads=4)
    q, k, v = tensors(1, 4, 2, 5, 20, 8, 8)
    halves = HeadsAsRows(Oracle(heads_as_rows(ranges, 4, 2)), 2)
    place = torch.empty(1, 5, 4, 8).transpose(1, 2)
    out, lse = halves.forward(q, k, v, place)
    assert out is place
    torch.testing.assert_close(out, reference(q, k, v, ranges, 0.3)[0])
    into = torch.empty(1, 5, 4, 8).transpose(1, 2)
    dq, *_ = halves.backward(q, k, v, out, lse, torch.ones_like(out), None, (into, None, None))
    assert dq is into


def test_heads_stay_where_they_differ_or_rows_are_many(monkeypatch):
    assert heads_as_rows(window(4, 9, heads=4), 4, 4) is None
    assert heads_as_rows(window(_hopper_rows.FEW_ROWS + 1, 9, heads=4), 4, 2) is None
    differ = scattered(4, 20, ranges=1, groups=2, batch=1, heads=4)
    differ = KeyRanges(differ.lo_GNm, differ.hi_GNm, torch.tensor([[0, 1, 0, 1]]), 20)
    assert heads_as_rows(differ, 4, 2) is None
    # A look at the heads is a wait for the GPU: once, and never where there is one group.
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: pytest.fail("that waits"))
    assert heads_as_rows(differ, 4, 2) is None
    assert heads_as_rows(window(4, 9, heads=4), 4, 2) is not None


def test_the_kernel_has_a_task_for_each_key_head(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(module, "missing_gluon", lambda: None)
    ranges = window(3, 1000, keys=1000, heads=8)
    q, k = On(2, 8, 3, 64, grad=True), On(2, 2, 1000, 64, grad=True)
    ready = module._ready(q, k, k, ranges, 1.0, backward=True)
    assert ready.share == 4
    tasks = ready.rows.plan.tasks
    assert len(tasks) == ready.rows.plan.parts * 2 * 2
    assert (tasks[:, 0] == 0).all()
    # One tile of queries for all heads of a key head.
    assert ready.rows.back.parts_P5[:, 3].max() == 1


def test_a_list_that_would_be_too_long_keeps_heads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(module, "missing_gluon", lambda: None)
    q, k = On(1, 32, 64, 64), On(1, 1, 1000, 64)
    made = [module._ready(q, k, k, window(64, 500, keys=1000, heads=32), 1.0, backward=False)]
    # 9 tiles at most for 64 rows, 16 times as many for those of 32 heads.
    monkeypatch.setattr(module, "MOST_TILES", 100)
    made += [module._ready(q, k, k, window(64, 500, keys=1000, heads=32), 1.0, backward=False)]
    assert [type(one) for one in made] == [HeadsAsRows, module.Ready]
