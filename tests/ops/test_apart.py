"""Heads with orders of their own, as kernel calls over views: the same attention."""

from __future__ import annotations

import importlib
from itertools import zip_longest

import pytest
import torch
from tests.ops.test_flex import gpu

import longspan as ls
from longspan.ops.apart import Own, apart, join, split
from longspan.ops.empty import harmless
from longspan.ops.kernels.reference import reference
from longspan.ops.lanes import Lanes
from longspan.ops.placed import attend_placed
from longspan.ops.ranges import KeyRanges

apart_module = importlib.import_module("longspan.ops.apart")

PATTERNS = {
    "dilated(64, [1, 2, 4, 8])": (8, 4),
    "heads(window(64), dilated(64, 4))": (8, 2),
    "heads(neighborhood(65), neighborhood(65, dilation=4), diagonals(4), window(9))": (4, 4),
}


def inputs_of(heads, key_heads, n=512, **how):
    make = torch.Generator(how.get("device", "cpu")).manual_seed(0)
    return [
        torch.randn(1, h, n, 64, generator=make, requires_grad=True, **how)
        for h in (heads, key_heads, key_heads)
    ]


def in_calls(calls, q, k, v):
    own = split(calls, q, k, v)
    for given in own:
        for x, y in zip(given, (q, k, v), strict=True):
            assert x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    found = [reference(*x, one.ranges, 0.3) for x, one in zip(own, calls, strict=True)]
    outs, lses = zip(*found, strict=True)
    return join(calls, outs, lses, q.shape[1])


@pytest.mark.parametrize(("text", "heads"), PATTERNS.items(), ids=PATTERNS)
def test_calls_equal_the_reference(text, heads):
    q, k, v = inputs_of(*heads, dtype=torch.float64)
    plan = ls.plan(ls.parse(text), 512, heads[0])
    calls = apart(plan.passes, q, k)
    assert calls is not None
    assert {one.step for one in calls} > {1}
    said = [str(one) for one in calls]
    if text.startswith("dilated"):
        assert said[0] == "heads 0 to 1"
        assert said[3] == "heads 6 to 7, rows by remainder mod 8"
    found = in_calls(calls, q, k, v)
    wanted = ls.attend(q, k, v, plan, impl="reference", scale=0.3, return_lse=True)
    make = torch.Generator().manual_seed(1)
    slopes = [torch.randn(x.shape, generator=make, dtype=torch.float64) for x in wanted]
    grads = [torch.autograd.grad(x, (q, k, v), slopes) for x in (found, wanted)]
    for a, b in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_keys_that_several_calls_read():
    # One key head for heads of all orders: its gradients are added up.
    q, k, v = inputs_of(4, 1, dtype=torch.float64)
    plan = ls.plan(ls.parse("dilated(64, [1, 2, 4, 8])"), 512, 4)
    calls = apart(plan.passes, q, k)
    assert calls is not None
    found, _ = in_calls(calls, q, k, v)
    wanted = ls.attend(q, k, v, plan, impl="reference", scale=0.3)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "window(64)",
        "scca.flow(64)",
        "dilated(64, 4)",
        # A head that needs two orders.
        "ssa(32, 4)",
        "longnet([64, 256], [1, 4])",
        "heads(window(64) | strided(4), window(64))",
        # Strided keys are seen by queries of all remainders.
        "heads(strided(4), window(64))",
    ],
)
def test_other_patterns_stay_together(text):
    q, k, _ = inputs_of(4, 2)
    assert apart(ls.plan(ls.parse(text), 512, 4).passes, q, k) is None


@pytest.mark.parametrize("text", ["window(64)", "scca.flow(64)", "dilated(64, 4)"])
def test_nothing_is_made_for_one_order(text, monkeypatch):
    # Packed documents ask in every step, with tables of a row for each query.
    monkeypatch.setattr(apart_module, "_alone", lambda *_: pytest.fail("tables were made"))
    q, k, _ = inputs_of(4, 4)
    assert apart(ls.plan(ls.parse(text), 512, 4).passes, q, k) is None


def test_a_head_alone_is_no_range_of_heads():
    q, k, _ = inputs_of(2, 2)
    calls = apart(ls.plan(ls.parse("dilated(64, [1, 4])"), 512, 2).passes, q, k)
    assert calls is not None
    assert [str(one) for one in calls] == ["head 0", "head 1, rows by remainder mod 4"]


def test_not_where_rows_or_heads_do_not_divide():
    pattern = ls.parse("heads(window(64), dilated(64, 4))")
    q, k, _ = inputs_of(4, 2, n=510)
    assert apart(ls.plan(pattern, 510, 4).passes, q, k) is None
    q, k, _ = inputs_of(4, 2)
    two = [x.expand(2, -1, -1, -1) for x in (q, k)]
    assert apart(ls.plan(pattern, 512, 4).passes, *two) is None
    # Documents begin at rows of any remainder.
    documents = (torch.arange(512) // 100).numpy()
    assert apart(ls.plan(pattern, 512, 4, segments=documents).passes, q, k) is None


class Halves:
    """By the reference, into given tensors."""

    def __init__(self, ranges):
        self.ranges = ranges

    def forward(self, q, k, v, out=None):
        found, lse = reference(q, k, v, self.ranges, 0.3)
        assert out is not None
        assert out.shape == found.shape
        return out.copy_(found), lse

    def backward(self, q, k, v, out, lse, dout, dlse, into=()):
        for place in into:
            # Rows that a kernel can write.
            assert place is None or place.stride(-1) == 1
            assert place is None or all(x % 2 == 0 for x in place.stride()[:-1])
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            found = reference(*inputs, self.ranges, 0.3)
        for x, own in zip(found, (out, lse), strict=True):
            torch.testing.assert_close(x, own.double(), rtol=1e-6, atol=1e-6)
        given = [
            (x, own.double())
            for x, own in zip(found, (dout, dlse), strict=True)
            if own is not None
        ]
        ends, slopes = zip(*given, strict=True)
        grads = torch.autograd.grad(ends, inputs, slopes, allow_unused=True)
        return tuple(
            x if place is None or x is None else place.copy_(x)
            for x, place in zip_longest(grads, into)
        )


@pytest.mark.parametrize("ends", ["both", "out", "lse"])
@pytest.mark.parametrize(
    ("text", "heads"),
    [
        *PATTERNS.items(),
        # One key head for all, and values of another width.
        ("dilated(64, [1, 2, 4, 8])", (4, 1)),
    ],
)
def test_results_are_written_where_they_belong(text, heads, ends):
    q, k, v = inputs_of(*heads, dtype=torch.float64)
    v = v[..., :24].detach().requires_grad_()
    plan = ls.plan(ls.parse(text), 512, heads[0])
    calls = apart(plan.passes, q, k)
    lanes = Lanes(calls, (q, k, v), "auto")
    found = attend_placed(calls, [Halves(one.ranges) for one in calls], (q, k, v), lanes)
    wanted = ls.attend(q, k, v, plan, impl="reference", scale=0.3, return_lse=True)
    slopes = [torch.randn_like(x) for x in wanted]
    which = {"both": slice(2), "out": slice(1), "lse": slice(1, 2)}[ends]
    grads = [
        torch.autograd.grad(
            x[which],
            (q, k, v),
            [slope.to(own.dtype) for slope, own in zip(slopes[which], x[which], strict=True)],
            allow_unused=True,
        )
        for x in (found, wanted)
    ]
    # float32 as on a GPU.
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-6, atol=1e-6)
    for a, b in zip((found[0], *grads[0]), (wanted[0], *grads[1]), strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def odd(x):
    """The same numbers, with rows that are dense and an odd step between batch rows."""
    return x.clone().as_strided(x.shape, (x.numel() + 1, *x.stride()[1:]))


@pytest.mark.parametrize("lies", [lambda x: x.mT.contiguous().mT, odd], ids=["columns", "odd"])
@pytest.mark.parametrize("times", [1, 2])
def test_gradients_of_inputs_of_any_layout(lies, times):
    inputs = inputs_of(8, 4, dtype=torch.float64)
    q, k, v = (lies(x.detach()).requires_grad_() for x in inputs)
    plan = ls.plan(ls.parse("dilated(64, [1, 2, 4, 8])"), 512, 8)
    calls = apart(plan.passes, q, k)
    lanes = Lanes(calls, (q, k, v), "auto")
    out, _ = attend_placed(calls, [Halves(one.ranges) for one in calls], (q, k, v), lanes)
    wanted = ls.attend(*inputs, plan, impl="reference", scale=0.3)
    slope = torch.randn_like(wanted)
    for _ in range(times):
        found = torch.autograd.grad(out, (q, k, v), slope, retain_graph=True)
    exact = torch.autograd.grad(wanted, inputs, slope)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("ask", ["grad", "backward"])
def test_gradients_of_some_inputs(which, ask):
    inputs = [x.detach().requires_grad_(i in which) for i, x in enumerate(inputs_of(8, 4))]
    inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    plan = ls.plan(ls.parse("dilated(64, [1, 2, 4, 8])"), 512, 8)
    calls = apart(plan.passes, *inputs[:2])
    lanes = Lanes(calls, inputs, "auto")
    halves = [Halves(one.ranges) for one in calls]
    results = []
    for out in (
        attend_placed(calls, halves, tuple(inputs), lanes)[0],
        ls.attend(*inputs, plan, impl="reference", scale=0.3),
    ):
        asked = [inputs[i] for i in which]
        if ask == "grad":
            results.append(torch.autograd.grad(out.sin().sum(), asked))
            continue
        for x in inputs:
            x.grad = None
        out.sin().sum().backward()
        assert [i for i, x in enumerate(inputs) if x.grad is not None] == list(which)
        results.append([x.grad for x in asked])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_without_keys_in_every_remainder():
    # Two heads of a group for all four remainders, whose last rows see nothing.
    lo = torch.zeros(2, 5, 1, dtype=torch.int32)
    hi = lo.clone()
    hi[0, :4], hi[1, :3] = 2, 5
    one = Own(slice(0, 2), slice(0, 2), 4, KeyRanges(lo, hi, torch.tensor([[0, 1]]), 5))
    given = torch.full((4, 2, 5), -torch.inf), torch.ones(4, 2, 5, 3)
    lse, dout, _ = harmless(one.empty, *given, None)
    unseen = (lo >= hi)[None, ..., 0].expand(4, -1, -1)
    assert torch.equal(lse == 0, unseen)
    assert torch.equal((dout == 0).all(-1), unseen)


@gpu
@pytest.mark.parametrize("impl", ["flex", "hopper", "auto"])
@pytest.mark.parametrize(("text", "heads"), PATTERNS.items(), ids=PATTERNS)
def test_on_a_gpu(text, heads, impl):
    how = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = inputs_of(*heads, n=4096, **how)
    plan = ls.plan(ls.parse(text), 4096, heads[0])
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    wanted = ls.attend(*exact, plan, impl="reference", return_lse=True)
    assert "rows by remainder mod 4: kernel" in ls.explain(q, k, v, plan, impl=impl)
    slope = torch.randn_like(q)
    # Alone at first, then on streams side by side.
    for _ in range(3):
        found = ls.attend(q, k, v, plan, impl=impl, return_lse=True)
        results = [
            (*x, *torch.autograd.grad([*x], inputs, [slope.to(x[0].dtype), x[1].detach()]))
            for x, inputs in ((found, (q, k, v)), (wanted, exact))
        ]
        wanted = ls.attend(*exact, plan, impl="reference", return_lse=True)
        for a, b in zip(*results, strict=True):
            assert ((a.float() - b).norm() / b.norm()) < 1e-2
