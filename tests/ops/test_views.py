"""Residue orders as views give what gathered rows give, and copy nothing on the way in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.ops.test_flex import gpu

import longspan as ls
from longspan.ops.kernels import tiled
from longspan.ops.kernels.reference import reference
from longspan.ops.loading import load
from longspan.ops.merge import merge_parts
from longspan.ops.views import views_of

PATTERNS = [
    "dilated(64, 4)",
    "neighborhood(65, dilation=4)",
    "diagonals(4)",
    "heads(dilated(64, 4), dilated(50, 4))",
]


def through_views(q, k, v, one, *, like_queries):
    views = views_of(one, q.shape[2], k.shape[2], q.device)
    assert views is not None
    own = views.inputs(q, k, v)
    assert all(
        x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
        for x, y in zip(own, (q, k, v), strict=True)
    )
    out, lse = reference(*own, views.ranges, 0.3)
    if like_queries:
        # Kernels write row after row of all heads, or in the layout of the queries.
        out = out.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        part = views.outputs(out, lse)
        assert part.order is None
    else:
        part = views.outputs(out.transpose(1, 2).contiguous().transpose(1, 2), lse)
        assert part.order is not None
    return merge_parts([part])


@pytest.mark.parametrize("like_queries", [True, False])
@pytest.mark.parametrize("text", PATTERNS)
def test_views_equal_the_reference(text, like_queries):
    plan = ls.plan(ls.parse(text), 512, 4)
    (one,) = plan.passes
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 512, 8, generator=make, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    found = through_views(q, k, v, one, like_queries=like_queries)
    wanted = ls.attend(q, k, v, plan, impl="reference", scale=0.3, return_lse=True)
    slopes = [torch.randn(x.shape, generator=make, dtype=torch.float64) for x in wanted]
    grads = [torch.autograd.grad(x, (q, k, v), slopes) for x in (found, wanted)]
    for a, b in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("text", ["sda.neighborhood(64, 4)", "sda.neighborhood(32, 8) | sink(1)"])
def test_shared_keys_equal_the_reference(text):
    plan = ls.plan(ls.parse(text), 512, 4)
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 512, 8, generator=make, dtype=torch.float64) for heads in (4, 2, 2)
    )
    parts, seen = [], 0
    for one in plan.passes:
        loaded = load(one, q, k)
        views = views_of(one, 512, 512, q.device, loaded.keys)
        own = loaded if views is None else views
        own_q, own_k, own_v = own.inputs(q, k, v)
        seen += views is not None
        if views is not None:
            assert own_q.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
            assert len(own_k) == len(own_v) == 1
        batch = len(own_q)
        many = (x.expand(batch, -1, -1, -1) for x in (own_k, own_v))
        parts.append(own.outputs(*reference(own_q, *many, own.ranges, 0.3)))
    assert seen
    wanted = ls.attend(q, k, v, plan, impl="reference", scale=0.3, return_lse=True)
    for a, b in zip(merge_parts(parts), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("text", PATTERNS)
def test_tiled_writes_in_place(text, threads, monkeypatch):
    monkeypatch.setattr(tiled, "_WORTH_THREADS", 0)
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    plan = ls.plan(ls.parse(text), 512, 4)
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 512, 8, generator=make, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    results = []
    try:
        for impl in ("tiled", "reference"):
            found = ls.attend(q, k, v, plan, impl=impl, return_lse=True)
            loss = found[0].sin().sum() + found[1].cos().sum()
            results.append((*found, *torch.autograd.grad(loss, (q, k, v))))
    finally:
        torch.set_num_threads(kept)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert all(x.is_contiguous() for x in results[0])
    # The future leaves the past as it was, to the bit.
    if plan.pattern.is_causal:
        later = torch.arange(512)[:, None] >= 300
        new = [x.detach().where(~later, torch.randn(512, 8, dtype=x.dtype)) for x in (q, k, v)]
        out = ls.attend(*new, plan, impl="tiled")
        assert torch.equal(out[:, :, :300], results[0][0][:, :, :300])


def test_no_views_where_remainders_mix():
    mixed = [
        "sda.neighborhood(64, 4)",
        "strided(4)",
        "window(9)",
        "ssa(64, 4)",
        "longnet([64, 256], [1, 4])",
    ]
    for text in mixed:
        for one in ls.plan(ls.parse(text), 512, 4).passes:
            assert views_of(one, 512, 512, torch.device("cpu")) is None
    # A length that the step does not divide, and packed documents.
    (ragged,) = ls.plan(ls.parse("dilated(64, 4)"), 511, 4).passes
    assert views_of(ragged, 511, 511, torch.device("cpu")) is None
    packed = ls.plan(ls.parse("dilated(64, 4)"), 512, 4, segments=np.arange(512)[None] // 300)
    assert all(views_of(one, 512, 512, torch.device("cpu")) is None for one in packed.passes)


@gpu
@pytest.mark.parametrize(
    "text", [*PATTERNS, "longnet([64, 256], [1, 4])", "ssa(64, 8)", "sda.neighborhood(64, 4)"]
)
@pytest.mark.parametrize("n", [512, 509])
def test_on_a_gpu(text, n):
    make = torch.Generator("cuda").manual_seed(0)
    given = [torch.randn(1, heads, n, 64, generator=make, device="cuda") for heads in (8, 2, 2)]
    slope = torch.randn(1, 8, n, 64, generator=make, device="cuda")
    results = []
    for dtype, impl in ((torch.float64, "reference"), (torch.bfloat16, "flex")):
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in given]
        out = ls.attend(*inputs, text, impl=impl)
        with torch.no_grad():
            alone = ls.attend(*inputs, text, impl=impl)
        results.append([alone, out, *torch.autograd.grad(out, inputs, slope.to(dtype))])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()
