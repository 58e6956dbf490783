"""The cuDNN kernel: its form of ranges on the CPU, everything around it over a stand-in for the
library, results and gradients on a GPU; and which kernel ``auto`` picks where it was measured."""

from __future__ import annotations

import importlib
import math
import sys
import types

import pytest
import torch
from tests.ops import cases
from tests.ops.cases import On
from tests.ops.test_flex import gpu, regrouped, relative, scattered, shifted, tensors, to, window
from tests.ops.test_hopper_plan import alternating

import longspan as ls
from longspan.errors import Refusal
from longspan.ops import capability, kept, measured
from longspan.ops.kernels import _cudnn_plan, _flex_tiles
from longspan.ops.kernels.reference import reference
from longspan.ops.ranges import KeyRanges

cudnn_module = importlib.import_module("longspan.ops.kernels.cudnn")
flash_module = importlib.import_module("longspan.ops.kernels.flex_flash")


def visible(ends_HeN, batch, keys):
    """What endpoints mean, bool [B, 1 or H, N, M], checking the library's rules for them."""
    ends = ends_HeN.unflatten(2, (batch, -1)).permute(2, 0, 3, 1)
    assert ends_HeN.dtype == torch.int32
    assert ends_HeN.is_contiguous()
    assert ends_HeN.shape[1] % 2 == 1
    assert (ends.diff(dim=-1) >= 0).all()
    assert ends.min() >= 0
    assert ends.max() <= keys
    key = torch.arange(keys)
    seen = key < ends[..., :1]
    for e in range(1, ends.shape[-1], 2):
        seen = seen | ((ends[..., e, None] <= key) & (key < ends[..., e + 1, None]))
    return seen


BUILT = {
    **{str(case): (case.ranges, case.B, case.H) for case in cases.CASES},
    "per batch row": (
        lambda: regrouped(
            scattered(90, 70, ranges=2, groups=2, batch=1, heads=1), [[0] * 4, [1] * 4]
        ),
        2,
        4,
    ),
    "empty first range beyond 0": (
        lambda: KeyRanges(
            torch.tensor([[[5, 5], [0, 6]]], dtype=torch.int32),
            torch.tensor([[[5, 5], [3, 9]]], dtype=torch.int32),
            torch.zeros(1, 2, dtype=torch.int64),
            9,
        ),
        1,
        2,
    ),
}


@pytest.mark.parametrize("name", BUILT)
def test_endpoints_mean_the_ranges(name):
    build, batch, heads = BUILT[name]
    ranges = build()
    ends = _cudnn_plan.endpoints(ranges, batch)
    assert ends.shape[0] in (1, heads)
    expected = ranges.mask_GNM()[ranges.group_BH.expand(batch, heads)]
    assert (visible(ends, batch, ranges.keys).expand_as(expected) == expected).all()
    empty = _cudnn_plan.empty_rows(ends, batch)
    rows = ~expected.any(-1)
    assert (torch.zeros_like(rows) if empty is None else empty.expand_as(rows)).equal(rows)
    assert ends.numel() <= _cudnn_plan.endpoint_count(ranges, batch, heads)


def test_a_causal_mask_is_one_endpoint_and_heads_alike_are_one():
    assert _cudnn_plan.endpoints(cases.causal(50, 8), 1).shape == (1, 1, 50)
    assert _cudnn_plan.endpoints(cases.window(50, 8, 9), 3).shape == (1, 3, 150)
    assert _cudnn_plan.endpoints(shifted(50, 16, heads=6), 2).shape == (6, 3, 100)


@pytest.mark.parametrize("name", BUILT)
def test_mask_words_bound_the_partly_visible_tiles(name):
    build, batch, heads = BUILT[name]
    ranges = build()
    counts = _flex_tiles.count_tiles(ranges)
    partial = counts.kv_GQ.sum(1)[ranges.group_BH.expand(batch, heads)].sum()
    assert _cudnn_plan.mask_words(ranges, batch, heads) >= int(partial) * 512


def test_mask_words_of_every_batch_row_count():
    ranges = cases.window(500, 2, 100)
    one, three = (_cudnn_plan.mask_words(ranges, batch, 2) for batch in (1, 3))
    assert three == 3 * one > 0


def test_mask_words_of_a_window_are_few():
    # Two tiles on each edge of the window, of 512 words each, for every 128 queries and head.
    words = _cudnn_plan.mask_words(cases.window(1 << 14, 32, 4096), 1, 32)
    assert words <= 4 * 512 * 128 * 32


# Everything around the library, over a stand-in that obeys its rules and computes densely.


def aligned(x):
    return x.stride(-1) == 1 and all(s and s % 8 == 0 for s in x.stride()[:-1])


def dense(q, k, v, seen, scale):
    """What the library computes, in its layout, in operations that autograd knows."""
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    repeat = qh.shape[1] // kh.shape[1]
    logits = qh @ kh.repeat_interleave(repeat, 1).mT * scale
    empty = ~seen.any(-1).expand(logits.shape[:3])
    logits = logits.masked_fill(~seen & ~empty[..., None], -math.inf)
    lse = logits.logsumexp(-1)
    out = (logits - lse[..., None]).exp() @ vh.repeat_interleave(repeat, 1)
    # Rows without keys hold anything.
    out, lse = out.masked_fill(empty[..., None], 7.0), lse.masked_fill(empty, 7.0)
    return out.transpose(1, 2), lse


class OneKernel:
    """What the two kernels of the library have in common: they run for one layout and one plan."""

    workspace_size = 256

    def __init__(self, *sample):
        *self.tensors, self.plan, self.last = sample
        self.state = []

    def check_support(self):
        assert all(aligned(x) for x in self.tensors if x.dim() == 4)
        self.state.append("checked")

    def compile(self):
        assert self.state == ["checked"]
        self.state.append("compiled")
        self.layout = [(x.shape, x.stride(), x.dtype) for x in self.tensors]
        self.with_last = self.last is not None

    def check(self, *given):
        *tensors, plan, last = given
        assert self.state == ["checked", "compiled"]
        assert plan is self.plan
        assert self.layout == [(x.shape, x.stride(), x.dtype) for x in tensors]
        assert self.with_last == (last is not None)


class FlexAttentionFwd(OneKernel):
    prepared = 0

    def _prepare(self, q, k, v, plan):
        FlexAttentionFwd.prepared += 1
        return q.shape, k.shape, v.shape

    def execute(self, q, k, v, out, plan, lse, *, workspace, softmax_scale):
        assert self._prepare(q, k, v, plan) == (q.shape, k.shape, v.shape)
        self.check(q, k, v, out, plan, lse)
        assert workspace.numel() == self.workspace_size
        seen, _ = plan
        with torch.no_grad():
            found_out, found_lse = dense(q, k, v, seen, softmax_scale)
            out.copy_(found_out)
            lse.copy_(found_lse)


class FlexAttentionBwd(OneKernel):
    def __init__(self, *sample, deterministic):
        super().__init__(*sample)
        assert not deterministic

    def execute(
        self, q, k, v, out, dout, lse, dq, dk, dv, plan, dlse, *, workspace, softmax_scale
    ):
        self.check(q, k, v, out, dout, lse, dq, dk, dv, plan, dlse)
        assert workspace.numel() == self.workspace_size
        seen, has_backward = plan
        assert has_backward
        # What the library checks, in widths where a unit of 16 bytes is 8 numbers.
        assert aligned(dout)
        assert dlse is None or dlse.stride(-1) == 1
        # All from what is given: it may be that of more keys than the plan's.
        repeat = q.shape[2] // k.shape[2]
        queries, given, slope = (x.transpose(1, 2).to(lse.dtype) for x in (q, out, dout))
        keys, values = (
            x.transpose(1, 2).repeat_interleave(repeat, 1).to(lse.dtype) for x in (k, v)
        )
        logits = (queries @ keys.mT * softmax_scale).masked_fill(~seen, -math.inf)
        weights = (logits - lse[..., None]).exp()
        delta = (slope * given).sum(-1)
        delta = delta if dlse is None else delta - dlse
        d_logits = weights * (slope @ values.mT - delta[..., None]) * softmax_scale
        grads = (d_logits @ keys, d_logits.mT @ queries, weights.mT @ slope)
        for room, found in zip((dq, dk, dv), grads, strict=True):
            own = found if room is dq else found.unflatten(1, (-1, repeat)).sum(2)
            room.copy_(own.transpose(1, 2))


def stand_in(monkeypatch):
    """Put it in the place of cudnn.flex_attention; returns whether each plan has a backward."""
    made = []

    def create_mask_plan(mask_func, q, k, v, *, build_backward):
        assert all(aligned(x) for x in (q, k, v))
        batch, heads = q.shape[0], q.shape[2]
        assert mask_func.shape[0] in (1, heads)
        assert mask_func.shape[2] == batch * q.shape[1]
        made.append(build_backward)
        return visible(mask_func, batch, k.shape[1]), build_backward

    package = types.ModuleType("cudnn")
    module = types.ModuleType("cudnn.flex_attention")
    module.create_mask_plan = create_mask_plan
    module.FlexAttentionFwd, module.FlexAttentionBwd = FlexAttentionFwd, FlexAttentionBwd
    monkeypatch.setitem(sys.modules, "cudnn", package)
    monkeypatch.setitem(sys.modules, "cudnn.flex_attention", module)
    monkeypatch.setattr(cudnn_module, "reasons", lambda *_: [])
    monkeypatch.setattr(_cudnn_plan.PLANS, "latest", [])
    return made


@pytest.fixture
def library(monkeypatch):
    """A stand-in for cudnn.flex_attention that counts the plans it makes."""
    return stand_in(monkeypatch)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_shared_cases_through_the_stand_in(case, library):
    # Widths that the library takes.
    qkv = [x.repeat(1, 1, 1, -(-8 // x.shape[3])) for x in cases.make_qkv(case)]
    qkv = [x[..., : x.shape[3] // 8 * 8].contiguous() for x in qkv]
    ranges = case.ranges()
    found, expected = (
        cases.run(kernel, qkv, ranges) for kernel in (cudnn_module.cudnn, reference)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
    assert library == [True]


def test_a_kernel_is_made_once_for_a_layout(library):
    one, before = window(64, 9, heads=4), FlexAttentionFwd.prepared
    q, k, v = tensors(2, 4, 2, 64, 64, 16, 16)
    for _ in range(3):
        cudnn_module.cudnn(q, k, v, one, 0.25)
    assert FlexAttentionFwd.prepared == before + 1
    cudnn_module.cudnn(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, one, 0.25)
    assert FlexAttentionFwd.prepared == before + 2


def test_results_lie_in_memory_as_their_inputs(library):
    one = window(64, 9, heads=4)
    for lay in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        q, k, v = (lay(x).requires_grad_() for x in tensors(2, 4, 2, 64, 64, 16, 16))
        out, _ = cudnn_module.cudnn(q, k, v, one, 0.25)
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
        for found, given in zip((out, *grads), (q, q, k, v), strict=True):
            assert found.stride() == given.stride()


def test_gradients_that_sums_broadcast_are_laid_out(library):
    ranges = window(40, 9, heads=4)
    q, k, v = (x.double().requires_grad_() for x in tensors(1, 4, 2, 40, 40, 16, 16))
    for loss in (lambda o, s: o.sum(), lambda o, s: s.sum(), lambda o, s: o.sum() + s.sum()):
        found, expected = (
            torch.autograd.grad(loss(*kernel(q, k, v, ranges, 0.25)), (q, k, v), allow_unused=True)
            for kernel in (cudnn_module.cudnn, reference)
        )
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_nan_gradients_of_empty_rows_stay_there(library):
    ranges = scattered(300, 300, ranges=1, groups=1, batch=1, heads=2)
    inputs = [x.requires_grad_() for x in tensors(1, 2, 2, 300, 300, 16, 16)]
    out, lse = cudnn_module.cudnn(*inputs, ranges, 0.25)
    empty = lse == -math.inf
    assert empty.any()
    poison = torch.full_like(out, math.nan).where(empty[..., None], torch.ones_like(out))
    grads = torch.autograd.grad([out, lse], inputs, [poison, torch.where(empty, math.nan, 1.0)])
    assert all(grad.isfinite().all() for grad in grads)


def test_views_that_the_library_cannot_load_are_copied(library):
    ranges = window(30, 9, heads=4)
    q, k, v = tensors(2, 4, 2, 30, 30, 16, 16)
    expected, _ = cudnn_module.cudnn(q, k, v, ranges, 0.25)
    odd = [torch.cat([x, x[..., :3]], -1)[..., :16] for x in (q, k, v)]
    shared = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    turned = [x.mT.contiguous().mT for x in (q, k, v)]
    for inputs, same in (
        (odd, expected),
        (shared, expected[:1].expand(2, -1, -1, -1)),
        (turned, expected),
    ):
        out, _ = cudnn_module.cudnn(*inputs, ranges, 0.25)
        torch.testing.assert_close(out, same)


def test_plans_are_kept_by_content(library):
    q, k, v = tensors(1, 4, 2, 60, 60, 16, 16)
    for width in (7, 7, 9, 7):
        cudnn_module.cudnn(q, k, v, window(60, width, heads=4), 0.25)
    assert library == [False, False]
    # Other sizes, other plans; and a plan for gradients is another one.
    cudnn_module.cudnn(q[:, :2], k, v, window(60, 7, heads=2), 0.25)
    cudnn_module.cudnn(q.requires_grad_(), k, v, window(60, 7, heads=4), 0.25)
    assert library == [False, False, False, True]


def test_few_plans_are_kept_for_their_content_alone(library, monkeypatch):
    monkeypatch.setattr(kept, "_MOST", 2)
    q, k, v = tensors(1, 4, 2, 60, 60, 16, 16)
    for width in (1, 2, 3, 1):
        cudnn_module.cudnn(q, k, v, window(60, width, heads=4), 0.25)
    assert len(library) == 4
    assert len(_cudnn_plan.PLANS.latest) == 2


# The FLASH route of FlexAttention, traced and run unfused.

FLASH = {
    "one tensor per bound": (lambda: window(512, 200, heads=4), 1, (512,)),
    "nothing visible": (lambda: window(512, 0, heads=4), 1, (512,)),
    "per head": (lambda: shifted(512, 256, heads=4), 2, (4, 512)),
    "several ranges": (
        lambda: scattered(384, 512, ranges=3, groups=5, batch=2, heads=4),
        2,
        (2, 4, 384),
    ),
    "per batch row": (
        lambda: regrouped(
            scattered(384, 512, ranges=1, groups=2, batch=1, heads=1), [[0] * 4, [1] * 4]
        ),
        2,
        (2, 4, 384),
    ),
}


@pytest.mark.parametrize("name", FLASH)
def test_flex_flash_unfused(name, monkeypatch):
    build, batch, shape = FLASH[name]
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, backend, **rest: compiled(f, backend="eager", **rest)
    )
    monkeypatch.setattr(flash_module, "reasons", lambda *_: [])
    # Without the backend PyTorch computes the log-sum-exp itself, and binary.
    monkeypatch.setattr(flash_module, "_lse_unit", lambda: math.log(2))
    ranges = build()
    q, k, v = tensors(batch, 4, 2, ranges.queries, ranges.keys, 16, 16)
    found, expected = (f(q, k, v, ranges, 0.25) for f in (flash_module.flex_flash, reference))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (plan,) = flash_module._schedules[ranges].values()
    assert {x.shape for x in plan.bounds} == {shape}
    assert {x.dtype for x in (*plan.bounds, *plan.lists)} == {torch.int32}
    columns = (ranges.keys // 128, ranges.queries // 128)
    for index, most in zip(plan.lists[1::2], (columns[0],) * 2 + (columns[1],) * 2, strict=True):
        assert index.shape[-1] <= most


# Reasons and the choice between routes.


def test_reasons_are_named_and_a_named_kernel_refuses():
    q, k, v = tensors(1, 2, 1, 4, 4, 16, 16)
    for name in ("cudnn", "flex_flash"):
        with pytest.raises(Refusal, match="runs on cuda"):
            ls.attend(q, k, v, "window(2)", impl=name)
        module = importlib.import_module(f"longspan.ops.kernels.{name}")
        assert "CUDA" in module.reasons(q, k, v, window(4, 2))[0]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    for module in (cudnn_module, flash_module):
        monkeypatch.setattr(module, "missing_stack", lambda: None)


@pytest.mark.parametrize(
    ("q", "v", "word"),
    [
        (On(1, 4, 512, 64), On(1, 2, 512, 64), None),
        (On(1, 4, 512, 192), On(1, 2, 512, 128), None),
        (On(1, 4, 512, 64, dtype=torch.float32), On(1, 2, 512, 64), "bfloat16"),
        (On(1, 4, 512, 60), On(1, 2, 512, 64), "got 60"),
        (On(1, 4, 512, 64), On(1, 2, 512, 136), "values of 136"),
        (On(1, 4, 512, 64, grad=True), On(1, 2, 512, 32), "equally wide"),
    ],
)
def test_reasons_of_cudnn(hopper, q, v, word):
    found = cudnn_module.reasons(q, On(1, 2, 512, q.shape[-1]), v, window(512, 100, heads=4))
    assert found == [] if word is None else word in " ".join(found)


def test_cudnn_counts_in_int32(hopper, monkeypatch):
    q, k = On(1, 4, 512, 64), On(1, 2, 512, 64)
    ranges = window(512, 100, heads=4)
    monkeypatch.setattr(cudnn_module, "MOST_ENDPOINTS", 3 * 512 * 4)
    monkeypatch.setattr(cudnn_module, "MOST_WORDS", 1000)
    found = cudnn_module.reasons(q, k, k, ranges)
    assert "endpoints" in found[0]
    assert "masks" in found[1]


def test_cudnn_on_an_older_gpu(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    q, k = On(1, 4, 512, 64), On(1, 2, 512, 64)
    (found,) = cudnn_module.reasons(q, k, k, window(512, 100, heads=4))
    assert "8.0" in found


@pytest.mark.parametrize(
    ("n", "width", "ranges", "word"),
    [
        (512, 64, 1, None),
        (500, 64, 1, "multiples of 128"),
        (128, 64, 1, "multiples of 128"),
        (512, 80, 1, "64, 96, 128"),
        (512, 64, 9, "at most 8 ranges"),
    ],
)
def test_reasons_of_flex_flash(hopper, n, width, ranges, word):
    own = scattered(n, n, ranges=ranges, groups=1, batch=1, heads=4)
    q, k = On(1, 4, n, width), On(1, 2, n, width)
    found = flash_module.reasons(q, k, k, own)
    assert found == [] if word is None else word in " ".join(found)


def test_no_gradient_of_the_lse_is_a_reason(hopper):
    kernel = next(c for c in capability.KERNELS if c.name == "flex_flash")
    q, k = On(1, 4, 512, 64, grad=True), On(1, 2, 512, 64)
    assert kernel.reasons(q, k, k, window(512, 9, heads=4), use_lse=False) == []
    assert "log-sum-exp" in kernel.reasons(q, k, k, window(512, 9, heads=4))[0]
    with torch.no_grad():
        assert kernel.reasons(q, k, k, window(512, 9, heads=4)) == []


TABLE = [
    {"pattern": "window(1024)", "width": 128, "keys": 1000, "apart": False, "backward": False},
    {"pattern": "window(8192)", "width": 128, "keys": 8000, "apart": False, "backward": False},
    {"pattern": "window(1024)", "width": 128, "keys": 1000, "apart": False, "backward": True},
]
for at, rates in enumerate(
    ({"cudnn": 5.0, "flex": 3.0}, {"cudnn": 5.0, "flex_flash": 6.0, "flex": 3.0}, {"flex": 3.0})
):
    TABLE[at]["tflops"] = rates


def test_auto_follows_the_measurements_of_this_gpu(hopper, monkeypatch):
    monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": TABLE}})
    q, k = On(1, 4, 4096, 128), On(1, 2, 4096, 128)

    def picks(ranges, q=q, k=k):
        return capability.choose("auto", q, k, k, ranges).name

    assert picks(window(4096, 500, heads=4)) == "cudnn"
    assert picks(window(4096, 4096 * 4, heads=4)) == "cudnn"
    wide = window(16384, 16000, heads=4)
    assert picks(wide, On(1, 4, 16384, 128), On(1, 2, 16384, 128)) == "flex_flash"
    training = On(1, 4, 4096, 128, grad=True)
    assert measured.rates(training, window(4096, 500, heads=4), True).tflops == {"flex": 3.0}


@pytest.mark.parametrize(
    ("batch", "n", "goes"),
    [(1, 2048, True), (1, 2047, False), (8, 256, True), (7, 256, False), (64, 127, False)],
)
def test_rows_of_all_batch_rows_count(batch, n, goes, hopper, monkeypatch):
    # Rows of a remainder, or short sequences: as much to do as in one long row.
    monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": TABLE}})
    q = On(batch, 4, n, 128)
    assert (measured.rates(q, window(n, 100, heads=4), False) is not None) == goes


def test_kernels_that_a_case_lacks_count_with_the_nearest_one_that_has_them(hopper, monkeypatch):
    near, far = {**TABLE[0], "keys": 2000}, {**TABLE[0], "keys": 9000}
    q = On(1, 4, 8192, 128)
    ranges = window(8192, 1080, heads=4)

    def first(*rates):
        cases = [
            {**case, "tflops": x} for case, x in zip((TABLE[0], near, far), rates, strict=True)
        ]
        monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": cases}})
        return capability.in_order(q, q, q, ranges)

    kernels, found = first(
        {"flex": 3.0}, {"flex": 9.0, "cudnn": 5.0}, {"cudnn": 1.0, "flash": 9.0}
    )
    assert found.elsewhere == {"cudnn": 5.0}
    said = [importlib.import_module("longspan.ops.attend")._rate(found, k.name) for k in kernels]
    assert said[:3] == ["5 TFLOP/s on the nearest case that it has", "3 TFLOP/s there", ""]
    assert [kernel.name for kernel in kernels[:2]] == ["cudnn", "flex"]
    # What was measured on the case itself comes first where it is about as fast.
    kernels, _ = first({"flex": 4.0}, {"cudnn": 5.0}, {"flash": 9.0})
    assert [kernel.name for kernel in kernels[:2]] == ["flex", "cudnn"]


def test_rates_of_one_range_a_query_come_from_such_cases(hopper, monkeypatch):
    table = [
        {**TABLE[0], "tflops": {"cudnn": 5.0, "flex": 3.0}},
        {**TABLE[0], "keys": 1010, "several": True, "tflops": {"cudnn": 3.0, "flex": 5.0}},
    ]
    monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": table}})
    q = On(1, 4, 8192, 128)
    one, two = window(8192, 1080, heads=4), cases.sink_window(8192, 4, 60, 1020)
    for ranges, first in ((one, "cudnn"), (two, "flex")):
        assert abs(measured.shape_of(ranges)[0] - 1010) < 5
        assert capability.in_order(q, q, q, ranges)[0][0].name == first


def test_blocks_go_by_what_was_measured_where_heads_share_them(hopper, monkeypatch):
    blocks = {**TABLE[0], "keys": 576, "fill": 0.26, "several": True}
    table = [
        {**blocks, "by_twos": True, "tflops": {"cudnn": 5.0, "flex": 3.0}},
        {**blocks, "by_twos": False, "tflops": {"cudnn": 3.0, "flex": 5.0}},
    ]
    monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": table}})
    ranges = alternating(4096, 4096, 9, 8)
    other = alternating(4096, 4096, 9, 8)
    twice = [torch.cat(x) for x in ((ranges.lo_GNm, other.lo_GNm), (ranges.hi_GNm, other.hi_GNm))]
    apart = KeyRanges(*twice, torch.tensor([[0, 1] * 4]), 4096)
    q = On(1, 8, 4096, 128)
    for given, key_heads, first in (
        (ranges, 4, "cudnn"),
        (ranges, 2, "cudnn"),
        # Heads that differ, and heads without a neighbour of the same key head.
        (apart, 2, "flex"),
        (ranges, 8, "flex"),
    ):
        k = On(1, key_heads, 4096, 128)
        assert capability.in_order(q, k, k, given)[0][0].name == first
    # Where tiles are full it makes no difference.
    full = window(4096, 500, heads=8)
    assert measured.shape_of(full)[2:] == (1.0, True)
    k = On(1, 8, 4096, 128)
    assert capability.in_order(q, k, k, full)[0][0].name == "cudnn"


@pytest.mark.parametrize(
    ("rate", "rows", "names"),
    [
        # As fast as the other one, up to what a merge with gradients costs.
        (105.0, 4096, ["cudnn", "cudnn"]),
        (120.0, 4096, ["flex", "cudnn"]),
        # Too few rows for the table.
        (120.0, 100, ["cudnn", "cudnn"]),
    ],
)
def test_passes_that_are_joined_agree_on_kernels_with_halves(
    rate, rows, names, hopper, monkeypatch
):
    table = [
        {**TABLE[0], "backward": True, "tflops": {"cudnn": 100.0, "flex": rate}},
        {**TABLE[1], "backward": True, "tflops": {"cudnn": 100.0, "flex": 90.0}},
    ]
    monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": table}})
    flex_module = importlib.import_module("longspan.ops.kernels.flex")
    monkeypatch.setattr(flex_module, "reasons", lambda *_: [])
    k = On(1, 2, 16384, 128)
    few, many = (
        (On(1, 4, n, 128, grad=True), k, k, window(n, width, keys=16384, heads=4))
        for n, width in ((rows, 900), (16384, 16000))
    )
    for impl, passes, wanted in (
        ("auto", [few, many], names),
        ("auto", [few, few], ["flex", "flex"]),
        ("flex", [few, many], ["flex", "flex"]),
    ):
        picked, said = capability.choose_together(impl, passes)
        assert [kernel.name for kernel in picked] == wanted
        assert said is None


def test_passes_that_are_joined_go_by_cases_of_several_passes(hopper, monkeypatch):
    alone = {**TABLE[0], "backward": True, "tflops": {"flex": 9.0, "cudnn": 1.0}}
    joined = {**alone, "passes": 2, "keys": 1800}
    for name in ("flex", "hopper"):
        module = importlib.import_module(f"longspan.ops.kernels.{name}")
        monkeypatch.setattr(module, "reasons", lambda *_: [])

    def names(rates, rows=(8192, 2048), width=1080, passes=2):
        table = [alone, {**joined, "tflops": rates, "passes": passes}]
        monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": table}})
        k = On(1, 2, 8192, 128)
        each = [
            (On(1, 4, n, 128, grad=True), k, k, window(n, width, keys=8192, heads=4)) for n in rows
        ]
        # Cases of several passes say nothing of a pass that stands alone.
        assert capability.choose("auto", *each[0]).name == "flex"
        return [kernel.name for kernel in capability.choose_together("auto", each)[0]]

    assert names({"cudnn": 2.0, "hopper": 3.0}) == ["hopper", "hopper"]
    assert names({"cudnn": 3.0, "hopper": 2.0}) == ["cudnn", "cudnn"]
    # One without halves was faster there; a case of many more passes, or keys, is not near.
    assert names({"cudnn": 3.0, "flex": 4.0}) == ["flex", "flex"]
    assert names({"cudnn": 3.0}, passes=16) == ["flex", "flex"]
    assert names({"cudnn": 3.0}, width=200) == ["flex", "flex"]
    # The pass with the most rows says whether there are enough for the table.
    assert names({"hopper": 3.0}, rows=(8192, 100)) == ["hopper", "hopper"]


def test_ranges_are_not_looked_at_where_nothing_was_measured(hopper, monkeypatch):
    monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": TABLE}})
    monkeypatch.setattr(measured, "shape_of", lambda _: pytest.fail("that may wait for the GPU"))
    short, ranges = On(1, 4, 512, 128, grad=True), window(512, 100, heads=4)
    wide = On(1, 4, 4096, 128, dtype=torch.float32)
    here = torch.zeros(1, 4, 4096, 8, dtype=torch.bfloat16)
    for q, own in ((short, ranges), (wide, window(4096, 9, heads=4)), (here, ranges)):
        assert measured.rates(q, own, False) is None
        assert measured.rates_together([(q, own), (q, own)]) is None


def test_short_inputs_and_other_gpus_keep_the_order(hopper, monkeypatch):
    q = On(1, 4, 512, 128)
    monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": TABLE}})
    assert measured.rates(q, window(512, 100, heads=4), False) is None
    monkeypatch.setattr(measured, "table", lambda: {"another GPU": {"cases": TABLE}})
    assert measured.rates(On(1, 4, 4096, 128), window(4096, 9, heads=4), False) is None


@pytest.mark.parametrize(("capability_there", "goes_by_it"), [([9, 0], True), ([8, 0], False)])
def test_a_gpu_that_was_not_measured_goes_by_one_of_its_architecture(
    capability_there, goes_by_it, hopper, monkeypatch
):
    own = [{**case, "tflops": {"flex": 1.0}} for case in TABLE]
    table = {"another GPU": {"cases": TABLE, "capability": capability_there}}
    monkeypatch.setattr(measured, "table", lambda: table)
    q, ranges = On(1, 4, 4096, 128), window(4096, 500, heads=4)
    found = measured.rates(q, ranges, False)
    assert (found is not None) == goes_by_it
    if found is not None:
        assert found.gpu == "another GPU, of the same compute capability (some GPU was not)"
        assert capability.choose("auto", q, q, q, ranges).name == "cudnn"
    # Its own figures come first.
    table["some GPU"] = {"cases": own, "capability": [9, 0]}
    found = measured.rates(q, ranges, False)
    assert (found.gpu, found.tflops) == ("some GPU", {"flex": 1.0})


def test_the_stored_table_is_whole():
    names = {kernel.name for kernel in capability.KERNELS}
    for gpu_name, found in measured.table().items():
        assert found["command"], gpu_name
        assert [type(x) for x in found["capability"]] == [int, int]
        for case in found["cases"]:
            assert set(case["tflops"]) <= names
            assert {"pattern", "width", "keys", "apart", "backward"} <= set(case)
            assert all(rate > 0 for rate in case["tflops"].values())


# Results on a GPU with the library.


def installed(module):
    return torch.cuda.is_available() and module.missing_stack() is None


GPU_CASES = {
    "window": (lambda: window(512, 200, heads=4), (1, 4, 2, 512, 512, 64, 64)),
    "odd": (lambda: window(777, 200, heads=4), (2, 4, 2, 777, 777, 96, 96)),
    "per head": (lambda: shifted(1024, 256, heads=8), (1, 8, 2, 1024, 1024, 128, 128)),
    "scattered": (
        lambda: scattered(512, 640, ranges=3, groups=5, batch=2, heads=8),
        (2, 8, 2, 512, 640, 64, 64),
    ),
    "wider keys": (lambda: window(300, 77, heads=4), (1, 4, 4, 300, 300, 80, 96)),
    "few rows": (lambda: window(17, 60, keys=250, heads=4), (1, 4, 2, 17, 250, 64, 64)),
    "all empty": (lambda: window(200, 0, heads=4), (1, 4, 2, 200, 200, 64, 64)),
}


def test_the_backward_walks_queries_from_the_last():
    index = torch.arange(9, dtype=torch.int32)
    lists = types.SimpleNamespace(
        full_block_idx=index, full_block_offset=torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    )
    packed = types.SimpleNamespace(bwd_tensors=lists)
    _cudnn_plan.last_queries_first(types.SimpleNamespace(_packed_plan=packed))
    # Behind the last row is memory without meaning.
    assert index.tolist() == [2, 1, 0, 6, 5, 4, 3, 7, 8]
    # Another version of the library may call it otherwise: then nothing happens.
    _cudnn_plan.last_queries_first(types.SimpleNamespace())


@gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_cudnn_equals_the_oracle(name):
    if not installed(cudnn_module):
        pytest.skip("needs cudnn.flex_attention")
    build, shape = GPU_CASES[name]
    ranges = to(build(), "cuda")
    qkv = [x.to("cuda", torch.bfloat16) for x in tensors(*shape)]
    found = cases.run(cudnn_module.cudnn, qkv, ranges)
    expected = cases.run(reference, [x.float() for x in qkv], ranges)
    seen = expected["lse"] > -math.inf
    assert (found["lse"][~seen] == -math.inf).all()
    for values in (found, expected):
        values["lse"] = values["lse"].masked_fill(~seen, 0)
    for key, value in expected.items():
        assert found[key].isfinite().all()
        assert relative(found[key], value) < 1e-2, key


FLASH_GPU = {
    "window": (lambda: window(512, 200, heads=4), (1, 4, 2, 512, 512, 64, 64)),
    "per head": (lambda: shifted(1024, 256, heads=8), (2, 8, 2, 1024, 1024, 128, 128)),
    "scattered": (
        lambda: scattered(512, 640, ranges=3, groups=5, batch=2, heads=8),
        (2, 8, 2, 512, 640, 96, 96),
    ),
}


@gpu
@pytest.mark.parametrize("name", FLASH_GPU)
def test_flex_flash_equals_the_oracle(name):
    if not installed(flash_module):
        pytest.skip("needs flash_attn.cute")
    build, shape = FLASH_GPU[name]
    ranges = to(build(), "cuda")
    inputs = [x.to("cuda", torch.bfloat16).requires_grad_() for x in tensors(*shape)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    out, lse = flash_module.flex_flash(*inputs, ranges, 0.125)
    expected, expected_lse = reference(*exact, ranges, 0.125)
    seen = expected_lse > -math.inf
    assert not lse.requires_grad
    assert (lse[~seen] == -math.inf).all()
    assert relative(lse[seen], expected_lse[seen]) < 1e-4
    slope = torch.randn_like(expected)
    grads = torch.autograd.grad(out, inputs, slope.to(out.dtype))
    expected_grads = torch.autograd.grad(expected, exact, slope)
    for a, b in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert relative(a, b) < 1e-2
