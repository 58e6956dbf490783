"""The backward of the Hopper kernel: its plans, a stand-in that goes through them on the CPU, and
gradients on a GPU."""

from __future__ import annotations

import importlib
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops import cases
from tests.ops.cases import On
from tests.ops.test_flex import gpu, relative, scattered, tensors, to, window
from tests.ops.test_hopper import (
    GPU_CASES,
    LAID_OUT,
    here,
    on_gpu,
)
from tests.ops.test_hopper_plan import (
    PLANNED,
    any_ranges,
    for_each_row,
    in_rows,
    plan,
    split_keys,
)

import longspan as ls
from longspan.errors import Refusal
from longspan.ops.kernels import _hopper_back_plan, _hopper_calls, _hopper_ends, _hopper_plan
from longspan.ops.kernels.reference import reference
from longspan.ops.ranges import KeyRanges
from longspan.ops.views import by_remainder, row_after_row

module = importlib.import_module("longspan.ops.kernels.hopper")


def cut_finely(monkeypatch, least=2, short=64):
    """Tasks of more than two tiles are cut."""
    monkeypatch.setattr(_hopper_back_plan, "_LEAST", least)
    monkeypatch.setattr(_hopper_back_plan, "_MOST", least)
    monkeypatch.setattr(_hopper_back_plan, "_STRETCH", short)
    monkeypatch.setattr(_hopper_back_plan, "_SHORT", short)
    monkeypatch.setattr(_hopper_back_plan.PLANS, "latest", [])


def back_plan(ranges, batch, heads, key_heads, *, shared=False):
    own = 1 if shared else batch
    return _hopper_back_plan.back_plan_of(ranges, (batch, heads), (own, key_heads))


def seen(made, row, key, about, masked):
    """bool [64, 128]: what the kernel takes of a tile."""
    key_S = torch.arange(key, key + 128)
    lo, hi = (x[about >> 4, row : row + 64, None] for x in (made.lo_PN, made.hi_PN))
    found = (key_S >= lo) & (key_S < hi)
    kinds = about & 3, (about >> 2) & 3
    assert any(kinds)
    assert masked == (kinds != (2, 2))
    for half, kind in zip(found.split(64, dim=1), kinds, strict=True):
        if kind != 1:
            half[:] = kind == 2
    return found


def tasks_of(back):
    """Each task, and its parts."""
    parts, end = back.parts_P5.tolist(), 0
    for *task, first, count, bound in back.tasks_T7.tolist():
        assert first == end
        end = first + count
        yield [*task, bound], parts[first:end]
    assert end == len(parts)


def executed(made, back, tensors, lse, dout, dlse, scale, length=None):
    """Gradients, one task after another."""
    q, k, v, out = tensors
    share = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.full_like(k, math.nan), torch.full_like(v, math.nan)
    delta = (dout * out).sum(-1) - dlse
    dk_sums, dv_sums = (
        [torch.zeros_like(x[b, h, key : key + 128]) for key, h, b, _ in back.cut_C4.tolist()]
        for x in (k, v)
    )
    for (key, key_head, b, cut, bound), parts in tasks_of(back):
        own = b, key_head, slice(key, key + 128)
        dk_own, dv_own = torch.zeros_like(k[own]), torch.zeros_like(v[own])
        for first, masked, count, head, q_batch in parts:
            assert head // share == key_head
            if length:
                assert divmod(bound, length) == (b, key)
            else:
                assert bound == key
                assert b == (0 if len(k) == 1 else q_batch)
            for at, (row, about) in enumerate(back.entries_E2[first : first + count].tolist()):
                rows = q_batch, head, slice(row, row + 64)
                p = (scale * q[rows] @ k[own].mT - lse[rows][:, None]).exp()
                p = p.where(seen(made, row, bound, about, at < masked)[:, : p.shape[1]], 0.0)
                ds = p * (dout[rows] @ v[own].mT - delta[rows][:, None])
                dv_own += p.mT @ dout[rows]
                dk_own += scale * ds.mT @ q[rows]
                dq[rows] += scale * ds @ k[own]
        if cut < 0:
            assert dk[own].isnan().all()
            dk[own], dv[own] = dk_own, dv_own
        else:
            dk_sums[cut] += dk_own
            dv_sums[cut] += dv_own
    for (key, key_head, b, _), dk_own, dv_own in zip(
        back.cut_C4.tolist(), dk_sums, dv_sums, strict=True
    ):
        own = b, key_head, slice(key, key + 128)
        assert dk[own].isnan().all()
        dk[own], dv[own] = dk_own, dv_own
    return dq, dk, dv


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("fine", [False, True], ids=["", "cut"])
@pytest.mark.parametrize("name", PLANNED)
def test_going_through_a_plan_gives_the_gradients_of_the_oracle(name, fine, shared, monkeypatch):
    if fine:
        cut_finely(monkeypatch)
    build, batch, heads, key_heads = PLANNED[name]
    ranges = build()
    if shared:
        batch, ranges = in_rows(ranges, batch)
    q, k, v = (
        x.double().requires_grad_()
        for x in tensors(batch, heads, key_heads, ranges.queries, ranges.keys, 8, 8)
    )
    if shared:
        k, v = (x[:1].detach().requires_grad_() for x in (k, v))
    out, lse = for_each_row(q, k, v, ranges, 0.3)
    empty = lse == -math.inf
    lse = lse.masked_fill(empty, 0.0)
    dout = torch.randn_like(out).masked_fill(empty[..., None], 0.0)
    dlse = torch.randn_like(lse).masked_fill(empty, 0.0)
    expected = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    back = back_plan(ranges, batch, heads, key_heads, shared=shared)
    assert (back.empty is not None) == bool(empty.any())
    with torch.no_grad():
        made = plan(ranges, batch, heads, key_heads, shared=shared)
        found = executed(made, back, (q, k, v, out), lse, dout, dlse, 0.3)
    for x, value in zip(found, expected, strict=True):
        torch.testing.assert_close(x, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("short", [0, 64, 128])
@settings(max_examples=40, deadline=None)
@given(any_ranges(), st.booleans())
def test_every_pair_of_any_ranges_is_in_one_entry(short, given, shared):
    with pytest.MonkeyPatch.context() as patch:
        if short:
            cut_finely(patch, short=short)
        check_back_plan(*given, shared=shared)


def check_back_plan(ranges, batch, heads, key_heads, *, shared=False):
    n, keys = ranges.queries, ranges.keys
    given = ranges, batch, heads, key_heads
    made, back = plan(*given, shared=shared), back_plan(*given, shared=shared)
    counted = torch.zeros(batch, heads, n, keys + 128, dtype=torch.int32)
    tasks = []
    for (key, key_head, b, cut, bound), parts in tasks_of(back):
        assert bound == key
        tasks.append((key, key_head, b, cut))
        if cut >= 0:
            assert back.cut_C4[cut].tolist() == [key, key_head, b, 0]
        for first, masked, count, head, q_batch in parts:
            assert count > 0
            assert head * key_heads // heads == key_head
            assert b == (0 if shared else q_batch)
            own = counted[q_batch, head, :, key : key + 128]
            for at, (row, about) in enumerate(back.entries_E2[first : first + count].tolist()):
                assert row % 64 == 0
                visible = seen(made, row, key, about, at < masked)
                # Nothing is computed in vain where queries leave out keys between them.
                assert visible.any()
                own[row : row + 64] += visible
    written = {task for task in tasks if task[3] < 0}
    assert len(written) == sum(task[3] < 0 for task in tasks)
    tiles = (1 if shared else batch) * key_heads * -(-keys // 128)
    assert len({task[:3] for task in tasks}) == len(written) + len(back.cut_C4) == tiles
    expected = ranges.mask_GNM()[ranges.group_BH.expand(batch, heads)]
    assert (counted[..., :keys] == expected).all()
    assert (counted[..., keys:] == 0).all()
    assert len(back.entries_E2) - 1 <= _hopper_back_plan.most_entries(ranges)
    unseen = torch.zeros(batch, heads, n, dtype=torch.bool)
    if back.empty is not None:
        unseen[back.empty] = True
    assert torch.equal(unseen, ~expected.any(-1))


def test_few_tiles_are_visited(monkeypatch):
    n = 4096
    monkeypatch.setattr(_hopper_back_plan, "_LEAST", 36)
    back = back_plan(window(n, 1024, heads=2), 1, 2, 1)
    # 1,151 queries see some of 128 keys; four of these tiles have a mask.
    assert back.parts_P5[:, 2].max() == 18
    assert back.parts_P5[:, 1].max() == 4
    # None is long, and the last ones, here all, come by length.
    assert len(back.cut_C4) == 0
    assert (back.tasks_T7[:, 3] == -1).all()
    assert back.tasks_T7[:, 0].tolist() == list(range(0, n, 128))
    for x in (back.entries_E2, back.parts_P5, back.tasks_T7, back.cut_C4):
        assert x.dtype == torch.int32
        assert x.is_contiguous()


def test_long_tasks_are_cut_by_stretches_of_queries(monkeypatch):
    n = 2048
    monkeypatch.setattr(_hopper_back_plan, "_LAST", 1)
    back = back_plan(cases.causal(n, 4), 1, 4, 1)
    # More than 32 tiles of 64 queries, by 512 queries: the last ones first, then the first keys.
    tasks = back.tasks_T7[:, 0].tolist()
    assert tasks == [key for end in (2048, 1536, 1024, 512) for key in range(0, end, 128)]
    assert back.parts_P5[0].tolist() == [0, 0, 8, 0, 0]
    # The last queries of whole tiles first.
    assert back.entries_E2[:8, 0].tolist() == list(range(n - 64, n - 513, -64))
    assert back.cut_C4[:, 0].tolist() == list(range(0, n - 512, 128))
    assert back.tasks_T7[-1].tolist() == [384, 0, 0, 3, len(back.parts_P5) - 4, 4, 384]
    # A tile that has a single stretch is complete.
    assert (back.tasks_T7[:, 3] == -1).sum() == 4


def test_a_long_task_begins_before_the_others_would_wait_for_it(monkeypatch):
    monkeypatch.setattr(_hopper_back_plan, "PROGRAMS", 4)
    monkeypatch.setattr(_hopper_back_plan, "_LAST", 4)
    monkeypatch.setattr(_hopper_back_plan, "_TAIL", 40)
    rank, length = torch.arange(100), torch.full((100,), 3)
    order = _hopper_back_plan._order
    # Alike, they stay as they are.
    assert order(rank, length).equal(rank)
    length[97] = 20
    # Four programs do 20 tasks of 3 besides while one of them does the long task.
    assert order(rank, length).tolist() == [*range(79), 97, *range(79, 97), 98, 99]
    # However long it is, it does not come before all.
    length[97] = 1000
    assert order(rank, length).tolist() == [*range(60), 97, *range(60, 97), 98, 99]
    # The last ones, one for each program, come by length; others that differ little stay.
    length[97], length[70], length[98] = 3, 4, 4
    assert order(rank, length).tolist() == [*range(96), 98, 96, 97, 99]
    assert order(rank.flip(0), length)[0] == 99


def test_reasons_where_gradients_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(module, "missing_gluon", lambda: None)
    q, k = On(1, 4, 512, 64, grad=True), On(1, 2, 512, 64, grad=True)
    ranges = window(512, 100, heads=4)
    torch.use_deterministic_algorithms(True)
    try:
        (found,) = module.reasons(q, k, k, ranges)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "not deterministically" in found
    monkeypatch.setattr(module, "MOST_TILES", 25)
    assert "tiles of 64 x 128" in " ".join(module.reasons(q, k, k, ranges))


def test_entries_are_counted_once(monkeypatch):
    ranges = window(512, 100, heads=4)
    bound = _hopper_back_plan.most_entries(ranges)
    monkeypatch.setattr(_hopper_back_plan, "MOST_TILES", 0)
    count = len(back_plan(ranges, 1, 4, 2).entries_E2) - 1
    assert _hopper_back_plan.most_entries(ranges) == count < bound
    monkeypatch.setattr(_hopper_back_plan, "row_tiles", lambda *_: pytest.fail("once more"))
    assert _hopper_back_plan.most_entries(ranges) == count


def test_memory_of_a_plan_counts_bounds_once_and_rows_without_keys(monkeypatch):
    for plans in (_hopper_plan.PLANS, _hopper_back_plan.PLANS):
        monkeypatch.setattr(plans, "latest", [])
    ranges = window(300, 0, heads=2)
    made, back = plan(ranges, 1, 2, 1), back_plan(ranges, 1, 2, 1)
    given = ranges.lo_GNm.nbytes + ranges.hi_GNm.nbytes + ranges.group_BH.nbytes
    (one,), (other,) = _hopper_plan.PLANS.latest, _hopper_back_plan.PLANS.latest
    assert one.nbytes == given + made.entries.nbytes + made.tasks.nbytes
    own = (back.entries_E2, back.parts_P5, back.tasks_T7, back.cut_C4, *back.empty[::2])
    assert other.nbytes == given + sum(x.nbytes for x in own)


def test_plans_of_equal_bounds_and_other_numbers_of_keys():
    few = scattered(300, 200, ranges=3, groups=2, batch=1, heads=2)
    many = KeyRanges(few.lo_GNm.clone(), few.hi_GNm, few.group_BH, 1000)
    # No tile lies behind the last key that is seen, but gradients of all keys are written.
    for a, b in zip(plan(few, 1, 2, 1).tensors, plan(many, 1, 2, 1).tensors, strict=True):
        assert torch.equal(a, b)
    assert [len(back_plan(x, 1, 2, 1).tasks_T7) for x in (few, many)] == [2, 8]


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_from_the_output_and_log_sum_exp_of_more_keys(count):
    ranges = scattered(300, 400, ranges=count, groups=3, batch=2, heads=4)
    q, k, v = (x.double().requires_grad_() for x in tensors(2, 4, 2, 300, 400, 8, 8))
    out, lse = reference(q, k, v, ranges, 0.3)
    empty = lse == -math.inf
    dout = torch.randn_like(out).masked_fill(empty[..., None], 0.0)
    dlse = torch.randn_like(lse).masked_fill(empty, 0.0)
    expected = torch.autograd.grad((out, lse.masked_fill(empty, 0.0)), (q, k, v), (dout, dlse))
    found = [torch.zeros_like(x) for x in (q, k, v)]
    with torch.no_grad():
        for at in range(count):
            lo_GNm, hi_GNm = (x[..., at : at + 1] for x in (ranges.lo_GNm, ranges.hi_GNm))
            own = KeyRanges(lo_GNm.contiguous(), hi_GNm.contiguous(), ranges.group_BH, 400)
            plans = plan(own, 2, 4, 2), back_plan(own, 2, 4, 2)
            joint = lse.masked_fill(empty, 0.0)
            for x, more in zip(
                found, executed(*plans, (q, k, v, out), joint, dout, dlse, 0.3), strict=True
            ):
                x += more
    for x, value in zip(found, expected, strict=True):
        torch.testing.assert_close(x, value, rtol=1e-9, atol=1e-9)


def test_keys_that_batch_rows_share_are_cut_by_as_many_queries(monkeypatch):
    n, rows = 2048, 4
    ranges = cases.dense(n, 2, 256)
    for shared, stretches in ((False, 4), (True, 16)):
        back = back_plan(ranges, rows, 2, 1, shared=shared)
        assert len(back.tasks_T7) == 2 * stretches * (1 if shared else rows)
        # Of two heads, 512 queries each: those of one batch row, or of four.
        assert {sum(part[2] for part in parts) for _, parts in tasks_of(back)} == {16}
        (_, parts), *_ = tasks_of(back)
        assert [tuple(part[3:]) for part in parts] == [
            (head, row) for row in range(rows if shared else 1) for head in (0, 1)
        ]


def test_more_parts_than_can_be_counted_are_refused(monkeypatch):
    monkeypatch.setattr(_hopper_back_plan, "MOST_PARTS", 31)
    assert len(back_plan(window(1024, 100, heads=2), 1, 2, 2).parts_P5) <= 31
    with pytest.raises(Refusal, match=r"31 parts of tasks at most.*got 32"):
        back_plan(window(1024, 100, heads=4), 1, 4, 2)


def test_only_keys_that_many_see_are_cut():
    n = 8192
    lo_GNm = torch.arange(n).sub(127).clamp(min=0)[None, :, None].repeat(1, 1, 2)
    hi_GNm = torch.arange(1, n + 1)[None, :, None].repeat(1, 1, 2)
    # From row 5,000 on, all see some of the first keys.
    lo_GNm[..., 1], hi_GNm[..., 1] = 0, 10
    hi_GNm[:, :5000, 1] = 0
    ranges = KeyRanges(lo_GNm.int(), hi_GNm.int(), torch.zeros(1, 4, dtype=torch.long), n)
    back = back_plan(ranges, 1, 4, 2)
    assert back.cut_C4.tolist() == [[0, head, 0, 0] for head in range(2)]
    long = back.tasks_T7[back.tasks_T7[:, 3] >= 0]
    assert sorted(long[:, 3].tolist()) == [0] * 8 + [1] * 8
    assert len(back.tasks_T7) == 2 * n // 128 + 14
    # They come with the tasks that see the same queries; but the last ones are the shortest ones.
    lengths = torch.tensor([sum(part[2] for part in parts) for _, parts in tasks_of(back)])
    assert (lengths[-132:].diff() <= 0).all()


def test_any_number_of_heads_fits_the_grid(monkeypatch):
    grids = []

    class Rows:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_: None

    kernels = SimpleNamespace(begun=Rows(), ended=Rows())
    monkeypatch.setattr(_hopper_ends, "_kernels", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    out = torch.zeros(1, 1, 1, 8).expand(1 << 14, 4, 513, 8)
    lse = torch.zeros(1, 1, 1).expand(1 << 14, 4, 513)
    numbers = 1000
    first, zeros = _hopper_ends.begun(out, out, lse, None, numbers)
    assert (first.shape, zeros.shape) == ((1 << 14, 4, 2, 513), (numbers,))
    cut = torch.zeros(0, 4, dtype=torch.int32)
    _hopper_ends.ended((zeros, out, 1.0), (zeros, cut), (out, out, None, None), 64, adds=False)
    # CUDA takes 2**31 - 1 programs along the first axis, 65,535 along the others.
    assert grids == [(2 * (1 << 16), 1, 1), (9 * (1 << 16), 1, 1)]


# Results on a GPU.


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_equals_the_oracle(name, dtype):
    here()
    equals_the_oracle(name, dtype)


@gpu
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("name", GPU_CASES)
def test_few_programs_go_through_all_tasks(name, programs, monkeypatch):
    here()
    monkeypatch.setattr(_hopper_calls, "processors", lambda _: programs)
    equals_the_oracle(name, torch.bfloat16)


@gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_gradients_of_cut_keys(name, monkeypatch):
    here()
    cut_finely(monkeypatch, short=128)
    equals_the_oracle(name, torch.bfloat16)


@gpu
@pytest.mark.parametrize("parts", [2, 7])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gradients_where_the_forward_goes_by_parts_of_the_keys(name, parts, monkeypatch):
    here()
    split_keys(monkeypatch, parts)
    equals_the_oracle(name, torch.bfloat16)


def equals_the_oracle(name, dtype):
    ranges, *qkv = on_gpu(name, dtype)
    found = cases.run(module.hopper, qkv, ranges)
    expected = cases.run(for_each_row, [x.float() for x in qkv], ranges)
    for values in (found, expected):
        values["lse"] = values["lse"].masked_fill(expected["lse"] == -math.inf, 0)
    for key, value in expected.items():
        assert found[key].isfinite().all()
        assert relative(found[key], value) < 1e-2, key


def ours(ranges, scale=0.1):
    return lambda q, k, v: module.hopper(q, k, v, ranges, scale)


def oracle(ranges, scale=0.1):
    return lambda q, k, v: reference(q, k, v, ranges, scale)


def gradients(attend, inputs, dout, dlse=None):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = attend(*leaves)
    ends, slopes = [out], [dout.to(out.dtype)]
    if dlse is not None:
        ends, slopes = [out, lse], [*slopes, dlse]
    return torch.autograd.grad(ends, leaves, slopes)


@gpu
@pytest.mark.parametrize("heads_first", [True, False])
def test_gradients_lie_in_memory_as_queries_that_are_views(heads_first):
    here()
    n, step = 2048, 8
    ranges = to(scattered(n // step, n, ranges=2, groups=5, batch=step, heads=4), "cuda")
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 4, 2, n, n, 128, 128))
    if not heads_first:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    own = by_remainder(q, step).detach().requires_grad_()
    out, _ = module.hopper(own, k, v, ranges, 0.1)
    assert out.stride() == own.stride() == torch.autograd.grad(out.sum(), own)[0].stride()
    dout = torch.randn(1, 4, n, 128, device="cuda")

    def attend(kernel, *inputs):
        out, lse = kernel(by_remainder(inputs[0], step), *inputs[1:], ranges, 0.1)
        return row_after_row(out), lse

    found = gradients(partial(attend, module.hopper), (q, k, v), dout)
    expected = gradients(partial(attend, for_each_row), [x.float() for x in (q, k, v)], dout)
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) < 1e-2


@gpu
def test_any_layout_and_scales_of_any_sign():
    here()
    ranges = to(window(300, 77, heads=4), "cuda")
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(2, 4, 2, 300, 300, 64, 64))
    rows_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    turned = [x.mT.contiguous().mT for x in (q, k, v)]
    for scale in (0.125, -0.125, 0.0):
        for dout in (torch.randn_like(q), torch.ones((), device="cuda").expand(q.shape)):
            exact = [x.float() for x in (q, k, v)]
            expected = gradients(oracle(ranges, scale), exact, dout)
            for inputs in ((q, k, v), rows_first, turned):
                found = gradients(ours(ranges, scale), inputs, dout)
                for a, b in zip(found, expected, strict=True):
                    assert a.isfinite().all()
                    assert relative(a, b) < 1e-2 or b.norm() == a.norm() == 0


@gpu
@pytest.mark.parametrize("parts", [1, 3])
def test_passes_views_and_packed_documents(parts, monkeypatch):
    here()
    if parts > 1:
        split_keys(monkeypatch, parts)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 8, 2, 2048, 2048, 128, 128))
    dout = torch.randn_like(q)
    for pattern, rows in LAID_OUT:
        found, expected = (
            gradients(
                partial(ls.attend, pattern=pattern, impl=impl, return_lse=True, **rows),
                inputs,
                dout,
            )
            for inputs, impl in (
                ((q, k, v), "hopper"),
                ((q.float(), k.float(), v.float()), "reference"),
            )
        )
        for a, b in zip(found, expected, strict=True):
            assert a.isfinite().all()
            assert relative(a, b) < 1e-2, pattern


@gpu
def test_gradients_of_later_rows_do_not_reach_earlier_queries():
    here()
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 4, 2, 1500, 1500, 128, 128))
    ranges = to(window(1500, 400, heads=4), "cuda")
    dout = torch.randn_like(q)
    dout[:, :, :700] = 0
    dq, dk, dv = gradients(ours(ranges), (q, k, v), dout)
    assert (dq[:, :, :700] == 0).all()
    for x in (dk, dv):
        assert (x[:, :, :301] == 0).all()
        assert (x[:, :, 301] != 0).any()


@gpu
def test_nan_gradients_of_rows_without_keys_stay_there():
    here()
    ranges = to(cases.segments(300, 1, 2, 0), "cuda")
    empty = ranges.lo_GNm[0, :, 0] == ranges.hi_GNm[0, :, 0]
    assert empty.any()
    qkv = [x.to("cuda", torch.bfloat16) for x in tensors(1, 2, 1, 300, 300, 64, 64)]
    dout, dlse = torch.randn_like(qkv[0]), torch.randn(1, 2, 300, device="cuda")
    dout[:, :, empty], dlse[:, :, empty] = math.nan, math.nan
    for x in gradients(ours(ranges), qkv, dout, dlse):
        assert x.isfinite().all()


@gpu
def test_a_plan_of_inference_serves_training():
    here()
    ranges = to(window(700, 100, heads=4), "cuda")
    qkv = [x.to("cuda", torch.bfloat16) for x in tensors(1, 4, 2, 700, 700, 64, 64)]
    with torch.inference_mode():
        module.hopper(*qkv, ranges, 0.1)
    dout = torch.randn_like(qkv[0])
    found = gradients(ours(ranges), qkv, dout)
    expected = gradients(oracle(ranges), [x.float() for x in qkv], dout)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-2
