"""Passes of a few queries among all others: the same pairs, where tiles are few, on kernels that
take them."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops import test_hopper, test_hopper_backward, test_hopper_plan
from tests.ops.cases import On
from tests.ops.test_flex import gpu, relative

import longspan as ls
from longspan.errors import Refusal
from longspan.ops import capability, few_rows, run
from longspan.ops.kernels import _hopper_plan
from longspan.ops.ranges import KeyRanges
from longspan.planning import Pass

HEADS, KEY_HEADS, N = 4, 2, 700
GLOBAL = "window(64) | global(0, 300, 650)"
PADDED = np.stack([np.repeat([-1, 0, 1], [40, 400, 260]), np.repeat([0, 1, -1], [300, 397, 3])])
PATTERNS = {
    "listed keys": (GLOBAL, 1, {}),
    "packed documents and padding": (GLOBAL, 2, {"segments": PADDED}),
    "causal": ("window(16) | global(0, 400, 500, 600, 650, 690, causal=true)", 1, {}),
    "longformer": ("longformer(64, tokens=[0, 100, 650])", 1, {}),
    "many": (f"window(32) | global({', '.join(map(str, range(3, N, 40)))})", 1, {}),
    "some heads": ("heads(window(64), window(32) | global(0, 200, 300, 400, 600))", 1, {}),
    "heads that differ": (
        f"heads({GLOBAL}, window(32) | global(0, 100, 200, 300, 350))",
        2,
        {"segments": PADDED},
    ),
    "orders apart": (GLOBAL, 1, {"orders": "apart"}),
}


def planned(name):
    text, batch, how = PATTERNS[name]
    return ls.plan(ls.parse(text), N, HEADS, **how), batch


def always(monkeypatch):
    monkeypatch.setattr(few_rows, "_WORTH", math.inf)


def ranges_of(one: Pass, keys: int) -> KeyRanges:
    """What a kernel reads; the queries in the order of the pass."""
    batch, classes, n, width = one.lo.shape
    lo, hi = (torch.from_numpy(x.reshape(-1, n, width)) for x in (one.lo, one.hi))
    group = torch.arange(batch)[:, None] * classes + torch.tensor(one.head_class)
    return KeyRanges(lo, hi, group, keys if one.key_order is None else one.key_order.shape[1])


def check(one: Pass):
    """Ranges are disjoint and sorted, unused ones last."""
    used = one.lo < one.hi
    assert (used[..., :-1] | ~used[..., 1:]).all()
    assert ((one.hi[..., :-1] <= one.lo[..., 1:]) | ~used[..., 1:]).all()
    assert one.lo.dtype == one.hi.dtype == np.int32


def counts(passes, n, keys):
    return sum(one.counts(n, keys) for one in passes)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_same_pairs_of_patterns(name, monkeypatch):
    always(monkeypatch)
    plan, batch = planned(name)
    before = [(one.lo.copy(), one.hi.copy()) for one in plan.passes]
    which, one = few_rows.few_rows(plan.passes)
    assert len(which) > 1
    assert one.query_order is None
    check(one)
    rest = [x for i, x in enumerate(plan.passes) if i not in which]
    assert bool(rest) == (name == "orders apart")
    assert np.array_equal(counts([one, *rest], N, N), plan.counts())
    for x, (lo, hi) in zip(plan.passes, before, strict=True):
        assert np.array_equal(x.lo, lo)
        assert np.array_equal(x.hi, hi)
    given = ranges_of(one, N), batch, HEADS, KEY_HEADS
    test_hopper_plan.check_plan(*given)
    test_hopper_backward.check_back_plan(*given)


@st.composite
def any_passes(draw):
    """A pass over all queries, and one or two over some of them and further keys."""
    n, keys = (draw(st.sampled_from([1, 5, 127, 128, 129, 257, 300])) for _ in range(2))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    batch = draw(st.integers(1, 2))
    listed = draw(st.booleans())
    first = rng.integers(0, keys, (draw(st.sampled_from([1, batch])), 7))
    own = np.broadcast_to(np.arange(keys), (len(first), keys))
    key_order = np.concatenate([first, own], axis=1).astype(np.int32) if listed else None
    several = draw(st.integers(1, 2))
    # Every query and head has sorted cuts; each pass gets some of the ranges between them.
    width = draw(st.integers(1, 4))
    cuts = np.sort(rng.integers(0, keys + 1, (batch, HEADS, n, 2 * width)), axis=-1)
    lo, hi = cuts[..., ::2], cuts[..., 1::2]
    whose = rng.integers(0, several + 2, lo.shape)
    found = []
    for index in range(several + 1):
        some = whose == index
        one_lo, one_hi = (np.where(some, x, 0).astype(np.int32) for x in (lo, hi))
        classes, turn = draw(st.sampled_from([(HEADS, 0), (2, 1), (1, 1)])), int(index > 0)
        # Heads of a class are alike: all but the first of each are told to be.
        head_class = tuple(h % classes[0] for h in range(HEADS))
        one_lo, one_hi = (x[:, : classes[0]] for x in (one_lo, one_hi))
        order = None
        if turn:
            taken = draw(st.integers(0, min(n, 9)))
            shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, classes[0]])))
            order = np.full((*shape, taken + 2), -1, np.int32)
            for b, c in np.ndindex(shape):
                order[b, c, rng.permutation(taken + 2)[:taken]] = rng.permutation(n)[:taken]
            at = np.broadcast_to(order, (batch, classes[0], order.shape[2]))[..., None]
            one_lo, one_hi = (
                np.where(at < 0, 0, np.take_along_axis(x, at.clip(min=0), axis=2))
                for x in (one_lo, one_hi)
            )
        elif listed:
            one_lo, one_hi = (np.where(some[:, : classes[0]], x + 7, 0) for x in (one_lo, one_hi))
        one_lo, one_hi = (x.astype(np.int32) for x in (one_lo, one_hi))
        used = np.argsort(one_lo >= one_hi, axis=-1, kind="stable")
        one_lo, one_hi = (np.take_along_axis(x, used, axis=-1) for x in (one_lo, one_hi))
        found.append(Pass(one_lo, one_hi, head_class, None if turn else key_order, order))
    return found, batch, n, keys


def overlaps(passes, n, keys):
    """Whether passes share places of keys: pairs besides listed copies count twice."""
    whole, *few = passes
    if whole.key_order is not None:
        # Places of the keys in their own order alone.
        cut = [np.where(x >= 7, x - 7, 0) for x in (whole.lo, whole.hi)]
        whole = replace(whole, lo=cut[0], hi=cut[1], key_order=None)
    return (counts([whole, *few], n, keys) > 1).any()


@settings(max_examples=150, deadline=None)
@given(any_passes())
def test_the_same_pairs_of_any_passes(made):
    passes, batch, n, keys = made
    worth = few_rows._WORTH
    few_rows._WORTH = math.inf
    try:
        found = few_rows.few_rows(passes)
    finally:
        few_rows._WORTH = worth
    empty = all((one.query_order < 0).all() for one in passes[1:])
    if found is None:
        assert overlaps(passes, n, keys) or empty or passes[0].key_order is not None
        return
    which, one = found
    check(one)
    rest = [x for i, x in enumerate(passes) if i not in which]
    assert np.array_equal(
        np.broadcast_to(counts([one, *rest], n, keys), (batch, HEADS, n, keys)),
        np.broadcast_to(counts(passes, n, keys), (batch, HEADS, n, keys)),
    )
    places = keys if one.key_order is None else one.key_order.shape[1]
    assert ((one.hi <= places) & (one.lo >= 0)).all()
    # No column that no query needs.
    most = int((one.lo < one.hi).sum(-1).max())
    assert one.lo.shape[3] == max(passes[0].lo.shape[3], most)


def test_pairs_that_count_twice_stay_apart(monkeypatch):
    always(monkeypatch)
    lo = np.zeros((1, 1, 200, 1), np.int32)
    whole = Pass(lo, lo + 50, (0, 0))
    order = np.array([[[7, 150]]], np.int32)
    for begin, found in ((50, True), (49, False)):
        few = Pass(lo[:, :, :2] + begin, lo[:, :, :2] + 200, (0, 0), None, order)
        assert (few_rows.few_rows([whole, few]) is not None) == found
        # Behind others it is found all the same.
        assert (few_rows.few_rows([few, whole]) is not None) == found
    far = replace(whole, key_order=np.arange(199, -1, -1, dtype=np.int32)[None])
    assert few_rows.few_rows([far, few]) is None
    assert few_rows.few_rows([whole]) is None
    assert few_rows.few_rows([few]) is None


def tiles(one: Pass, keys: int, batch: int = 1) -> int:
    """As the kernel goes through them."""
    ranges = ranges_of(one, keys)
    per_head = _hopper_plan.task_tiles(ranges).sum(1)
    return int(per_head[ranges.group_BH.expand(batch, HEADS)].sum())


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("window(1024) | global(0, 5000, 10000)", True),
        ("longformer(2048, tokens=[0, 100, 10000])", True),
        ("longformer(512, tokens=[0, 100, 120, 5000, 5030])", True),
        ("window(64) | global(0, 5000, 10000, 10100)", True),
        (f"window(256) | global({', '.join(map(str, range(0, 16000, 1000)))})", False),
        (f"window(1024) | global({', '.join(map(str, range(0, 16000, 250)))})", False),
    ],
)
def test_joined_where_tiles_are_few(text, joined, monkeypatch):
    n = 16384
    plan = ls.plan(text, n, HEADS)
    assert len(plan.passes) == 2
    worth, found = few_rows._WORTH, few_rows.few_rows(plan.passes)
    assert (found is not None) == joined
    always(monkeypatch)
    _, one = few_rows.few_rows(plan.passes)
    more = tiles(one, n) - sum(tiles(part, n) for part in plan.passes)
    assert (more <= worth) == joined
    # No column more: the global row of the window is free.
    assert one.lo.shape == plan.passes[0].lo.shape


@settings(max_examples=100, deadline=None)
@given(any_passes())
def test_what_joining_costs_is_counted(made):
    passes, batch, _, keys = made
    worth = few_rows._WORTH
    try:
        few_rows._WORTH = math.inf
        if (found := few_rows.few_rows(passes[:2])) is None:
            return
        apart = sum(tiles(one, keys, batch) for one in passes[:2])
        more = tiles(found[1], keys, batch) - apart
        for off in (-0.5, 0.5):
            few_rows._WORTH = more + off
            assert (few_rows.few_rows(passes[:2]) is not None) == (off > 0)
    finally:
        few_rows._WORTH = worth


# The way through ``attend``, with a kernel for the CPU.


@pytest.fixture
def on_cpu(monkeypatch):
    """``tiled`` takes long rows, and every plan is worth it."""
    always(monkeypatch)
    kernels = [replace(x, takes_long_rows=x.name == "tiled") for x in capability.KERNELS]
    monkeypatch.setattr(capability, "KERNELS", tuple(kernels))


def inputs_of(batch, n=N, width=8, **how):
    make = torch.Generator(how.get("device", "cpu")).manual_seed(0)
    return [
        torch.randn(batch, heads, n, width, generator=make, **how).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def results(inputs, plan, impl, *, use_lse):
    q, k, v = inputs
    out, lse = ls.attend(q, k, v, plan, impl=impl, return_lse=True)
    if not use_lse:
        out = ls.attend(q, k, v, plan, impl=impl)
    make = torch.Generator(q.device).manual_seed(1)
    slopes = [
        torch.randn(x.shape, generator=make, device=x.device).to(x.dtype) for x in (out, lse)
    ]
    slopes[1] = slopes[1].masked_fill(lse == -math.inf, 0)
    each = 2 if use_lse else 1
    return (
        out.detach(),
        lse.detach(),
        *torch.autograd.grad([out, lse][:each], inputs, slopes[:each]),
    )


@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_attend_gives_the_same(name, use_lse, on_cpu):
    plan, batch = planned(name)
    inputs = inputs_of(batch, dtype=torch.float64)
    q, k, v = inputs
    several = name == "orders apart"
    for impl, joined in (("tiled", True), ("reference", False)):
        said = ls.explain(q, k, v, plan, impl=impl)
        assert ("0 and 1 as one: kernel tiled" in said) == (joined and not several)
        assert (" as one: kernel" in said) == joined
        assert said.count(": kernel ") == len(plan.passes) - joined
    found, wanted = (
        results(inputs, plan, impl, use_lse=use_lse) for impl in ("tiled", "reference")
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ls.attend(q, k, v, plan, impl="tiled"), wanted[0])


def test_one_call_in_place_of_two(on_cpu, monkeypatch):
    plan, _ = planned("listed keys")
    q, k, v = inputs_of(1)
    seen = []
    loaded = capability.Capability.load
    monkeypatch.setattr(
        capability.Capability, "load", lambda self: seen.append(self.name) or loaded(self)
    )
    ls.attend(q, k, v, plan, impl="tiled")
    assert seen == ["tiled"]
    ls.attend(q, k, v, plan, impl="reference")
    assert seen[1:] == ["reference"] * 2


def test_decided_once_and_gone_with_the_plan(on_cpu, monkeypatch):
    plan, _ = planned("listed keys")
    q, k, v = inputs_of(1)

    how = {"use_lse": True}
    ((which, one),) = run.as_computed(plan.passes, q, k, v, "tiled", **how)
    assert which == (0, 1)
    monkeypatch.setattr(run, "few_rows", lambda _: pytest.fail("once more"))
    assert run.as_computed(plan.passes, q, k, v, "tiled", **how) == [(which, one)]
    assert run.as_computed(plan.passes, q, k, v, "reference", **how) == [
        ((i,), x) for i, x in enumerate(plan.passes)
    ]
    gone = [weakref.ref(x) for x in (one, *plan.passes)]
    del one, plan
    gc.collect()
    assert not any(x() for x in gone)


def test_a_refusal_is_that_of_the_passes(on_cpu, monkeypatch):
    plan, _ = planned("listed keys")
    q, k, v = inputs_of(1)
    monkeypatch.setattr(
        capability.Capability,
        "reasons",
        lambda self, *_, **how: ["no"] if self.name == "tiled" else [],
    )
    monkeypatch.setattr(run, "few_rows", lambda _: pytest.fail("counted for nothing"))
    assert len(run.as_computed(plan.passes, q, k, v, "tiled", use_lse=True)) == 2
    with pytest.raises(Refusal, match="cannot take these inputs: no"):
        ls.attend(q, k, v, plan, impl="tiled")


def test_nothing_is_asked_where_no_kernel_takes_long_rows(monkeypatch):
    monkeypatch.setattr(run, "few_rows", lambda _: pytest.fail("asked"))
    plan, _ = planned("listed keys")
    q, k, v = inputs_of(1)
    for impl in ("auto", "tiled", "reference"):
        ls.attend(q, k, v, plan, impl=impl)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "text", ["window(1024) | global(0, 5000, 20000)", "longformer(2048, tokens=[0, 100, 20000])"]
)
def test_auto_takes_hopper_for_the_joined_pass(text, gradients, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(test_hopper.module, "missing_gluon", lambda: None)
    n = 32768
    _, one = few_rows.few_rows(ls.plan(text, n, HEADS).passes)
    q, k = On(1, HEADS, n, 128, grad=gradients), On(1, KEY_HEADS, n, 128)
    found = capability.choose("auto", q, k, k, ranges_of(one, n))
    assert found.name == "hopper"
    assert found.takes_long_rows
    assert capability.with_long_rows("auto", q.device) == [found]


@gpu
@pytest.mark.parametrize("impl", ["hopper", "auto"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "window(256) | global(0, 1000, 3000)",
        "longformer(256, tokens=[0, 100, 2000])",
        "window(64) | global(0, 1700, 2500, 3100, 3500, 3900, causal=true)",
        "heads(window(256) | global(0, 1000, 3000), window(128) | global(5, 700, 2500))",
    ],
)
def test_on_a_gpu(text, packed, impl, monkeypatch):
    test_hopper.here()
    always(monkeypatch)
    n, batch, segments = 4096, 1, None
    if packed:
        batch = 2
        rows = [np.repeat([-1, 0, 1], [130, 2000, 1966]), np.repeat([0, 1, -1], [3000, 1093, 3])]
        segments = np.stack(rows)
    inputs = inputs_of(batch, n, width=64, device="cuda", dtype=torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    for use_lse in (True, False):
        plan = ls.plan(ls.parse(text), n, HEADS, segments=segments)
        said = ls.explain(*inputs, plan, impl=impl)
        if len(plan.passes) > 1 and impl == "hopper":
            assert "0 and 1 as one: kernel hopper" in said
        found = results(inputs, plan, impl, use_lse=use_lse)
        wanted = results(exact, plan, "reference", use_lse=use_lse)
        seen = wanted[1] > -math.inf
        assert torch.equal(found[1] > -math.inf, seen)
        assert (found[1][seen] - wanted[1][seen]).abs().max() < 1e-3
        for a, b in zip((found[0], *found[2:]), (wanted[0], *wanted[2:]), strict=True):
            assert a.isfinite().all()
            assert relative(a, b) < 1e-2
