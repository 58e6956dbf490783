"""Blocks of 64: taking ranges apart on any device, the joined kernel over stand-ins for the
library, results and gradients on a GPU; and when ``auto`` picks it."""

from __future__ import annotations

import importlib
import math
import sys
import types

import numpy as np
import pytest
import torch
from tests.ops import block_sparse, cases
from tests.ops.cases import On
from tests.ops.test_flex import gpu, regrouped, relative, scattered, tensors, to, window

import longspan as ls
from longspan.errors import Refusal
from longspan.ops import capability, measured, whole_blocks
from longspan.ops.kernels.reference import reference
from longspan.ops.loading import load
from longspan.ops.ranges import KeyRanges

module = importlib.import_module("longspan.ops.kernels.cudnn_blocks")
S = whole_blocks.SIZE


def planned(pattern, n, heads):
    """The ranges of a pattern of one pass."""
    (one,) = ls.plan(pattern, n, heads).passes
    like = torch.empty(1, heads, n, 1)
    return load(one, like, like).ranges


def random_map(blocks, density, seed=0, *, causal=True):
    rng = np.random.default_rng(seed)
    seen = rng.random((blocks, blocks)) < density
    if causal:
        seen = np.tril(seen)
        np.fill_diagonal(seen, True)
    return ls.Blocks.of(seen, S, causal)


def mixed(n, keys):
    """Whole blocks, ranges that shift from row to row, rows and blocks of rows without any."""
    lo = torch.tensor([[0, 128, 320], [0, 64, 0], [5, 64, 0], [0, 0, 0]]).int()
    hi = torch.tensor([[64, 256, 384], [0, 300, 0], [60, 320, 0], [0, 0, 0]]).int()
    which = torch.arange(n) // S % len(lo)
    lo, hi = lo[which].clone(), hi[which].clone()
    row = torch.arange(n) % S
    # The second block of rows begins later from row to row, as a window does.
    lo[:, 1] += torch.where(which == 1, row, 0).int()
    lo, hi = lo.clamp(max=keys), hi.clamp(max=keys)
    # The first range of the second block is unused: unused ranges come last.
    order = (lo >= hi).int().argsort(dim=-1, stable=True)
    lo, hi = (x.gather(-1, order) for x in (lo, hi))
    group = torch.zeros(1, 4, dtype=torch.int64)
    return KeyRanges(lo[None], torch.maximum(lo, hi)[None], group, keys)


SPLIT = {
    "causal blocks": lambda: planned(random_map(8, 0.3), 8 * S, 4),
    "whole blocks": lambda: planned(random_map(8, 0.4, causal=False), 8 * S, 4),
    "blocks per head": lambda: planned(
        ls.PerHead(*(random_map(6, 0.3, seed) for seed in range(4))), 6 * S, 4
    ),
    "big bird": lambda: planned(
        ls.RandomBlocks(S, 2) | ls.BandBlocks(S, 1, 0) & ls.Causal(), 10 * S, 4
    ),
    "causal": lambda: cases.causal(8 * S, 4),
    "window": lambda: window(12 * S, 300, heads=4),
    "mixed": lambda: mixed(8 * S, 6 * S),
    "random edges": lambda: scattered(6 * S, 5 * S, ranges=3, groups=3, batch=2, heads=4),
    "per batch row": lambda: regrouped(
        scattered(6 * S, 5 * S, ranges=2, groups=2, batch=1, heads=1), [[0] * 4, [1] * 4]
    ),
}


@pytest.mark.parametrize("name", SPLIT)
def test_blocks_and_edges_are_the_ranges(name, monkeypatch):
    ranges = SPLIT[name]()
    found = whole_blocks._split(ranges)
    mask = ranges.mask_GNM()
    tiles = mask.unflatten(2, (-1, S)).unflatten(1, (-1, S)).transpose(2, 3)
    if found is None:
        whole = tiles.flatten(3).all(-1)[ranges.group_BH].sum() * S**2
        assert 2 * whole <= mask[ranges.group_BH].sum() or name == "random edges"
        return
    blocks = block_sparse.seen(found.index_GQW[None], found.count_GQ[None], S, ranges.keys)[0]
    rest = torch.zeros_like(mask) if found.edges is None else found.edges.mask_GNM()
    assert not (blocks & rest).any()
    assert torch.equal(blocks | rest, mask)
    assert found.has_empty == bool((found.count_GQ == 0).any())
    if found.edges is not None:
        # Used ranges come first and are apart.
        lo, hi = found.edges.lo_GNm, found.edges.hi_GNm
        used = lo < hi
        assert used.any()
        assert (used[..., :-1] | ~used[..., 1:]).all()
        assert (hi[..., :-1] <= lo[..., 1:])[used[..., 1:]].all()


def test_nothing_but_the_diagonal_is_left_of_causal_blocks():
    found = whole_blocks.whole_blocks(planned(random_map(8, 0.3), 8 * S, 4))
    row = torch.arange(8 * S)
    assert found.edges.lo_GNm.shape == (1, 8 * S, 1)
    assert torch.equal(found.edges.lo_GNm[0, :, 0], (row // S * S).int())
    assert torch.equal(found.edges.hi_GNm[0, :, 0], (row + 1).int())
    whole = whole_blocks.whole_blocks(planned(random_map(8, 0.4, causal=False), 8 * S, 4))
    assert whole.edges is None


def test_other_ranges_have_no_blocks():
    assert whole_blocks.whole_blocks(window(8 * S, 100, heads=4)) is None
    assert whole_blocks.whole_blocks(cases.causal(8 * S + 1, 4)) is None
    assert whole_blocks.whole_blocks(window(8 * S, 0, heads=4)) is None


@pytest.mark.parametrize("name", SPLIT)
def test_fill_is_the_share_of_touched_tiles(name):
    ranges = SPLIT[name]()
    found = whole_blocks.fill(ranges)
    if name in ("window", "mixed", "random edges", "per batch row"):
        assert found == 1.0
        return
    mask = ranges.mask_GNM()[ranges.group_BH]
    short = [-x % 128 for x in mask.shape[-2:]]
    tiles = torch.nn.functional.pad(mask, (0, short[1], 0, short[0]))
    touched = tiles.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).any(5).any(3).sum()
    assert found == pytest.approx(float(mask.sum() / (touched * 128**2)))
    assert found < 1


# The joined kernel, over stand-ins.


@pytest.fixture
def library(monkeypatch):
    """Stand-ins for the library, and the reference for what is left over."""
    package = types.ModuleType("cudnn")
    stand_in = types.ModuleType("cudnn.block_sparse_attention")
    stand_in.block_sparse_attention_forward = block_sparse.forward
    stand_in.block_sparse_attention_backward = block_sparse.backward
    monkeypatch.setitem(sys.modules, "cudnn", package)
    monkeypatch.setitem(sys.modules, "cudnn.block_sparse_attention", stand_in)
    monkeypatch.setattr(module, "reasons", lambda *_: [])
    monkeypatch.setattr(module, "cudnn", reference)


TAKEN = [name for name in SPLIT if name not in ("random edges", "per batch row")]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("name", TAKEN)
def test_equals_the_reference_through_the_stand_in(name, key_heads):
    ranges = SPLIT[name]()
    q, k, v = (
        x.double().requires_grad_()
        for x in tensors(2, 4, key_heads, ranges.queries, ranges.keys, 8, 8)
    )
    slope = torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=q.dtype)
    found, expected = (f(q, k, v, ranges, 0.3) for f in (module.cudnn_blocks, reference))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not found[1].requires_grad
    grads, exact = (torch.autograd.grad(x[0], (q, k, v), slope) for x in (found, expected))
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("library")
def test_views_and_gradients_that_sums_broadcast():
    ranges = SPLIT["causal blocks"]()
    inputs = [x.double() for x in tensors(2, 4, 2, 8 * S, 8 * S, 8, 8)]
    # As a projection leaves them: rows of all heads side by side.
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    straight = [x.requires_grad_() for x in inputs]
    found, expected = (
        torch.autograd.grad(f(*x, ranges, 0.3)[0].sum(), x)
        for f, x in ((module.cudnn_blocks, turned), (reference, straight))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("library")
def test_nan_gradients_of_empty_rows_stay_there():
    ranges = SPLIT["mixed"]()
    inputs = [x.double().requires_grad_() for x in tensors(1, 4, 2, 8 * S, 6 * S, 8, 8)]
    out, lse = module.cudnn_blocks(*inputs, ranges, 0.3)
    empty = lse == -math.inf
    assert empty.any()
    poison = torch.full_like(out, math.nan).where(empty[..., None], torch.ones_like(out))
    grads = torch.autograd.grad(out, inputs, poison)
    exact = torch.autograd.grad(reference(*inputs, ranges, 0.3)[0], inputs, poison.nan_to_num(0.0))
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("library")
def test_the_future_changes_nothing():
    ranges = SPLIT["causal blocks"]()
    q, k, v = tensors(1, 4, 2, 8 * S, 8 * S, 8, 8)
    before, _ = module.cudnn_blocks(q, k, v, ranges, 0.3)
    cut = 5 * S + 11
    for x in (q, k, v):
        x[:, :, cut:] = torch.randn_like(x[:, :, cut:])
    after, _ = module.cudnn_blocks(q, k, v, ranges, 0.3)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


# Reasons and the choice.


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    cudnn = importlib.import_module("longspan.ops.kernels.cudnn")
    for one in (cudnn, module):
        monkeypatch.setattr(one, "missing_stack", lambda: None)


def test_a_named_kernel_refuses():
    q, k, v = tensors(1, 2, 1, 4, 4, 16, 16)
    with pytest.raises(Refusal, match="runs on cuda"):
        ls.attend(q, k, v, "window(2)", impl="cudnn_blocks")
    assert "CUDA" in module.reasons(q, k, v, window(4, 2))[0]


@pytest.mark.parametrize(
    ("q", "build", "word"),
    [
        (On(1, 4, 8 * S, 128), "causal blocks", None),
        (On(1, 4, 8 * S, 64), "causal blocks", None),
        (On(1, 4, 8 * S, 128, grad=True), "causal blocks", None),
        (On(1, 4, 8 * S, 80), "causal blocks", "(64, 96, 128)"),
        (On(1, 4, 8 * S, 64, grad=True), "causal blocks", "width 128"),
        (On(1, 4, 8 * S, 128, dtype=torch.float16, grad=True), "causal blocks", "bfloat16"),
        (On(1, 4, 8 * S, 128, dtype=torch.float32), "causal blocks", "float32"),
        (On(1, 4, 8 * S, 128), "random edges", "half of the pairs"),
    ],
)
def test_reasons(hopper, q, build, word):
    found = module.reasons(q, On(1, 2, 8 * S, q.shape[-1]), q, SPLIT[build]())
    assert found == [] if word is None else word in " ".join(found)


def test_deterministic_gradients_are_refused(hopper):
    ranges = SPLIT["causal blocks"]()
    q = On(1, 4, 8 * S, 128, grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        found = module.reasons(q, q, q, ranges)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "deterministic" in found[0]


def test_lists_are_counted_in_int32(hopper, monkeypatch):
    monkeypatch.setattr(module, "_MOST_ENTRIES", 100)
    q = On(1, 4, 8 * S, 128)
    assert "2**31" in module.reasons(q, q, q, SPLIT["causal blocks"]())[0]


def test_auto_takes_blocks_where_tiles_would_be_half_empty(hopper, monkeypatch):
    case = {"pattern": "window", "width": 128, "keys": 1000, "apart": False, "backward": False}
    table = [
        {**case, "tflops": {"cudnn": 600.0, "flex": 300.0}},
        {**case, "fill": 0.27, "tflops": {"cudnn": 150.0, "cudnn_blocks": 480.0, "flex": 90.0}},
    ]
    monkeypatch.setattr(measured, "table", lambda: {"some GPU": {"cases": table}})
    n = 32 * S
    q, k = On(1, 4, n, 128), On(1, 2, n, 128)

    def picks(pattern, **options):
        return capability.choose("auto", q, k, k, planned(pattern, n, 4), **options).name

    scattered_blocks = random_map(32, 0.1)
    assert picks(scattered_blocks) == "cudnn_blocks"
    assert picks(ls.Window(1000)) == picks(ls.Causal()) == "cudnn"
    whole_tiles = np.kron(np.tril(np.ones((16, 16))), np.ones((2, 2))) > 0
    assert picks(ls.Blocks.of(whole_tiles, S)) == "cudnn"


def test_no_gradient_of_the_lse_is_a_reason(hopper):
    kernel = next(c for c in capability.KERNELS if c.name == "cudnn_blocks")
    ranges = SPLIT["causal blocks"]()
    q = On(1, 4, 8 * S, 128, grad=True)
    assert kernel.reasons(q, q, q, ranges, use_lse=False) == []
    assert "log-sum-exp" in kernel.reasons(q, q, q, ranges)[0]


# Results on a GPU with the library.


@gpu
@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.parametrize("name", TAKEN)
def test_equals_the_oracle(name, heads):
    if module.missing_stack() is not None:
        pytest.skip(str(module.missing_stack()))
    ranges = SPLIT[name]()
    if heads != 4:
        ranges = regrouped(ranges, ranges.group_BH.repeat_interleave(heads // 4, 1).tolist())
    ranges = to(ranges, "cuda")
    inputs = [
        x.to("cuda", torch.bfloat16).requires_grad_()
        for x in tensors(1, heads, 2, ranges.queries, ranges.keys, 128, 128)
    ]
    if found := module.reasons(*inputs, ranges):
        pytest.skip("; ".join(found))
    exact = [x.detach().float().requires_grad_() for x in inputs]
    (out, lse), (expected, total) = (
        f(*x, ranges, 0.1) for f, x in ((module.cudnn_blocks, inputs), (reference, exact))
    )
    seen = total > -math.inf
    assert (lse[~seen] == -math.inf).all()
    assert relative(lse[seen], total[seen]) < 1e-4
    slope = torch.randn_like(expected)
    grads = torch.autograd.grad(out, inputs, slope.to(out.dtype))
    exact_grads = torch.autograd.grad(expected, exact, slope)
    for a, b in zip((out, *grads), (expected, *exact_grads), strict=True):
        assert a.isfinite().all()
        assert relative(a, b) < 1e-2
