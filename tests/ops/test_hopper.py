"""The Hopper kernel: refusals, and results on a GPU."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from tests.ops import cases
from tests.ops.cases import On
from tests.ops.test_flex import gpu, relative, scattered, shifted, tensors, to, window
from tests.ops.test_hopper_plan import (
    alternating,
    for_each_row,
    forget_plans,
    gaps,
    split_keys,
)

import longspan as ls
from longspan.errors import Refusal
from longspan.ops import capability
from longspan.ops.kernels import _hopper_calls, _hopper_parts, _hopper_plan
from longspan.ops.ranges import KeyRanges

module = importlib.import_module("longspan.ops.kernels.hopper")


# Refusals, and where ``auto`` takes it.


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(module, "missing_gluon", lambda: None)


def test_a_named_kernel_refuses_without_a_gpu():
    q, k, v = tensors(1, 2, 1, 4, 4, 16, 16)
    with pytest.raises(Refusal, match="runs on cuda"):
        ls.attend(q, k, v, "window(2)", impl="hopper")
    with pytest.raises(Refusal, match="hopper cannot run here: hopper needs CUDA tensors"):
        module.hopper(q, k, v, window(4, 2), 0.25)


@pytest.mark.parametrize(
    ("q", "v", "word"),
    [
        (On(1, 4, 500, 64), On(1, 2, 500, 64), None),
        (On(1, 4, 500, 128, dtype=torch.float16), On(1, 2, 500, 64), None),
        (On(1, 4, 500, 8), On(1, 2, 500, 104), None),
        (On(1, 4, 500, 64, grad=True), On(1, 2, 500, 64, grad=True), None),
        (On(1, 4, 500, 64, dtype=torch.float32), On(1, 2, 500, 64), "bfloat16"),
        (On(1, 4, 500, 60), On(1, 2, 500, 64), "got 60"),
        (On(1, 4, 500, 64), On(1, 2, 500, 136), "values of 136"),
        (On(1, 4, 0, 64), On(1, 2, 500, 64), "at least one query and one key; got 0 and 500"),
        (On(2, 4, 500, 64), On(1, 2, 500, 64), None),
        (On(2, 4, 500, 64, grad=True), On(1, 2, 500, 64), None),
        (On(2, 4, 500, 64), On(2, 2, 500, 64), "or both of one; got 1 and 2 for 2"),
        (On(1, 4, 500, 64), On(2, 2, 500, 64), "or both of one; got 1 and 2 for 1"),
    ],
)
def test_reasons(on_hopper, q, v, word):
    found = module.reasons(q, On(1, 2, 500, q.shape[-1]), v, window(500, 100, heads=4))
    assert found == [] if word is None else word in " ".join(found)


@pytest.mark.parametrize(("rows", "keys"), [(0, 500), (500, 0)])
def test_no_queries_or_no_keys(on_hopper, rows, keys):
    lo_GNm = torch.zeros(1, rows, 1, dtype=torch.int32)
    ranges = KeyRanges(lo_GNm, lo_GNm, torch.zeros(1, 4, dtype=torch.int64), keys)
    q, k = On(1, 4, rows, 64, grad=True), On(1, 2, keys, 64)
    (found,) = module.reasons(q, k, k, ranges)
    assert f"got {rows} and {keys}" in found


def test_ranges_are_counted_only_where_nothing_else_is_wrong(on_hopper, monkeypatch):
    for name in ("most_tiles", "most_entries"):
        monkeypatch.setattr(module, name, lambda _: pytest.fail("counted"))
    q = On(1, 4, 500, 64, dtype=torch.float32, grad=True)
    (found,) = module.reasons(q, q, q, window(500, 100, heads=4))
    assert "bfloat16" in found


def test_reasons_of_the_machine(on_hopper, monkeypatch):
    q, k = On(1, 4, 500, 64), On(1, 2, 500, 64)
    ranges = window(500, 100, heads=4)
    monkeypatch.setattr(module, "missing_gluon", lambda: "no Gluon")
    assert module.reasons(q, k, k, ranges) == ["no Gluon"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    (found,) = module.reasons(q, k, k, ranges)
    assert "10.0" in found


def test_too_many_tiles(on_hopper, monkeypatch):
    q, k = On(1, 4, 512, 64), On(1, 2, 512, 64)
    # Two tiles for all rows but the first ones, where five might be needed.
    for most, word in ((7, None), (6, "too long")):
        monkeypatch.setattr(_hopper_plan, "MOST_TILES", most)
        monkeypatch.setattr(module, "MOST_TILES", most)
        found = module.reasons(q, k, k, window(512, 100, heads=4))
        assert found == [] if word is None else word in found[0]


def test_too_many_tasks(on_hopper, monkeypatch):
    q, k = On(3, 4, 512, 64, grad=True), On(3, 2, 1024, 64)
    ranges = window(512, 100, keys=1024, heads=4)
    for most, word in ((96, None), (95, "12 times 1,024 rows")):
        monkeypatch.setattr(module, "MOST_TASKS", most)
        found = module.reasons(q, k, k, ranges)
        assert found == [] if word is None else word in found[0]


def test_gluon_is_missing_where_triton_is(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    found = module.missing_gluon.__wrapped__()
    assert "Triton is not installed" in found
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (8 + at, 0))
    monkeypatch.setattr(module, "missing_gluon", lambda: found)
    assert module.why_no_hopper() == found
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert module.why_no_hopper() is None


@pytest.mark.parametrize("gradients", [False, True])
def test_auto_takes_it_for_windows(on_hopper, gradients):
    q, k = On(1, 4, 32768, 128), On(1, 2, 32768, 128)
    q.requires_grad = gradients
    ranges = window(32768, 1024, heads=4)
    assert capability.choose("auto", q, k, k, ranges).name == "hopper"


# Results on a GPU.


def here():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    if why := module.missing_gluon():
        pytest.skip(why)


def compare(ranges, q, k, v, scale=0.125, **tolerance):
    """Output and log-sum-exp against dense attention in float32."""
    out, lse = module.hopper(q, k, v, ranges, scale)
    expected, expected_lse = for_each_row(*(x.float() for x in (q, k, v)), ranges, scale)
    seen = expected_lse > -math.inf
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert (lse[~seen] == -math.inf).all()
    assert (out[~seen] == 0).all()
    assert relative(out, expected) < (2e-3 if q.dtype == torch.float16 else 1e-2)
    assert (lse[seen] - expected_lse[seen]).abs().max() < 2e-3 if seen.any() else True
    # No row is far off alone.
    assert (out - expected).abs().max() < 0.05
    return out, lse


def few_queries() -> KeyRanges:
    """Three rows over 5,000 keys, of which one batch row has padding and the other a segment that
    one row sees nothing of."""
    hi = np.array([[5000, 5000, 5000], [2700, 2700, 0]])
    lo = np.array([[700, 700, 701], [13, 2500, 0]])
    return cases.key_ranges(lo, hi, np.repeat([[0], [1]], 8, 1), heads=8, keys=5000)


# Batch rows that share one row of keys.
SHARED = {
    **{
        f"{batch} rows share, {width}": (
            lambda b=batch: scattered(512, 640, ranges=2, groups=5, batch=b, heads=8, seed=b),
            (batch, 8, 2, 512, 640, width, width),
        )
        for batch in (1, 2, 8)
        for width in (64, 128)
    },
    "rows share, alike": (lambda: window(1001, 130, heads=4), (5, 4, 1, 1001, 1001, 128, 128)),
    "rows share, odd": (lambda: cases.segments(333, 3, 6, 0), (3, 6, 2, 333, 333, 96, 80)),
    "rows share, gaps": (gaps, (2, 4, 2, 700, 700, 64, 64)),
    "rows share, few": (lambda: window(17, 60, keys=250, heads=4), (9, 4, 2, 17, 250, 128, 128)),
}
GPU_CASES = {
    **SHARED,
    "window": (lambda: window(512, 200, heads=4), (1, 4, 2, 512, 512, 64, 64)),
    "window of 128": (lambda: window(1024, 300, heads=4), (1, 4, 1, 1024, 1024, 128, 128)),
    "odd, 96": (lambda: window(777, 200, heads=4), (2, 4, 2, 777, 777, 96, 96)),
    "odd, 128": (lambda: window(1001, 130, heads=6), (2, 6, 2, 1001, 1001, 128, 128)),
    "causal": (lambda: cases.causal(1153, 2), (1, 2, 2, 1153, 1153, 128, 128)),
    "dense": (lambda: cases.dense(300, 2, 700), (2, 2, 1, 300, 700, 128, 128)),
    "per head": (lambda: shifted(1024, 256, heads=8), (1, 8, 2, 1024, 1024, 128, 128)),
    "scca": (lambda: cases.scca_flow(900, 8, 200), (1, 8, 2, 900, 900, 64, 64)),
    "sink": (lambda: cases.sink_window(900, 4, 130, 200), (1, 4, 2, 900, 900, 128, 128)),
    "segments": (lambda: cases.segments(901, 2, 4, 0), (2, 4, 2, 901, 901, 64, 64)),
    **{
        f"{m} ranges": (
            lambda m=m: scattered(512, 640, ranges=m, groups=5, batch=2, heads=8, seed=m),
            (2, 8, 2, 512, 640, 128, 128),
        )
        for m in (1, 3, 5)
    },
    "blocks of 64": (lambda: alternating(1000, 4096, 9, 4), (1, 4, 2, 1000, 4096, 128, 128)),
    "blocks of 64, few": (lambda: alternating(1400, 1024, 9, 4), (1, 4, 1, 1400, 1024, 64, 64)),
    "blocks of 64, many": (lambda: alternating(900, 2048, 20, 8), (2, 8, 2, 900, 2048, 128, 128)),
    "blocks of 64, wider values": (
        lambda: alternating(700, 1024, 5, 4),
        (1, 4, 2, 700, 1024, 64, 128),
    ),
    "wider keys": (lambda: window(300, 77, heads=4), (1, 4, 4, 300, 300, 96, 80)),
    "wider values": (lambda: window(300, 77, heads=4), (1, 4, 4, 300, 300, 64, 128)),
    "narrow": (lambda: window(300, 77, heads=4), (1, 4, 4, 300, 300, 8, 24)),
    "few rows": (lambda: window(17, 60, keys=250, heads=4), (1, 4, 2, 17, 250, 64, 64)),
    "one query": (lambda: window(1, 900, keys=1000, heads=8), (2, 8, 2, 1, 1000, 128, 128)),
    # Split by keys.
    "one query, many keys": (
        lambda: window(1, 4000, keys=4000, heads=8),
        (1, 8, 2, 1, 4000, 128, 128),
    ),
    **{
        f"few queries, {width}": (few_queries, (2, 8, 2, 3, 5000, width, width))
        for width in (64, 96, 128)
    },
    "global rows": (lambda: cases.dense(130, 8, 9000), (1, 8, 2, 130, 9000, 128, 128)),
    "one key": (lambda: window(1, 1, heads=2), (1, 2, 1, 1, 1, 128, 128)),
    "all empty": (lambda: window(200, 0, heads=4), (1, 4, 2, 200, 200, 64, 64)),
    "gaps": (gaps, (1, 4, 2, 700, 700, 128, 128)),
    "gaps, narrow": (gaps, (1, 4, 2, 700, 700, 64, 64)),
    "many tasks": (lambda: window(12_001, 300, heads=4), (1, 4, 1, 12_001, 12_001, 128, 128)),
}


def on_gpu(name, dtype):
    """Ranges, queries, keys and values of a case."""
    build, shape = GPU_CASES[name]
    q, k, v = (x.to("cuda", dtype) for x in tensors(*shape))
    return to(build(), "cuda"), q, *(x[:1] if name in SHARED else x for x in (k, v))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_equals_the_oracle(name, dtype):
    here()
    compare(*on_gpu(name, dtype))


@gpu
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("name", GPU_CASES)
def test_few_programs_go_through_all_tasks(name, programs, monkeypatch):
    here()
    monkeypatch.setattr(_hopper_calls, "processors", lambda _: programs)
    compare(*on_gpu(name, torch.bfloat16))


@gpu
@pytest.mark.parametrize("parts", [2, 7, 32])
@pytest.mark.parametrize("name", GPU_CASES)
def test_parts_of_the_keys(name, parts, monkeypatch):
    here()
    given = on_gpu(name, torch.bfloat16)
    monkeypatch.setattr(_hopper_parts, "PROGRAMS", 0)
    forget_plans(monkeypatch)
    whole = compare(*given)
    split_keys(monkeypatch, parts)
    found = compare(*given)
    assert relative(found[0], whole[0].double()) < 5e-3
    seen = whole[1] > -math.inf
    torch.testing.assert_close(found[1][seen], whole[1][seen], rtol=1e-5, atol=1e-4)


@gpu
@pytest.mark.parametrize("width", [64, 96, 128])
def test_one_query_of_a_decoding_step_is_split(width):
    here()
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(2, 8, 2, 1, 4000, width, width))
    made = _hopper_plan.plan_of(to(cases.dense(1, 8, 4000), "cuda"), (2, 8), (2, 2), 512)
    assert made.parts == 2
    for pattern in ("causal()", "window(3000) | sink(100)"):
        found = ls.attend(q, k, v, pattern, impl="hopper", return_lse=True)
        wide = (x.float() for x in (q, k, v))
        expected = ls.attend(*wide, pattern, impl="reference", return_lse=True)
        assert relative(found[0], expected[0]) < 1e-2
        assert (found[1] - expected[1]).abs().max() < 2e-3


def bit_identical_also_when_captured(q, k, v, ranges):
    expected = module.hopper(q, k, v, ranges, 0.125)
    for _ in range(20):
        for a, b in zip(module.hopper(q, k, v, ranges, 0.125), expected, strict=True):
            assert torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module.hopper(q, k, v, ranges, 0.125)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@gpu
def test_parts_are_bit_identical_and_can_be_captured():
    here()
    ranges = to(few_queries(), "cuda")
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(2, 8, 2, 3, 5000, 128, 128))
    assert module._ready(q, k, v, ranges, 0.125, backward=False).rows.plan.parts > 1
    bit_identical_also_when_captured(q, k, v, ranges)
    # Rows of padding, NaN among keys that nobody sees, and one in a part of the seen ones.
    k[1, :, 2700:], v[1, :, 2700:] = math.nan, math.nan
    out, lse = module.hopper(q, k, v, ranges, 0.125)
    assert torch.equal(out[1, :, 2], torch.zeros_like(out[1, :, 2]))
    assert (lse[1, :, 2] == -math.inf).all()
    k[0, :, 4000] = math.nan
    out, lse = module.hopper(q, k, v, ranges, 0.125)
    assert out[0].isnan().all()
    assert lse[0].isnan().all()


@gpu
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_shared_cases(case):
    here()
    qkv = [x.repeat(1, 1, 1, -(-8 // x.shape[3])) for x in cases.make_qkv(case)]
    q, k, v = (x[..., : x.shape[3] // 8 * 8].contiguous().to("cuda", torch.bfloat16) for x in qkv)
    compare(to(case.ranges(), "cuda"), q, k, v)


@gpu
def test_scales_of_any_sign():
    here()
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 4, 2, 300, 300, 64, 64))
    for scale in (-0.125, 0.0, 1e-4):
        compare(to(window(300, 77, heads=4), "cuda"), q, k, v, scale)


@gpu
def test_results_lie_in_memory_as_the_queries_and_any_layout_will_do():
    here()
    ranges = to(window(300, 77, heads=4), "cuda")
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(2, 4, 2, 300, 300, 64, 64))
    expected = compare(ranges, q, k, v)
    rows_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    odd = [torch.cat([x, x[..., :3]], -1)[..., :64] for x in (q, k, v)]
    turned = [x.mT.contiguous().mT for x in (q, k, v)]
    padded = [torch.cat([x, x], -1)[..., 64:] for x in (q, k, v)]
    for inputs in (rows_first, odd, turned, padded):
        for a, b in zip(module.hopper(*inputs, ranges, 0.125), expected, strict=True):
            assert torch.equal(a, b)
    assert module.hopper(*rows_first, ranges, 0.125)[0].stride() == rows_first[0].stride()
    shared = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    out, _ = module.hopper(*shared, ranges, 0.125)
    assert torch.equal(out, expected[0][:1].expand_as(out))


DOCUMENTS = torch.tensor([0] * 700 + [1] * 900 + [2] * 448)
# Of several passes, of views, and packed documents, without and with rows of padding.
LAID_OUT: tuple[tuple[str, dict[str, torch.Tensor]], ...] = (
    ("dilated(300, 8)", {}),
    ("dilated(300, [1, 2, 4, 8])", {}),
    ("ssa(256, 8)", {}),
    # Queries are views, keys are shared by their remainders.
    ("sda.neighborhood(1024, 8)", {}),
    ("window(100) | sda.neighborhood(512, 4)", {}),
    ("longnet([256, 1024], [1, 4])", {}),
    ("longformer(200, tokens=[0, 100, 900])", {}),
    # A pass of three rows among all others.
    ("window(200) | global(0, 700, 1500)", {}),
    ("window(400)", {"segments": DOCUMENTS}),
    ("window(400)", {"segments": DOCUMENTS - 1}),
)


@gpu
@pytest.mark.parametrize("parts", [1, 3])
def test_passes_views_and_packed_documents(parts, monkeypatch):
    here()
    if parts > 1:
        split_keys(monkeypatch, parts)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 8, 2, 2048, 2048, 64, 64))
    for pattern, rows in LAID_OUT:
        found, expected = (
            ls.attend(*inputs, pattern, impl=impl, return_lse=True, **rows)
            for inputs, impl in (
                ((q, k, v), "hopper"),
                ((q.float(), k.float(), v.float()), "reference"),
            )
        )
        seen = expected[1] > -math.inf
        assert (found[1][~seen] == -math.inf).all()
        assert relative(found[0], expected[0]) < 1e-2, pattern
        assert (found[1][seen] - expected[1][seen]).abs().max() < 5e-3, pattern


def nothing_leaks(given, pattern, times, change):
    """Rows before a time are the same to the bit, whatever is changed from there on."""
    before = ls.attend(*given, pattern, impl="hopper", return_lse=True)
    for t in times:
        later = [x.clone() for x in given]
        change(*(x[:, :, t:] for x in later))
        after = ls.attend(*later, pattern, impl="hopper", return_lse=True)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, :, :t], b[:, :, :t])


@gpu
def test_nothing_leaks_from_later_tokens():
    here()
    given = [x.to("cuda", torch.bfloat16) for x in tensors(1, 8, 2, 1500, 1500, 128, 128)]

    def change(*later):
        for x in later:
            x.normal_()

    for pattern in ("window(400)", "causal()", "scca.flow(256)", "window(100) | sink(5)"):
        nothing_leaks(given, pattern, (1, 700, 1499), change)


def rising(shape, dtype, slope, every=1):
    """Logits that rise by ``slope`` from tile to tile of keys, in each ``every``-th row."""
    q, k, v = tensors(*shape)
    q[..., 0] = torch.where(torch.arange(q.shape[2]) % every == 0, 8.0, 0.0)
    k[..., 0] = slope * (torch.arange(k.shape[2]) // 128)
    return [x.to("cuda", dtype) for x in (q, k, v)]


@gpu
@pytest.mark.parametrize("every", [1, 37])
@pytest.mark.parametrize("slope", [-30.0, -3.0, 3.0, 9.0, 30.0, 200.0])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_logits_far_beyond_those_of_the_first_tile(dtype, width, slope, every):
    here()
    n, keys, heads = 1500, 1536, 4
    # Each weight is rounded once, and no value is beyond 5; sums of products in float32 lose 2^-20
    # of the greatest logits.
    unit = torch.finfo(dtype).eps / 2
    atol = min(2e-2, 5 * (unit + 2**-19 * 11 * abs(slope)))
    for ranges in (
        window(n, 900, keys=keys, heads=heads),
        alternating(n, keys, 9, heads),
        cases.dense(n, heads, keys),
    ):
        q, k, v = rising((1, heads, 2, n, keys, width, width), dtype, slope, every)
        out, lse = module.hopper(q, k, v, to(ranges, "cuda"), 0.125)
        wide = (x.double() for x in (q, k, v))
        expected, expected_lse = for_each_row(*wide, to(ranges, "cuda"), 0.125)
        seen = expected_lse > -math.inf
        torch.testing.assert_close(out.double(), expected, rtol=min(1e-2, 2 * unit), atol=atol)
        torch.testing.assert_close(lse[seen].double(), expected_lse[seen], rtol=1e-5, atol=1e-3)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_later_logits_beyond_all_earlier_ones_do_not_move_a_bit(dtype):
    here()

    def change(q, k, _):
        q[..., 0], k[..., 0] = 30.0, 900.0

    for slope in (2.0, 6.5, 40.0):
        given = rising((1, 8, 2, 1500, 1500, 128, 128), dtype, slope, 3)
        for pattern in ("window(900)", "causal()", "scca.flow(512)"):
            nothing_leaks(given, pattern, (5, 700, 1450), change)


@gpu
def test_nan_is_not_hidden_and_rows_without_keys_have_none():
    here()
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 2, 1, 300, 300, 64, 64))
    ranges = to(cases.segments(300, 1, 2, 0), "cuda")
    empty = ranges.lo_GNm[0, :, 0] == ranges.hi_GNm[0, :, 0]
    assert empty.any()
    v[:, :, 0] = math.nan
    out, lse = module.hopper(q, k, v, ranges, 0.125)
    assert (out[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == -math.inf).all()
    q[:, :, 299] = math.nan
    out, lse = module.hopper(q, k, v, ranges, 0.125)
    assert out[:, :, 299].isnan().all()
    assert lse[:, :, 299].isnan().all()


@gpu
def test_runs_are_bit_identical_and_can_be_captured():
    here()
    ranges = to(window(4000, 500, heads=8), "cuda")
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 8, 2, 4000, 4000, 128, 128))
    bit_identical_also_when_captured(q, k, v, ranges)


@gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits():
    here()
    n, heads, width = 1 << 20, 2049, 8
    if torch.cuda.mem_get_info()[0] < 100 << 30:
        pytest.skip("needs 100 GiB")
    q = torch.empty(1, heads, n, width, device="cuda", dtype=torch.bfloat16).normal_()
    k, v = (torch.randn(1, 1, n, width, device="cuda").to(q.dtype) for _ in range(2))
    ranges = to(window(n, 64, heads=heads), "cuda")
    out, lse = module.hopper(q, k, v, ranges, 0.5)
    assert lse.numel() > 1 << 31
    for head in (0, 1025, heads - 1):
        for row in (0, n // 2 + 1, n - 1):
            keys = slice(max(0, row - 63), row + 1)
            s = k[0, 0, keys].float() @ q[0, head, row].float() * 0.5
            expected = s.softmax(0) @ v[0, 0, keys].float()
            assert relative(out[0, head, row], expected) < 1e-2
            assert abs(lse[0, head, row] - s.logsumexp(0)) < 1e-3
