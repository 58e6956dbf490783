"""Keys in their own order where they lie, and more of them behind: the numbering, the plans of the
Hopper kernel over it, and its results on a GPU."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.test_flex import gpu, relative, tensors
from tests.ops.test_hopper import (
    here,
    nothing_leaks,
)
from tests.ops.test_hopper_backward import back_plan, cut_finely, gradients
from tests.ops.test_hopper_backward import executed as executed_back
from tests.ops.test_hopper_pairs import always, by_twos, check_pairs, each_of, half
from tests.ops.test_hopper_plan import (
    any_ranges,
    check_plan,
    executed,
    forget_plans,
    plan,
    seen,
    split_keys,
    unpacked,
)

import longspan as ls
from longspan.ops.capability import Capability
from longspan.ops.kernels.reference import reference
from longspan.ops.loading import load, ranges_of
from longspan.ops.more_keys import MoreKeys, more_keys
from longspan.ops.ranges import KeyRanges
from longspan.ops.rows import Order
from longspan.ops.run import as_computed
from longspan.ops.suited import _with_more_keys, suited

hopper = importlib.import_module("longspan.ops.kernels.hopper")

TOKENS = "0, 50, 100, 150, 200, 250, 300, 350"
# Pattern, rows, batch rows, and whether the further keys are views by remainder.
LAID_OUT = {
    "global": (f"window(100) | global({TOKENS}, causal=true)", 1000, 2, False),
    "longformer": (f"longformer(130, tokens=[{TOKENS}])", 700, 1, False),
    "summaries": ('sparse_transformer(64, kind="fixed")', 700, 2, False),
    "remainders": ("longmixed(256, 4)", 1024, 1, True),
    # Heads see half of the remainders.
    "some remainders": ("longmixed(128, 16)", 2048, 1, True),
    "remainders of an odd length": ("longmixed(128, 4)", 501, 1, False),
    "remainders of two batch rows": ("longmixed(128, 4)", 512, 2, False),
    "with copies of a sink": ("ssa(64, 4)", 700, 1, False),
}


def laid_out(name, batch=None, heads=8, key_heads=2, width=8):
    """A pass as loaded, with its further keys, and queries, keys and values."""
    text, n, own_batch, by_remainder = LAID_OUT[name]
    batch = batch or own_batch
    one = ls.plan(ls.parse(text), n, heads).passes[0]
    q, k, v = (
        x.double().requires_grad_() for x in tensors(batch, heads, key_heads, n, n, width, width)
    )
    loaded = load(one, q, k)
    found = _with_more_keys(one, loaded, k)
    assert loaded.keys is not None
    assert found.keys is None
    more = found.ranges.more
    assert more is not None
    assert more.border % 128 == 0
    assert (more.length is not None) == by_remainder
    return loaded, found.ranges, more, (q, k, v)


def as_counted(x, more: MoreKeys):
    """Keys or values as the ranges count them, [B, K, border + P, D]."""
    behind = more.of(x)
    if more.length is not None:
        behind = behind.transpose(0, 1).flatten(1, 2)[None]
    gap = x.new_zeros(*x.shape[:2], more.border - x.shape[2], x.shape[3])
    return torch.cat([x, gap, behind], 2)


@pytest.mark.parametrize("name", LAID_OUT)
def test_the_numbering_gives_what_keys_in_the_order_of_the_pass_give(name):
    loaded, ranges, more, (q, k, v) = laid_out(name)
    found = reference(q, as_counted(k, more), as_counted(v, more), ranges, 0.3)
    expected = reference(*loaded.inputs(q, k, v), loaded.ranges, 0.3)
    slopes = [torch.randn_like(x).where(x > -math.inf, 0.0) for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = (torch.autograd.grad(x, (q, k, v), slopes) for x in (found, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_passes_without_their_own_order_are_left():
    cpu = torch.device("cpu")
    (one,) = ls.plan(ls.parse("window(100)"), 512, 4).passes
    assert more_keys(one, 512, 1, cpu) is None
    (one,) = ls.plan(ls.parse("dilated(64, 4)"), 512, 4).passes
    assert more_keys(one, 512, 1, cpu) is None
    (one,) = ls.plan(ls.parse("longmixed(256, 4)"), 1024, 8).passes
    assert one.key_order is not None
    turned = replace(one, key_order=one.key_order[:, ::-1])
    assert more_keys(turned, 1024, 1, cpu) is None
    # A range that begins in one order and ends in another one.
    across = replace(one, lo=one.lo.copy(), hi=one.hi.copy())
    across.lo[0, 0, 5], across.hi[0, 0, 5] = 1020, 1030
    assert more_keys(across, 1024, 1, cpu) is None


def lies_together(more, key, inside_RS):
    """What a tile shows of keys lies in the stretch of memory where it begins."""
    shown = key + inside_RS.any(0).nonzero()
    assert (more.part(shown) == more.part(torch.tensor(key))).all()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", LAID_OUT)
def test_every_pair_is_in_one_tile_of_one_stretch(name, parts, monkeypatch):
    forget_plans(monkeypatch)
    if parts > 1:
        split_keys(monkeypatch, parts)
    _, ranges, more, (q, k, v) = laid_out(name)
    made = check_plan(ranges, *q.shape[:2], k.shape[1])
    for row, _, _, _, entries in unpacked(made):
        for at, (key, about) in enumerate(entries):
            lies_together(more, key, seen(made, row, key, about, whole=at == 0))
    with torch.no_grad():
        own = [as_counted(x, more) for x in (k, v)]
        expected = reference(q, *own, ranges, 0.3)
        for a, b in zip(executed(made, q, *own, 0.3), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_all_keys_of_the_last_remainder_are_counted():
    """Nobody would write the gradient of those that are left out of the order at its end."""
    one = ls.plan(ls.parse("longmixed(256, 4)"), 1024, 8).passes[0]
    assert one.key_order is not None
    last = one.key_order.shape[1] - 5
    short = replace(one, key_order=one.key_order[:, :last], hi=one.hi.clip(max=last))
    made = more_keys(short, 1024, 1, torch.device("cpu"))
    assert made is not None
    lo, hi, more = made
    assert more.length == 256
    assert more.count == 1024
    ranges = replace(ranges_of(one, lo, hi, None, 2048, torch.device("cpu")), more=more)
    tasks_T7 = back_plan(ranges, 1, 8, 2).tasks_T7
    behind = tasks_T7[tasks_T7[:, 2] < 0]
    rows = {(~b, row) for row, _, b in behind[:, :3].tolist()}
    assert rows == {(b, row) for b in range(4) for row in (0, 128)}


def test_orders_of_their_own_keys_alone_have_no_more():
    one = ls.plan(ls.parse("window(100)"), 512, 4).passes[0]
    own = replace(one, key_order=torch.arange(512, dtype=torch.int32)[None].numpy())
    assert more_keys(own, 512, 1, torch.device("cpu")) is None


def test_gradients_of_remainders_are_added_where_they_lie():
    *_, more, (_, k, _) = laid_out("some remainders")
    whole, slope = torch.randn_like(k), torch.randn_like(more.of(k))
    (expected,) = torch.autograd.grad(more.of(k), k, slope)
    grad = whole.clone()
    more.of(grad).add_(slope)
    torch.testing.assert_close(grad, whole + expected)


def test_plans_tell_borders_and_lengths_apart():
    ranges = laid_out("remainders")[1]
    kinds = [None, *(MoreKeys(*x) for x in ((1024, 1024, None, 256), (1024, 1024, None, 512)))]
    kinds.append(MoreKeys(1152, 896, None, None))
    plans = [
        made(replace(ranges, more=more), 1, 8, 2) for made in (plan, back_plan) for more in kinds
    ]
    assert len({id(one) for one in plans}) == 2 * len(kinds)
    assert back_plan(replace(ranges, more=kinds[1]), 1, 8, 2) is plans[len(kinds) + 1]


def test_what_is_made_serves_all_calls(monkeypatch):
    monkeypatch.setattr(Capability, "runs_on", lambda self, device: self.name == "hopper")
    monkeypatch.setattr(hopper, "reasons", lambda *_: [])
    read = ls.plan(ls.parse(LAID_OUT["global"][0]), 1000, 8)

    def made(batch, *, grads, inference=False, use_lse=True):
        q, k, v = (x.requires_grad_(grads) for x in tensors(batch, 8, 2, 1000, 1000, 8, 8))
        with torch.inference_mode(inference):
            return suited(read.passes[0], q, k, v, "auto", use_lse=use_lse)

    first = made(2, grads=False, inference=True)
    assert first.ranges.more is not None
    assert not first.ranges.lo_GNm.is_inference()
    assert not first.ranges.more.order.table.row_cBGP.is_inference()
    for batch, grads, use_lse in ((2, True, True), (3, True, False), (4, False, True)):
        assert made(batch, grads=grads, use_lse=use_lse) is first
    monkeypatch.setattr(hopper, "reasons", lambda *x: ["no"] if x[3].more else [])
    assert made(5, grads=False).ranges.more is None


@settings(max_examples=60, deadline=None)
@given(any_ranges(), st.integers(0, 3), st.sampled_from([None, 128, 256]))
def test_every_pair_of_any_ranges_is_in_one_tile_of_one_stretch(given, tiles, length):
    ranges, batch, heads, key_heads = given
    more = MoreKeys(128 * tiles, max(ranges.keys - 128 * tiles, 0), None, length)
    made = check_plan(replace(ranges, more=more), batch, heads, key_heads)
    for row, _, _, _, entries in unpacked(made):
        for at, (key, about) in enumerate(entries):
            lies_together(more, key, seen(made, row, key, about, whole=at == 0))


@each_of
@pytest.mark.parametrize("name", LAID_OUT)
def test_every_pair_is_in_one_half_of_one_stretch(name, each, monkeypatch):
    always(monkeypatch, each)
    _, ranges, more, (q, k, _) = laid_out(name)
    ranges = replace(by_twos(ranges), more=more)
    made = check_pairs(ranges, len(q), 2 * q.shape[1], k.shape[1], each=each)
    for row, _, _, first, _, count in made.tasks[:, :6].tolist():
        for key, about, other, about_other in made.entries[first : first + count].tolist():
            for own_key, own_about in ((key, about), (other, about_other)):
                inside = half(made, row, own_key, own_about, masked=about & 1)
                lies_together(more, own_key, inside)


def as_bounds_count(back, ranges, batch):
    """A plan of the backward with rows and batch rows as if all keys were in one tensor."""
    more, tasks_T7, cut_C4 = ranges.more, back.tasks_T7.clone(), back.cut_C4.clone()
    length = more.length or ranges.keys
    for row, _, b, _, _, _, bound in tasks_T7.tolist():
        if b >= 0:
            assert row == bound < more.border
        else:
            whose, own = divmod(bound - more.border, length)
            assert row == own
            assert ~b == whose if more.length else ~b < batch
    for x in (tasks_T7, cut_C4):
        behind = x[:, 2] < 0
        whose = ~x[behind, 2]
        x[behind, 0] += more.border + (whose * length if more.length else 0)
        x[behind, 2] = 0 if more.length else whose
    return replace(back, tasks_T7=tasks_T7, cut_C4=cut_C4)


@pytest.mark.parametrize("fine", [False, True], ids=["", "cut"])
@pytest.mark.parametrize("name", LAID_OUT)
def test_going_through_a_plan_gives_the_gradients_of_the_oracle(name, fine, monkeypatch):
    if fine:
        cut_finely(monkeypatch)
    _, ranges, more, (q, k, v) = laid_out(name)
    k, v = (as_counted(x.detach(), more).requires_grad_() for x in (k, v))
    out, lse = reference(q, k, v, ranges, 0.3)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    shape = len(q), q.shape[1], k.shape[1]
    back = back_plan(ranges, *shape)
    assert (back.tasks_T7[:, 2] < 0).any()
    if fine:
        assert (back.cut_C4[:, 2] < 0).any()
    with torch.no_grad():
        made, back = plan(ranges, *shape), as_bounds_count(back, ranges, len(q))
        found = executed_back(made, back, (q, k, v, out), lse, dout, dlse, 0.3)
    for x, value in zip(found, expected, strict=True):
        torch.testing.assert_close(x, value, rtol=1e-9, atol=1e-9)


# Patterns, rows and batch rows.
ON_GPU = [
    (f"window(100) | global({TOKENS}, causal=true)", 1000, 2),
    (f"window(300) | global({TOKENS})", 2048, 1),
    (f"longformer(200, tokens=[{TOKENS}])", 1100, 2),
    ('sparse_transformer(64, kind="fixed")', 1500, 2),
    ("longmixed(256, 4)", 2048, 1),
    ("longmixed(128, 16)", 2048, 1),
    ("longmixed(256, 4)", 2048, 2),
    ("longmixed(256, 4)", 2001, 1),
    ("ssa(64, 4)", 2048, 1),
    ("ssa(64, 4)", 1001, 2),
]


@gpu
@pytest.mark.parametrize("fine", [False, True], ids=["", "cut"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("text", "n", "batch"), ON_GPU)
def test_equals_the_reference(text, n, batch, dtype, width, fine, monkeypatch):
    here()
    if fine:
        cut_finely(monkeypatch)
    q, k, v = (x.to("cuda", dtype) for x in tensors(batch, 8, 2, n, n, width, width))
    dout = torch.randn_like(q)
    read = ls.plan(ls.parse(text), n, 8)
    found, expected = (
        [
            *ls.attend(*inputs, read, impl=impl, return_lse=True),
            *gradients(partial(ls.attend, pattern=read, impl=impl, return_lse=True), inputs, dout),
        ]
        for inputs, impl in (
            ((q, k, v), "hopper"),
            ((q.float(), k.float(), v.float()), "reference"),
        )
    )
    # Nothing but further keys was gathered.
    computed = as_computed(read.passes, q, k, v, "hopper", use_lse=True)
    loaded = [suited(one, q, k, v, "hopper", use_lse=True) for _, one in computed]
    assert any(one.ranges.more is not None for one in loaded)
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) < 1e-2, text


@gpu
@pytest.mark.parametrize("wanted", ["k", "v", "qv"])
@pytest.mark.parametrize(("text", "n", "batch"), ON_GPU[:5])
def test_gradients_of_some_inputs_and_of_the_log_sum_exp_alone(text, n, batch, wanted):
    here()
    inputs = [x.to("cuda", torch.bfloat16) for x in tensors(batch, 8, 2, n, n, 128, 128)]
    slope = torch.randn_like(inputs[0])
    read = ls.plan(ls.parse(text), n, 8)
    of_out, of_lse = [], []
    for impl, dtype in (("hopper", torch.bfloat16), ("reference", torch.float32)):
        own = {name: x.to(dtype) for name, x in zip("qkv", inputs, strict=True)}
        needed = [own[name].requires_grad_() for name in wanted]
        out, lse = ls.attend(*own.values(), read, impl=impl, return_lse=True)
        of_out += torch.autograd.grad(out, needed, slope.to(dtype), retain_graph=True)
        if wanted == "k":
            of_lse += torch.autograd.grad(lse, needed, slope[..., 0].float())
    for grads in (of_out, of_lse):
        half = len(grads) // 2
        for a, b in zip(grads[:half], grads[half:], strict=True):
            assert relative(a, b) < 1e-2


@gpu
@pytest.mark.parametrize("text", ["global", "remainders"])
def test_few_queries_parts_of_the_keys_and_places_for_gradients(text, monkeypatch):
    """One tile of rows for all heads of a key head, keys split, and gradients written in place."""
    here()
    _, ranges, more, inputs = laid_out(text, batch=1, width=128)
    own = ranges.lo_GNm[:, -40:], ranges.hi_GNm[:, -40:]
    given = [x.detach().to("cuda", torch.bfloat16) for x in inputs]
    q, k, v = given[0][:, :, -40:], given[1], given[2]
    order = more.order and on(more.order)
    short = KeyRanges(
        *(x.contiguous().cuda() for x in own),
        ranges.group_BH.cuda(),
        ranges.keys,
        more=replace(more, order=order),
    )
    for parts in (1, 3):
        if parts > 1:
            split_keys(monkeypatch, parts)
        ready = hopper.hopper_halves(q, k.requires_grad_(), v, replace(short), 0.1)
        with torch.no_grad():
            out, lse = ready.forward(q, k, v)
            keys = [as_counted(x.float(), short.more) for x in (k, v)]
            expected = reference(q.float(), *keys, short, 0.1)
            assert relative(out, expected[0]) < 1e-2
            assert (lse - expected[1]).abs().max() < 5e-3
            slope = torch.randn_like(out)
            room = [torch.full_like(x, math.nan) for x in (k, v)]
            grads = ready.backward(q, k, v, out, lse, slope, None, into=(None, *room))
        exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
        behind = [as_counted(x, short.more) for x in exact[1:]]
        wanted = torch.autograd.grad(
            reference(exact[0], *behind, short, 0.1)[0], exact, slope.float()
        )
        for a, b in zip((grads[0], *room), wanted, strict=True):
            assert relative(a, b) < 1e-2


def on(order):
    """An order on the GPU."""
    return Order.of(order.table.row_cBGP[0, :, 0].int().numpy(), order.rows, torch.device("cuda"))


# Global tokens of the others see later ones.
CAUSAL = [case for case in ON_GPU if ls.parse(case[0]).is_causal]


@gpu
@pytest.mark.parametrize(("text", "n", "batch"), CAUSAL)
def test_nothing_leaks_from_later_tokens(text, n, batch):
    here()
    given = [x.to("cuda", torch.bfloat16) for x in tensors(batch, 8, 2, n, n, 128, 128)]

    def change(*later):
        for x in later:
            x.normal_()

    nothing_leaks(given, text, (1, 700, n - 1), change)
