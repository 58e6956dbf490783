"""The CUDA kernel: tile lists and shape classes without a GPU, results and gradients on one."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from tests.ops import cases
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.kernels import _flex_tiles
from longspan.ops.kernels.reference import reference
from longspan.ops.ranges import KeyRanges

flex_module = importlib.import_module("longspan.ops.kernels.flex")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # The compiler itself warns, of tensors that are no leaves and of deprecated parts of torch.
    pytest.mark.filterwarnings("default"),
]


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_gpu:
        test = mark(test)
    return test


def key_ranges(lo: list[Tensor], hi: list[Tensor], group: Tensor, keys: int) -> KeyRanges:
    """One range per row and group."""
    lo_GNm = torch.stack(lo)[..., None].int()
    hi_GNm = torch.stack(hi)[..., None].int()
    return KeyRanges(lo_GNm, torch.maximum(lo_GNm, hi_GNm), group, keys)


def window(n: int, width: int, *, keys: int | None = None, heads: int = 1) -> KeyRanges:
    """Causal window; the queries are the last rows."""
    keys = keys or n
    row = torch.arange(n) + keys - n
    return key_ranges(
        [(row - width + 1).clamp(min=0)], [row + 1], torch.zeros(1, heads, dtype=torch.long), keys
    )


def shifted(n: int, size: int, *, heads: int) -> KeyRanges:
    """Causal chunks, for the second half of the heads moved by half a chunk."""
    row = torch.arange(n)
    start = [s + size * ((row - s) // size) for s in (0, size // 2)]
    group = (torch.arange(heads) >= heads // 2).long()[None]
    return key_ranges([x.clamp(min=0) for x in start], [row + 1] * 2, group, n)


def scattered(
    n: int, keys: int, *, ranges: int, groups: int, batch: int, heads: int, seed: int = 0
) -> KeyRanges:
    """Several random ranges per row, one row in eight empty, groups dealt to heads at random."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, keys + 1, (groups, n, 2 * ranges), generator=generator)
    lo_GNm, hi_GNm = cuts.sort(-1).values.int().unflatten(-1, (ranges, 2)).unbind(-1)
    # Rows that stay alike for a while, so that full tiles occur.
    lo_GNm, hi_GNm = (x[:, torch.arange(n) // 200 * 200] for x in (lo_GNm, hi_GNm))
    empty = torch.rand(groups, n, 1, generator=generator) < 1 / 8
    lo_GNm, hi_GNm = (x.masked_fill(empty, 0) for x in (lo_GNm, hi_GNm))
    group = torch.randint(0, groups, (batch, heads), generator=generator)
    return KeyRanges(lo_GNm, hi_GNm, group, keys)


def regrouped(ranges: KeyRanges, group: list[list[int]]) -> KeyRanges:
    return KeyRanges(ranges.lo_GNm, ranges.hi_GNm, torch.tensor(group), ranges.keys)


def to(ranges: KeyRanges, device: str) -> KeyRanges:
    moved = (x.to(device) for x in (ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH))
    return KeyRanges(*moved, ranges.keys)


def tensors(
    batch: int, heads: int, key_heads: int, n: int, keys: int, width: int, value_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + keys + width)
    shapes = [
        (batch, heads, n, width),
        (batch, key_heads, keys, width),
        (batch, key_heads, keys, value_width),
    ]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


# Tile lists.


def listed(count: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    """Tile lists [Z, Y, rows, W] as a dense map [Z, Y, rows, columns]."""
    used = torch.arange(index.shape[-1]) < count[..., None]
    dense = torch.zeros(*index.shape[:3], columns, dtype=torch.int32)
    dense.scatter_add_(-1, index.long(), used.int())
    assert dense.max() <= 1
    assert (dense[:, :, rows:] == 0).all()
    return dense[:, :, :rows].bool()


def check_lists(ranges: KeyRanges, at_once: int = 1 << 26) -> None:
    """The lists of the given ranges are the tiles of their dense mask."""
    counts = _flex_tiles.count_tiles(ranges)
    lists = _flex_tiles.tile_lists(ranges)
    tile = counts.tile
    rows, columns = -(-ranges.queries // tile), -(-ranges.keys // tile)
    assert rows * columns <= at_once
    mask = torch.zeros(ranges.groups, rows * tile, columns * tile, dtype=torch.bool)
    mask[:, : ranges.queries, : ranges.keys] = ranges.mask_GNM()
    tiles = mask.unflatten(2, (columns, tile)).unflatten(1, (rows, tile)).transpose(2, 3)
    full = tiles.flatten(3).all(-1)
    partial = tiles.flatten(3).any(-1) & ~full
    partial, full = partial[ranges.group_BH], full[ranges.group_BH]
    kv, full_kv = listed(*lists[:2], rows, columns), listed(*lists[2:4], rows, columns)
    q, full_q = listed(*lists[4:6], columns, rows), listed(*lists[6:], columns, rows)
    assert (kv.expand_as(partial) == partial).all()
    assert (full_kv.expand_as(full) == full).all()
    assert (q.mT.expand_as(partial) == partial).all()
    assert (full_q.mT.expand_as(full) == full).all()
    assert sum(x.nbytes for x in lists) == counts.list_bytes


LISTED = {
    "one": lambda: window(1, 1),
    "window": lambda: window(700, 300),
    "aligned": lambda: window(1024, 512, heads=4),
    "last": lambda: window(130, 40, keys=900),
    "shifted": lambda: shifted(1000, 256, heads=4),
    "scattered": lambda: scattered(900, 700, ranges=3, groups=5, batch=2, heads=4),
    "one_key": lambda: scattered(300, 1, ranges=1, groups=2, batch=2, heads=1),
}


@pytest.mark.parametrize("at_once", [20, 6])
@pytest.mark.parametrize("name", LISTED)
def test_few_tiles_at_once_then_larger_tiles(name, at_once, monkeypatch):
    monkeypatch.setattr(_flex_tiles, "_TILES_AT_ONCE", at_once)
    check_lists(LISTED[name](), at_once)


@pytest.mark.parametrize("name", LISTED)
def test_tile_lists_are_the_tiles_of_the_dense_mask(name):
    check_lists(LISTED[name]())


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_tile_lists_of_the_shared_cases(case):
    check_lists(case.ranges())


def test_lists_of_a_window_grow_linearly():
    counts = _flex_tiles.count_tiles(window(1 << 17, 4096, heads=32))
    assert counts.width == counts.height == 31
    assert counts.group_ZY.shape == (1, 1)
    assert counts.list_bytes == 4 * 4 * (1 << 10) * 32


def test_heads_that_see_the_same_share_their_lists():
    ranges = scattered(200, 200, ranges=1, groups=3, batch=1, heads=1)
    both = regrouped(ranges, [[0, 0], [2, 2]])
    assert _flex_tiles.count_tiles(both).group_ZY.tolist() == [[0], [2]]


# Shape classes: traced, and run unfused on the CPU.


@pytest.fixture
def unfused(monkeypatch):
    """Everything but the fused kernel: the mask function, the tracing and the shape classes."""

    def count_only(graph, inputs):
        flex_module._compilations += 1
        return graph.forward

    monkeypatch.setattr(flex_module, "reasons", lambda *_: [])
    monkeypatch.setattr(flex_module, "_inductor", count_only)
    monkeypatch.setattr(flex_module, "_fused", {})
    with torch.no_grad():
        yield


def added(calls: list[tuple[Callable[[], KeyRanges], tuple[int, ...]]], device: str) -> int:
    """Check each call against the oracle; return how many graphs they compiled together."""
    before = flex_module.compilations()
    for ranges, shape in calls:
        q, k, v = (x.to(device) for x in tensors(*shape))
        ranges = to(ranges(), device)
        scale = shape[-2] ** -0.5
        out, lse = flex_module.flex(q, k, v, ranges, scale)
        expected_out, expected_lse = reference(*(x.double() for x in (q, k, v)), ranges, scale)
        torch.testing.assert_close(out.double(), expected_out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    return flex_module.compilations() - before


TEN_WINDOWS = [
    (lambda w=w: window(512, w), (1, 4, 2, 512, 512, 16, 16))
    for w in (1, 5, 64, 128, 129, 200, 256, 300, 400, 512)
]
TEN_GROUPED = [
    (
        lambda g=g: scattered(384, 512, ranges=2, groups=g, batch=1, heads=4, seed=g),
        (1, 4, 2, 384, 512, 16, 16),
    )
    for g in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
]
ODD_LENGTHS = [
    (lambda n=n, m=m: window(n, 50, keys=m), (1, 4, 2, n, m, 16, 16))
    for n, m in ((300, 300), (301, 301), (129, 400), (700, 701), (1000, 1001))
]
DECODE = [
    (lambda m=m: window(1, 50, keys=m), (1, 4, 2, 1, m, 16, 16))
    for m in (5, 6, 100, 128, 129, 130, 256, 257)
]


@pytest.mark.parametrize(
    "calls",
    [TEN_WINDOWS, TEN_GROUPED, ODD_LENGTHS, DECODE],
    ids=["windows", "grouped", "lengths", "decode"],
)
def test_one_graph_serves_a_shape_class(unfused, calls):
    assert added(calls, "cpu") == 1


def test_an_outer_compilation_breaks_its_graph_around_the_kernel(unfused):
    ranges = window(256, 100)
    q, k, v = tensors(1, 4, 2, 256, 256, 16, 16)
    before = flex_module.compilations()
    twice = torch.compile(
        lambda q: flex_module.flex(2 * q, k, v, ranges, 0.25)[0] * 3, backend="eager"
    )
    expected, _ = reference(2 * q, k, v, ranges, 0.25)
    torch.testing.assert_close(twice(q), 3 * expected, rtol=1e-4, atol=1e-5)
    assert flex_module.compilations() == before + 1


def test_what_is_made_in_inference_mode_serves_training():
    ranges = scattered(300, 200, ranges=2, groups=3, batch=2, heads=4)
    with torch.inference_mode():
        plan = flex_module._schedule(ranges)
    assert plan.empty_BHN is not None
    made = (plan.lo_GmN, plan.hi_GmN, plan.group_BH, plan.empty_BHN, *plan.lists)
    assert not any(x.is_inference() for x in made)


def test_reasons_are_named():
    q, k, v = tensors(1, 2, 1, 4, 4, 8, 300)
    found = flex_module.reasons(q.double(), k, v, window(4, 2))
    for word in ("CUDA", "dtypes", "16 to 256, got 8", "16 to 256, got 300"):
        assert any(word in reason for reason in found), (word, found)
    with pytest.raises(Refusal, match="CUDA"):
        flex_module.flex(q, k, v, window(4, 2), 1.0)


# Results on a GPU.


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


CASES = {
    "window": (lambda: window(512, 200), (1, 4, 2, 512, 512, 64, 64), torch.bfloat16),
    "window_fp16": (lambda: window(512, 200), (1, 4, 2, 512, 512, 64, 64), torch.float16),
    "window_fp32": (lambda: window(512, 200), (1, 4, 2, 512, 512, 64, 64), torch.float32),
    "mha_wide": (lambda: window(384, 150), (2, 2, 2, 384, 384, 128, 128), torch.bfloat16),
    "width_256": (lambda: window(256, 150), (1, 2, 1, 256, 256, 256, 256), torch.bfloat16),
    "width_80_96": (lambda: window(300, 77), (1, 4, 1, 300, 300, 80, 96), torch.bfloat16),
    "width_16_fp32": (lambda: window(300, 77), (1, 4, 1, 300, 300, 16, 16), torch.float32),
    "shifted": (
        lambda: shifted(1024, 256, heads=8),
        (1, 8, 2, 1024, 1024, 64, 64),
        torch.bfloat16,
    ),
    "six_heads_odd": (
        lambda: shifted(777, 100, heads=6),
        (2, 6, 2, 777, 777, 64, 64),
        torch.bfloat16,
    ),
    "scattered": (
        lambda: scattered(512, 640, ranges=3, groups=5, batch=2, heads=8),
        (2, 8, 1, 512, 640, 64, 64),
        torch.float32,
    ),
    "scattered_odd": (
        lambda: scattered(333, 1001, ranges=5, groups=4, batch=2, heads=4),
        (2, 4, 4, 333, 1001, 32, 64),
        torch.float32,
    ),
    "per_batch": (
        lambda: regrouped(
            scattered(400, 400, ranges=1, groups=2, batch=1, heads=1), [[0] * 4, [1] * 4]
        ),
        (2, 4, 2, 400, 400, 64, 64),
        torch.float32,
    ),
    "few_rows": (lambda: window(17, 60, keys=250), (1, 4, 2, 17, 250, 64, 64), torch.float32),
    "one_row": (lambda: window(1, 60, keys=250), (2, 8, 2, 1, 250, 64, 64), torch.float32),
    "one_row_grouped": (
        lambda: scattered(1, 500, ranges=2, groups=3, batch=2, heads=8, seed=3),
        (2, 8, 2, 1, 500, 64, 64),
        torch.float32,
    ),
    "one_key": (
        lambda: scattered(130, 1, ranges=1, groups=2, batch=1, heads=4),
        (1, 4, 2, 130, 1, 64, 64),
        torch.float32,
    ),
    "all_empty": (lambda: window(200, 0), (1, 4, 2, 200, 200, 64, 64), torch.float32),
}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@gpu
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_equal_the_oracle(name):
    build, shape, dtype = CASES[name]
    ranges = to(build(), "cuda")
    scale = shape[-2] ** -0.5
    inputs = [x.to("cuda", dtype).requires_grad_() for x in tensors(*shape)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = flex_module.flex(*inputs, ranges, scale)
    expected_out, expected_lse = reference(*exact, ranges, scale)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    seen = expected_lse > -math.inf
    assert (lse[~seen] == -math.inf).all()
    assert (out[~seen] == 0).all()
    weight = torch.randn_like(expected_out)
    slope = torch.randn_like(expected_lse)
    loss = (out * weight).sum() + (lse.masked_fill(~seen, 0) * slope).sum()
    expected_loss = (expected_out * weight).sum() + (
        expected_lse.masked_fill(~seen, 0) * slope
    ).sum()
    grads = torch.autograd.grad(loss, inputs)
    expected_grads = torch.autograd.grad(expected_loss, exact)
    errors = {
        "out": relative(out, expected_out),
        "lse": relative(lse[seen], expected_lse[seen]),
    }
    for letter, grad, expected in zip("qkv", grads, expected_grads, strict=True):
        assert grad.isfinite().all()
        errors[f"d{letter}"] = relative(grad, expected)
    print(name, {k: f"{x:.1e}" for k, x in errors.items()})
    assert max(errors.values()) < TOLERANCE[dtype]
    assert (grads[0][~seen] == 0).all()


@gpu
@pytest.mark.parametrize(
    "case",
    [c for c in cases.CASES if {c.D, c.Dv or c.D} <= set(flex_module.WIDTHS)],
    ids=str,
)
def test_shared_cases_equal_the_oracle(case):
    ranges = cases.to_device(case.ranges(), "cuda")
    qkv = cases.make_qkv(case, torch.float32, "cuda")
    found = cases.run(flex_module.flex, qkv, ranges)
    expected = cases.run(reference, [x.double() for x in qkv], ranges)
    seen = expected["lse"] > -math.inf
    assert (found["lse"][~seen] == -math.inf).all()
    for values in (found, expected):
        values["lse"] = values["lse"].masked_fill(~seen, 0)
    for name, value in expected.items():
        assert relative(found[name], value) < TOLERANCE[torch.float32], name


@gpu
def test_transposed_and_sliced_inputs():
    ranges = to(window(300, 40, heads=4), "cuda")
    q, k, v = (x.to("cuda") for x in tensors(2, 4, 2, 300, 300, 64, 64))
    expected, _ = flex_module.flex(q, k, v, ranges, 0.125)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    strided = [torch.cat([x, x], dim=-1)[..., :64] for x in (q, k, v)]
    for inputs in (views, strided):
        out, _ = flex_module.flex(*inputs, ranges, 0.125)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@gpu
def test_nan_gradients_of_empty_rows_stay_there():
    ranges = to(scattered(300, 300, ranges=1, groups=1, batch=1, heads=2), "cuda")
    inputs = [x.to("cuda").requires_grad_() for x in tensors(1, 2, 2, 300, 300, 64, 64)]
    out, lse = flex_module.flex(*inputs, ranges, 0.125)
    empty = lse == -math.inf
    assert empty.any()
    poison = torch.full_like(out, math.nan).where(empty[..., None], torch.ones_like(out))
    for grad in torch.autograd.grad(
        [out, lse], inputs, [poison, torch.where(empty, math.nan, 1.0)]
    ):
        assert grad.isfinite().all()


@gpu
@pytest.mark.parametrize(
    "calls",
    [TEN_WINDOWS, TEN_GROUPED, ODD_LENGTHS, DECODE],
    ids=["windows", "grouped", "lengths", "decode"],
)
def test_one_compilation_serves_a_shape_class(calls):
    with torch.no_grad():
        added(calls[:1], "cuda")
        assert added(calls[1:], "cuda") == 0
