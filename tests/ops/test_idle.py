"""Padding may hold anything, NaN included, whatever the kernel, forward and backward."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from tests.ops.cases import CASES, key_ranges, make_qkv

import longspan as ls
from longspan.ops import empty
from longspan.ops.capability import KERNELS
from longspan.ops.kernels.reference import reference
from longspan.ops.kernels.tiled import tiled

PATTERNS = ["causal()", "window(9, causal=false)", "strided(3) | window(4)", "longnet([8], [1])"]
NATIVE = next(kernel for kernel in KERNELS if kernel.name == "native")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("impl", ["native", "tiled", "reference"])
def test_what_padding_holds_changes_nothing(impl, text, value):
    draw = torch.Generator().manual_seed(0)
    segments = torch.zeros(2, 40, dtype=torch.int64)
    segments[0, :7], segments[1, 20:33], segments[1, 33:] = -1, 1, -1
    given = [torch.randn(2, heads, 40, 16, generator=draw) for heads in (4, 2, 2)]
    why = NATIVE.reasons(*given, _one_range(), use_lse=True)
    if impl == "native" and why:
        pytest.skip("; ".join(why))
    slope = torch.randn(2, 4, 40, 16, generator=draw)

    def found(inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        out, lse = ls.attend(*inputs, text, segments=segments, return_lse=True, impl=impl)
        return [out, lse, *torch.autograd.grad(out, inputs, slope)]

    wanted = found(given)
    padding = (segments < 0)[:, None, :, None]
    held = found([x.masked_fill(padding, value) for x in given])
    assert all(torch.equal(a, b) for a, b in zip(held, wanted, strict=True))
    assert all(x.isfinite().all() for x in held[2:])


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_rows_of_any_layout_may_hold_anything(impl):
    segments = torch.zeros(1, 30, dtype=torch.int64)
    segments[0, 20:] = -1
    table = torch.randn(2, 30, 3, 9).double()
    q = table.transpose(1, 2)[..., 1:]
    k = table[:, :, :1, :8].transpose(1, 2).expand(-1, 3, -1, -1)
    v = torch.randn(30, 8).double().expand(2, 3, -1, -1)
    wanted = ls.attend(q, k, v, "window(6)", segments=segments, impl=impl)
    held = [x.masked_fill((segments < 0)[:, None, :, None], math.nan) for x in (q, k, v)]
    for given in ((held[0], k, v), (q, held[1], v), (q, k, held[2])):
        found = ls.attend(*given, "window(6)", segments=segments, impl=impl)
        torch.testing.assert_close(found, wanted)
    table[:, 20:] = math.nan
    found = ls.attend(q, k, v, "window(6)", segments=segments, impl=impl)
    torch.testing.assert_close(found, wanted)


def _one_range():
    return key_ranges(np.zeros(40), np.full(40, 40), heads=4, keys=40)


@pytest.mark.parametrize("kernel", [tiled, reference])
def test_rows_that_see_nothing_take_any_gradient(kernel):
    lo, hi = np.zeros(50), np.arange(50) + 1
    hi[::3] = 0
    ranges = key_ranges(lo, hi, heads=2, keys=50)
    q, k, v = (torch.randn(1, 2, 50, 8).double().requires_grad_() for _ in range(3))
    slope = torch.randn(1, 2, 50, 8).double()
    out, lse = kernel(q, k, v, ranges, 0.3)
    wanted = torch.autograd.grad(out, (q, k, v), slope, retain_graph=True)
    nothing = torch.zeros_like(lse)
    slope[:, :, ::3], nothing[:, :, ::3] = math.nan, math.nan
    for have, want in zip(
        torch.autograd.grad((out, lse), (q, k, v), (slope, nothing)), wanted, strict=True
    ):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_idle_rows_are_those_without_a_pair(case):
    ranges = case.ranges()
    seen = ranges.mask_GNM()[ranges.group_BH].expand(case.B, -1, -1, -1)
    wanted = (~seen.any(3), ~seen.any(2).unflatten(1, (case.K, -1)).any(2))
    q, k, _ = make_qkv(case)
    for index, want in zip(empty.idle_rows(ranges, q, k), wanted, strict=True):
        have = torch.zeros_like(want)
        if index is not None:
            have[index] = True
        assert torch.equal(have, want)


def test_rows_are_copied_only_if_they_must_be():
    x = torch.randn(1, 2, 5, 3)
    row = empty.index_of(torch.tensor([[[False, True, False, False, True]]]))
    assert empty.quiet(x, None) is x
    assert empty.quiet(x, row) is x
    x[0, 1, 4, 2] = math.nan
    found = empty.quiet(x, row)
    assert (found[:, :, [1, 4]] == 0).all()
    assert x[0, 1, 4, 2].isnan()


def test_idle_rows_are_looked_for_only_where_numbers_are_not_finite(monkeypatch):
    looked = []
    module = importlib.import_module("longspan.ops.kernels.tiled")
    real = module.idle_rows
    monkeypatch.setattr(module, "idle_rows", lambda *given: looked.append(1) or real(*given))
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (1, 300, 300))
    ls.attend(q, k, v, "window(20)", impl="tiled").sum().backward()
    assert not looked
    with torch.no_grad():
        v[:, :, 299] = math.nan
    assert ls.attend(q, k, v, "window(20)", impl="tiled").isnan().all()
    assert looked
