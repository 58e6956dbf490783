"""FlashAttention-4's own masks: what is recognised, and results over a stand-in for the library on
the CPU; results and gradients on a GPU."""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import pytest
import torch
from tests.ops import cases
from tests.ops.cases import On
from tests.ops.test_flex import gpu, regrouped, relative, shifted, tensors, to, window

import longspan as ls
from longspan.errors import Refusal
from longspan.ops import capability, measured
from longspan.ops.kernels import _flash_masks
from longspan.ops.kernels.reference import reference
from longspan.ops.libraries import missing_flash_attention
from longspan.ops.ranges import KeyRanges

module = importlib.import_module("longspan.ops.kernels.flash")


# Ranges.


def sides(n: int, left: int, right: int, heads: int) -> KeyRanges:
    i = np.arange(n)
    lo, hi = np.maximum(0, i - left), np.minimum(n, i + right + 1)
    return cases.key_ranges(lo, hi, heads=heads, keys=n)


def documents(
    lengths: list[list[int]], heads: int, *, left: int = 1 << 30, right: int = 0
) -> KeyRanges:
    """Segments of each batch row, each with the same window inside."""
    n = sum(lengths[0])
    i = np.arange(n)
    starts = [np.repeat(np.cumsum([0, *one[:-1]]), one) for one in lengths]
    ends = [np.repeat(np.cumsum(one), one) for one in lengths]
    lo = np.stack([np.maximum(x, i - left) for x in starts])
    hi = np.stack([np.minimum(x, i + right + 1) for x in ends])
    group = np.repeat(np.arange(len(lengths))[:, None], heads, 1)
    return cases.key_ranges(lo, hi, group, heads=heads, keys=n)


def whole_chunks(n: int, size: int, heads: int) -> KeyRanges:
    return documents([[size] * (n // size) + [n % size] * (n % size > 0)], heads, right=n)


ALL = (None, None)
# Ranges, batch, query heads, key heads; then for each call how many batch rows or segments it
# has, whether it is causal, and its window.
SHAPES = {
    "causal": (lambda: window(301, 999, heads=4), 2, 4, 2, [(2, True, ALL)]),
    "window": (lambda: window(301, 50, heads=4), 2, 4, 2, [(2, True, (49, 0))]),
    "own key only": (lambda: window(301, 1, heads=4), 1, 4, 2, [(1, True, (0, 0))]),
    "two-sided": (lambda: sides(301, 40, 17, 4), 2, 4, 1, [(2, False, (40, 17))]),
    "all before": (lambda: sides(301, 999, 17, 4), 1, 4, 2, [(1, False, (300, 17))]),
    "after": (lambda: sides(301, 0, 999, 4), 1, 4, 2, [(1, False, (0, 300))]),
    "dense": (lambda: sides(301, 999, 999, 4), 1, 4, 4, [(1, False, ALL)]),
    "chunks": (lambda: cases.chunk(512, 4, 128), 2, 4, 2, [(8, True, ALL)]),
    "whole chunks": (lambda: whole_chunks(512, 128, 4), 2, 4, 2, [(8, False, ALL)]),
    "odd chunks": (lambda: cases.chunk(500, 4, 141), 2, 4, 2, [(8, True, ALL)]),
    "odd whole chunks": (lambda: whole_chunks(500, 141, 4), 1, 4, 2, [(4, False, ALL)]),
    "shifted chunks": (
        lambda: shifted(512, 256, heads=8),
        1,
        8,
        2,
        [(2, True, ALL), (3, True, ALL)],
    ),
    "odd shifted chunks": (
        lambda: cases.shifted_chunk(701, 8, 290),
        2,
        8,
        4,
        [(6, True, ALL), (6, True, ALL)],
    ),
    "documents": (
        lambda: documents([[150, 201, 160], [301, 210]], 4),
        2,
        4,
        2,
        [(5, True, ALL)],
    ),
    "windows in documents": (
        lambda: documents([[150, 201, 160], [301, 210]], 4, left=70),
        2,
        4,
        2,
        [(5, True, (70, 0))],
    ),
    "two-sided windows in documents": (
        lambda: documents([[250, 261], [130, 381]], 4, left=20, right=9),
        2,
        4,
        2,
        [(4, False, (20, 9))],
    ),
    "the same documents in both rows": (
        lambda: documents([[150, 250]], 4),
        2,
        4,
        2,
        [(4, True, ALL)],
    ),
    "one query": (lambda: window(1, 1, heads=4), 1, 4, 2, [(1, False, ALL)]),
    "four runs": (
        lambda: KeyRanges(
            torch.cat([window(90, w).lo_GNm for w in (5, 7)]),
            torch.cat([window(90, w).hi_GNm for w in (5, 7)]),
            torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]]),
            90,
        ),
        1,
        8,
        4,
        [(1, True, (4, 0)), (1, True, (6, 0))] * 2,
    ),
}


# A stand-in for flash_attn.cute, after its documentation.


def _masked(q, k, v, causal, window_size, scale):
    """One sequence [n, h, D]: out [n, h, D] and lse [h, n]."""
    left, right = window_size
    row, key = torch.arange(len(q))[:, None], torch.arange(len(k))
    key = key - (len(k) - len(q))
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if causal:
        right = 0
    if left is not None:
        seen &= key >= row - left
    if right is not None:
        seen &= key <= row + right
    share = q.shape[1] // k.shape[1]
    kh, vh = (x.repeat_interleave(share, 1).transpose(0, 1) for x in (k, v))
    logits = (q.transpose(0, 1) @ kh.mT * scale).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ vh).transpose(0, 1), logits.logsumexp(-1)


class AsLibrary(torch.autograd.Function):
    """Nothing; checks that gradients come as the library loads them."""

    @staticmethod
    def forward(ctx, out, lse):
        ctx.set_materialize_grads(False)
        return out.contiguous(), lse.contiguous()

    @staticmethod
    def backward(ctx, dout, dlse):
        assert dout is None or (dout.stride(-1) == 1 and 0 not in dout.stride())
        return dout, dlse


@pytest.fixture
def library(monkeypatch):
    """Stands in for the library and keeps what it was asked."""
    asked = []

    def checked(q, k, v, window_size, deterministic, return_lse, dims):
        assert q.dim() == k.dim() == v.dim() == dims
        assert all(x.stride(-1) == 1 and 0 not in x.stride() for x in (q, k, v))
        assert all(x is None or type(x) is int for x in window_size)
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert return_lse

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, deterministic, return_lse):
        checked(q, k, v, window_size, deterministic, return_lse, 4)
        asked.append((len(q), causal, window_size))
        parts = [
            _masked(*x, causal, window_size, softmax_scale) for x in zip(q, k, v, strict=True)
        ]
        outs, lses = zip(*parts, strict=True)
        return AsLibrary.apply(torch.stack(outs), torch.stack(lses))

    def flash_attn_varlen_func(
        q,
        k,
        v,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_lse,
    ):
        checked(q, k, v, window_size, deterministic, return_lse, 3)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.equal(cu_seqlens_k)
        sizes = cu_seqlens_q.diff().tolist()
        assert cu_seqlens_q[0] == 0
        assert sum(sizes) == len(q) == len(k) == len(v)
        assert max_seqlen_q == max_seqlen_k == max(sizes)
        asked.append((len(sizes), causal, window_size))
        each = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        parts = [_masked(*x, causal, window_size, softmax_scale) for x in each]
        outs, lses = zip(*parts, strict=True)
        return AsLibrary.apply(torch.cat(outs), torch.cat(lses, 1))

    package, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    cute.flash_attn_func, cute.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setattr(module, "tensor_reasons", lambda *_: [])
    return asked


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_oracle_through_the_stand_in(name, library):
    build, batch, heads, key_heads, calls = SHAPES[name]
    ranges = build()
    n = ranges.queries
    qkv = [x.double() for x in tensors(batch, heads, key_heads, n, n, 16, 16)]
    found, expected = (cases.run(kernel, qkv, ranges) for kernel in (module.flash, reference))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10)
    assert library == calls


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_shared_cases_are_right_or_refused(case, library):
    qkv, ranges = cases.make_qkv(case), case.ranges()
    if module.reasons(*qkv, ranges):
        with pytest.raises(Refusal, match="flash cannot run here"):
            module.flash(*qkv, ranges, 0.25)
        return
    found, expected = (cases.run(kernel, qkv, ranges) for kernel in (module.flash, reference))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10)
    assert library


def test_layouts_and_gradients_that_sums_broadcast(library):
    ranges = shifted(256, 128, heads=4)
    q, k, v = (x.double() for x in tensors(2, 4, 2, 256, 256, 16, 16))
    expected = reference(q, k, v, ranges, 0.25)
    rows_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    odd = [torch.cat([x, x[..., :3]], -1)[..., :16] for x in (q, k, v)]
    for inputs in (rows_first, odd):
        for a, b in zip(module.flash(*inputs, ranges, 0.25), expected, strict=True):
            torch.testing.assert_close(a, b)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    out, _ = module.flash(*shared, ranges, 0.25)
    torch.testing.assert_close(out, expected[0][:1].expand_as(out))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for loss in (
        lambda o, s: o.sum(),
        lambda o, s: s.sum(),
        lambda o, s: o.mean(2).square().sum(),
    ):
        found, right = (
            torch.autograd.grad(loss(*f(*leaves, ranges, 0.25)), leaves, allow_unused=True)
            for f in (module.flash, reference)
        )
        for a, b in zip(found, right, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b)


def test_ranges_are_read_once(library, monkeypatch):
    read = []
    recognised = _flash_masks._recognised
    monkeypatch.setattr(
        _flash_masks, "_recognised", lambda ranges: read.append(1) or recognised(ranges)
    )
    ranges, refused = documents([[150, 200]], 4), cases.sink_window(90, 4, 4, 20)
    q, k, v = tensors(2, 4, 2, 350, 350, 16, 16)
    for batch in (1, 2, 2):
        module.flash(q[:batch], k[:batch], v[:batch], ranges, 0.25)
    assert module.reasons(q, k, v, refused) == module.reasons(q, k, v, refused) != []
    assert len(read) == 2
    (run,) = _flash_masks.runs_of(ranges)
    assert [x.tolist() for x in run.kept.values()] == [[0, 150, 350], [0, 150, 350, 500, 700]]


def test_segments_first_used_in_inference_mode_serve_training(library):
    ranges = cases.chunk(512, 4, 256)
    (run,) = _flash_masks.runs_of(ranges)
    with torch.inference_mode():
        starts = run.starts_on(torch.device("cpu"), 512)
    assert not starts.is_inference()


def test_views_of_a_dilated_window_are_windows(library):
    # What planning makes of it: each remainder is a batch row, and all see the same.
    (part,) = ls.plan(ls.parse("dilated(40, 4)"), 256, 4).passes
    loading = importlib.import_module("longspan.ops.loading")
    q, k, v = tensors(1, 4, 2, 256, 256, 16, 16)
    views = loading.load(part, q, k)
    own = views.inputs(q, k, v)
    found = views.outputs(*module.flash(*own, views.ranges, 0.25)).placed()
    expected = ls.attend(q, k, v, "dilated(40, 4)", impl="reference", scale=0.25)
    torch.testing.assert_close(found[0], expected)
    assert library == [(4, True, (39, 0))]


# Refusals.


def moved(ranges: KeyRanges, row: int, lo: int, hi: int) -> KeyRanges:
    """One row changed."""
    ranges.lo_GNm[:, row], ranges.hi_GNm[:, row] = lo, hi
    return ranges


REFUSED = {
    "two ranges": (lambda: cases.sink_window(300, 4, 4, 100), "one range per query"),
    "more keys": (lambda: window(100, 20, keys=300, heads=4), "as many keys as queries"),
    "padding": (lambda: cases.segments(401, 2, 4, 0), "some see none"),
    "many groups": (lambda: cases.scca_flow(500, 5, 100), "at most 4 runs"),
    "dealt groups": (
        lambda: regrouped(shifted(256, 128, heads=2), [[0, 1, 0, 1, 0, 1]]),
        "these are 6",
    ),
    "short chunks": (lambda: cases.chunk(500, 4, 100), "less than 128 rows"),
    "one row looks further": (lambda: moved(window(300, 50, heads=4), 200, 10, 201), "one window"),
    "one row looks ahead": (lambda: moved(window(300, 50, heads=4), 200, 151, 203), "one window"),
    "not its own key": (lambda: moved(window(300, 50, heads=4), 200, 151, 200), "one window"),
    "neighbourhoods": (
        lambda: cases.key_ranges(
            np.clip(np.arange(300) - 16, 0, 267),
            np.clip(np.arange(300) - 16, 0, 267) + 33,
            heads=4,
            keys=300,
        ),
        "one window",
    ),
    "other windows in each batch row": (
        lambda: KeyRanges(
            torch.cat([window(90, w).lo_GNm for w in (5, 7)]),
            torch.cat([window(90, w).hi_GNm for w in (5, 7)]),
            torch.tensor([[0] * 4, [1] * 4]),
            90,
        ),
        "one window",
    ),
    "keys split": (lambda: shifted(512, 256, heads=6), "share a key head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name, library):
    build, word = REFUSED[name]
    ranges = build()
    heads, n = ranges.group_BH.shape[1], ranges.queries
    q, k, v = tensors(2, heads, 1, n, ranges.keys, 16, 16)
    (reason,) = module.reasons(q, k, v, ranges)
    assert word in reason
    with pytest.raises(Refusal, match="flash cannot run here"):
        module.flash(q, k, v, ranges, 0.25)
    assert library == []


def test_a_named_kernel_refuses_without_a_gpu():
    q, k, v = tensors(1, 2, 1, 4, 4, 16, 16)
    with pytest.raises(Refusal, match="runs on cuda"):
        ls.attend(q, k, v, "window(2)", impl="flash")
    assert "CUDA" in module.reasons(q, k, v, window(4, 2))[0]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    monkeypatch.setattr(module, "missing_flash_attention", lambda: None)
    for name in ("cudnn", "flex_flash"):
        other = importlib.import_module(f"longspan.ops.kernels.{name}")
        monkeypatch.setattr(other, "missing_stack", lambda: None)


@pytest.mark.parametrize(
    ("q", "v", "word"),
    [
        (On(1, 4, 500, 64), On(1, 2, 500, 64), None),
        (On(1, 4, 500, 128, dtype=torch.float16, grad=True), On(1, 2, 500, 128), None),
        (On(1, 4, 500, 64, dtype=torch.float32), On(1, 2, 500, 64), "bfloat16"),
        (On(1, 4, 500, 80), On(1, 2, 500, 80), "64, 96, 128"),
        (On(1, 4, 500, 128), On(1, 2, 500, 64), "128 and 64"),
    ],
)
def test_reasons_of_tensors(hopper, q, v, word):
    found = module.reasons(q, On(1, 2, 500, q.shape[-1]), v, window(500, 100, heads=4))
    assert found == [] if word is None else word in " ".join(found)


def test_an_older_gpu_and_a_missing_package(hopper, monkeypatch):
    q, k = On(1, 4, 512, 64), On(1, 2, 512, 64)
    ranges = window(512, 100, heads=4)
    monkeypatch.setattr(module, "missing_flash_attention", lambda: "flash-attn-4 is not installed")
    assert module.reasons(q, k, k, ranges) == ["flash-attn-4 is not installed"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    (found,) = module.reasons(q, k, k, ranges)
    assert "8.0" in found


def test_auto_takes_it_only_where_it_was_measured_faster(hopper, monkeypatch):
    about = {"pattern": "window", "width": 128, "apart": False, "backward": False}
    cases_ = [
        {**about, "keys": 1000, "tflops": {"cudnn": 5.0, "flex": 3.0}},
        {**about, "keys": 4000, "tflops": {"cudnn": 5.0, "flash": 6.0}},
        {**about, "keys": 16000, "tflops": {"cudnn": 5.0, "flash": 4.0}},
    ]
    monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": cases_}})
    q, k = On(1, 4, 32768, 128), On(1, 2, 32768, 128)

    def picks(ranges):
        return capability.choose("auto", q, k, k, ranges).name

    assert picks(window(32768, 1000, heads=4)) == "cudnn"
    assert picks(window(32768, 4100, heads=4)) == "flash"
    assert picks(window(32768, 32768, heads=4)) == "cudnn"
    # As wide, but not what the library can mask.
    assert picks(cases.sink_window(32768, 4, 100, 4000)) == "cudnn"


# Results on a GPU with the library.


GPU_CASES = {
    "causal": (lambda: window(777, 999, heads=8), (1, 8, 2, 777)),
    "window": (lambda: window(1000, 200, heads=8), (2, 8, 2, 1000)),
    "two-sided": (lambda: sides(1000, 200, 77, 4), (2, 4, 4, 1000)),
    "chunks": (lambda: cases.chunk(1024, 8, 256), (2, 8, 2, 1024)),
    "whole chunks": (lambda: whole_chunks(1024, 256, 8), (1, 8, 2, 1024)),
    "odd chunks": (lambda: whole_chunks(1001, 290, 8), (2, 8, 2, 1001)),
    "shifted chunks": (lambda: shifted(1536, 512, heads=8), (1, 8, 2, 1536)),
    "documents": (lambda: documents([[150, 501, 360], [301, 710]], 8), (2, 8, 2, 1011)),
    "windows in documents": (
        lambda: documents([[150, 501, 360], [301, 710]], 8, left=180),
        (2, 8, 2, 1011),
    ),
    # Beyond 256 of them the library looks them up in another way.
    "many documents": (lambda: documents([[129, 131] * 17], 2), (8, 2, 2, 4420)),
}


def on_gpu(shape, width, dtype=torch.bfloat16):
    if missing_flash_attention() is not None:
        pytest.skip(str(missing_flash_attention()))
    batch, heads, key_heads, n = shape
    return [x.to("cuda", dtype) for x in tensors(batch, heads, key_heads, n, n, width, width)]


@gpu
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("name", GPU_CASES)
def test_flash_equals_the_oracle(name, width):
    build, shape = GPU_CASES[name]
    qkv, ranges = on_gpu(shape, width), to(build(), "cuda")
    found = cases.run(module.flash, qkv, ranges)
    expected = cases.run(reference, [x.float() for x in qkv], ranges)
    for key, value in expected.items():
        assert found[key].isfinite().all()
        assert relative(found[key], value) < 1e-2, key
    assert relative(found["lse"], expected["lse"]) < 1e-4


@gpu
def test_flash_in_float16():
    qkv, ranges = (
        on_gpu((1, 4, 2, 1000), 128, torch.float16),
        to(window(1000, 200, heads=4), "cuda"),
    )
    found = cases.run(module.flash, qkv, ranges)
    expected = cases.run(reference, [x.float() for x in qkv], ranges)
    for key, value in expected.items():
        assert relative(found[key], value) < 2e-3, key


@gpu
def test_flash_takes_any_layout_and_broadcast_gradients():
    ranges = to(shifted(1024, 256, heads=8), "cuda")
    q, k, v = on_gpu((2, 8, 2, 1024), 64)
    rows_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    odd = [torch.cat([x, x[..., :3]], -1)[..., :64] for x in (q, k, v)]
    shared = [q, *(x[:1].expand(2, -1, -1, -1) for x in (k, v))]
    for inputs in (rows_first, odd, shared):
        leaves = [x.detach().requires_grad_() for x in inputs]
        exact = [x.detach().float().requires_grad_() for x in inputs]
        for loss in (
            lambda o, s: o.float().sum(),
            lambda o, s: s.sum(),
            lambda o, s: o.float().mean(2).square().sum() + s.square().sum(),
        ):
            found, right = (
                torch.autograd.grad(loss(*f(*x, ranges, 0.125)), x, allow_unused=True)
                for f, x in ((module.flash, leaves), (reference, exact))
            )
            # Without a gradient of the output, the values have one that is zero.
            for a, b in zip(found, right, strict=True):
                if b is not None and b.norm() > 1e-3:
                    assert relative(a, b) < 2e-2


@gpu
@pytest.mark.parametrize("name", ["window", "shifted chunks", "documents"])
def test_flash_gradients_are_the_same_again_where_torch_asks_for_it(name):
    build, shape = GPU_CASES[name]
    qkv, ranges = on_gpu(shape, 128), to(build(), "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (cases.run(module.flash, qkv, ranges) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    expected = cases.run(reference, [x.float() for x in qkv], ranges)
    for key, value in first.items():
        assert value.equal(second[key]), key
        assert relative(value, expected[key]) < 1e-2, key
