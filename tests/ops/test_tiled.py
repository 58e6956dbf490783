"""The tiled kernel against the reference: values, gradients, memory, leaks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.ops.cases import CASES, Case, key_ranges, make_qkv, run, scattered, window
from torch import Tensor

from longspan.ops.kernels import _tiled_views as views_module
from longspan.ops.kernels import tiled as tiled_module
from longspan.ops.kernels._tiled_schedule import build_schedule
from longspan.ops.kernels.reference import reference
from longspan.ops.kernels.tiled import tiled

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These inputs are too small to share, and test processes already fill the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Every tensor within ``rtol`` of the largest entry of the expected one, -inf in the same
    places."""
    for name, want in expected.items():
        have = found[name]
        assert have.shape == want.shape, name
        have, want = have.double(), want.double()
        assert torch.equal(have.isneginf(), want.isneginf()), name
        seen = want.isfinite()
        limit = rtol * max(1.0, want[seen].abs().max().item()) if seen.any() else 0.0
        error = (have - want)[seen].abs().max().item() if seen.any() else 0.0
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_in_float64(case: Case) -> None:
    qkv, ranges = make_qkv(case), case.ranges()
    assert_same(run(tiled, qkv, ranges), run(reference, qkv, ranges), 1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_in_float32(case: Case) -> None:
    qkv, ranges = make_qkv(case, torch.float32), case.ranges()
    found = run(tiled, qkv, ranges)
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert_same(found, run(reference, [x.double() for x in qkv], ranges), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    qkv, ranges = make_qkv(case, dtype), case.ranges()
    found = run(tiled, qkv, ranges)
    assert found["lse"].dtype == torch.float32
    assert {x.dtype for name, x in found.items() if name != "lse"} == {dtype}
    assert_same(found, run(reference, [x.double() for x in qkv], ranges), 1e-2)


@pytest.mark.parametrize("name", ["gqa-4", "scca-flow-odd-gqa", "segments", "scattered-8"])
def test_several_threads_compute_the_same_every_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_module, "_WORTH_THREADS", 0)
    torch.set_num_threads(2)
    case = BY_NAME[name]
    qkv, ranges = make_qkv(case), case.ranges()
    once, again = run(tiled, qkv, ranges), run(tiled, qkv, ranges)
    assert torch.get_num_threads() == 2
    assert all(len(schedule.parts) > 1 for schedule, _ in tiled_module._plans[ranges].values())
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert_same(once, run(reference, qkv, ranges), 1e-10)


def test_several_threads_work_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_module, "_WORTH_THREADS", 0)
    torch.set_num_threads(2)
    case = BY_NAME["gqa-4"]
    qkv, ranges = make_qkv(case), case.ranges()
    with torch.inference_mode():
        out, _ = tiled(*[x + 0 for x in qkv], ranges, 0.25)
    assert_same({"out": out}, {"out": reference(*qkv, ranges, 0.25)[0]}, 1e-10)


@pytest.mark.parametrize("name", ["gqa-4", "scattered-3", "sink-window", "nothing-visible"])
def test_masks_without_room_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME[name]
    qkv = make_qkv(case)
    kept = run(tiled, qkv, case.ranges())
    for room in (0, 1 << 12):
        monkeypatch.setattr(views_module, "_ROOM", room)
        ranges = case.ranges()
        # What was kept by the first call meets the second.
        for _ in range(2):
            found = run(tiled, qkv, ranges)
            assert all(torch.equal(found[name], want) for name, want in kept.items())


def test_autocast_rounds_nothing() -> None:
    case = BY_NAME["window"]
    qkv, ranges = make_qkv(case, torch.float32), case.ranges()
    plain = run(tiled, qkv, ranges)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(tiled, qkv, ranges)
    assert_same(found, plain, 1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_equals_reference_on_random_ranges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, keys = (int(x) for x in rng.integers(1, 300, size=2))
    key_heads, share, batch, ranges = (int(x) for x in rng.integers(1, 4, size=4))
    case = Case(
        name=f"random-{seed}",
        make=lambda c: scattered(c.N, c.B, c.H, c.keys, ranges, seed, smooth=bool(seed % 2)),
        B=batch,
        H=key_heads * share,
        K=key_heads,
        N=n,
        M=keys,
        D=8,
    )
    qkv, made = make_qkv(case), case.ranges()
    assert_same(run(tiled, qkv, made), run(reference, qkv, made), 1e-10)


@pytest.mark.parametrize("name", ["window", "scattered-3", "scca-flow", "decode-few", "causal"])
def test_small_batches_and_spans_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A work buffer far smaller than a tile's keys: spans are cut and joined again through lse."""
    for way in ("_FORWARD", "_BACKWARD"):
        small = replace(getattr(tiled_module, way), job=64, area=64)
        monkeypatch.setattr(tiled_module, way, small)
    case = BY_NAME[name]
    case = Case(**{**vars(case), "M": None if case.M is None else case.M + 900})
    qkv, ranges = make_qkv(case), case.ranges()
    assert_same(run(tiled, qkv, ranges), run(reference, qkv, ranges), 1e-10)


def test_reads_inputs_of_any_layout() -> None:
    case = BY_NAME["gqa-4"]
    q, k, v = make_qkv(case)
    odd = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([v, v], dim=-1)[..., : v.shape[-1]],
    ]
    ranges = case.ranges()
    for have, want in zip(tiled(*odd, ranges, 0.3), tiled(q, k, v, ranges, 0.3), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["gqa-4", "scca-flow-odd-gqa", "segments", "nothing-visible"])
def test_gives_in_the_layout_of_the_inputs_what_it_gives_for_rows_end_to_end(
    name: str, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_module, "_WORTH_THREADS", 0)
    torch.set_num_threads(threads)
    case = BY_NAME[name]
    qkv, ranges = make_qkv(case, dtype), case.ranges()
    wanted = run(tiled, qkv, ranges)
    # Heads side by side as models have them, and batch rows side by side as remainders are.
    for order in ((0, 2, 1, 3), (1, 2, 0, 3), (2, 0, 1, 3)):
        back = [order.index(axis) for axis in range(4)]
        moved = [x.permute(order).contiguous().permute(back) for x in qkv]
        found = run(tiled, moved, ranges)
        assert_same(found, wanted, 1e-12 if dtype == torch.float64 else 1e-2)
        out, _ = tiled(*moved, ranges, 0.3)
        assert out.permute(order).is_contiguous()


def test_keys_may_lie_in_another_order_of_heads_and_batch_rows_than_queries() -> None:
    # Of three heads alike the last one of one batch row lies behind the first one of the next.
    ranges = key_ranges([[0], [0]], [[5], [3]], [0, 0, 1, 0], heads=4, keys=5)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, rows, 8, dtype=torch.float64) for rows in (1, 5, 5))
    moved = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    assert_same(run(tiled, [q, *moved], ranges), run(reference, [q, k, v], ranges), 1e-10)


def test_edges_that_many_spans_end_in_are_kept_once() -> None:
    # Queries see every eighth key: 8 more keys from tile to tile, always the same stairs.
    n, tile = 2048, 64
    hi_Nm = np.arange(n)[:, None] // 8 + 1
    schedule = build_schedule(
        np.zeros((1, n, 1), dtype=np.int64),
        hi_Nm[None],
        np.zeros((1, 1), dtype=np.int64),
        keys=n // 8,
        key_heads=1,
        tile=tile,
        leaf=tile,
        job=1 << 18,
        area=1 << 19,
        parts=1,
    )
    biases, canvas = views_module.Biases(), views_module.Canvas(torch.zeros(0))
    masks = {run.mask for run in schedule.runs[0] if run.mask is not None}
    memory = set()
    for mask in masks:
        bias_XS, *_ = biases.whole(mask, 2, canvas)
        column_S = torch.arange(mask.span)
        hidden_TS = torch.from_numpy(mask.hi_Tm) <= column_S
        assert torch.equal(bias_XS.isneginf(), hidden_TS.repeat(2, 1))
        assert (bias_XS[~hidden_TS.repeat(2, 1)] == 0).all()
        memory.add(bias_XS.untyped_storage().data_ptr())
    assert len(masks) > 20
    # Twice as many zeros each time, for two kinds of stairs: spans end at multiples of 16.
    assert len(memory) <= 10


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_gives_only_the_gradients_that_are_wanted(wanted: str) -> None:
    case = BY_NAME["scca-flow"]
    ranges = case.ranges()
    inputs = dict(zip("qkv", make_qkv(case), strict=True))
    for name in wanted:
        inputs[name].requires_grad_()
    grads = []
    for kernel in (tiled, reference):
        out, lse = kernel(*inputs.values(), ranges, 0.25)
        grads.append(
            torch.autograd.grad(out.square().sum() + lse.sum(), [inputs[n] for n in wanted])
        )
    for have, want in zip(*grads, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


def test_gradient_through_lse_alone() -> None:
    case = BY_NAME["window"]
    ranges = case.ranges()
    grads = []
    for kernel in (tiled, reference):
        q, k, v = (x.requires_grad_() for x in make_qkv(case))
        grads.append(torch.autograd.grad(kernel(q, k, v, ranges, 0.25)[1].cos().sum(), (q, k)))
    for have, want in zip(*grads, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


def test_rows_that_see_nothing_have_no_gradient() -> None:
    lo, hi = np.zeros(100), np.arange(100) + 1
    hi[::3] = 0
    case = Case(name="holes", make=lambda c: key_ranges(lo, hi, heads=c.H, keys=c.N), N=100)
    q, k, v = (x.requires_grad_() for x in make_qkv(case))
    out, lse = tiled(q, k, v, case.ranges(), 0.25)
    assert (out[:, :, ::3] == 0).all()
    assert lse[:, :, ::3].isneginf().all()
    # The infinite lse of those rows goes into the loss on purpose.
    dq, dk, dv = torch.autograd.grad(out.sum() + lse.exp().sum(), (q, k, v))
    assert (dq[:, :, ::3] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


def test_large_logits_stay_finite() -> None:
    case = BY_NAME["window"]
    qkv = [x * 30 for x in make_qkv(case, torch.float32)]
    found = run(tiled, qkv, case.ranges())
    expected = run(reference, [x.double() for x in qkv], case.ranges())
    assert_same({"out": found["out"]}, {"out": expected["out"]}, 1e-3)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("name", ["window", "scca-flow", "shifted-chunk", "sink-window", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_later_keys_change_no_bit_of_earlier_rows(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    q, k, v = make_qkv(case, dtype)
    out, lse = tiled(q, k, v, case.ranges(), 0.25)
    t = case.N * 5 // 8 + 1
    _, other_k, other_v = make_qkv(case, dtype, seed=9)
    k[:, :, t:], v[:, :, t:] = other_k[:, :, t:], other_v[:, :, t:]
    changed_out, changed_lse = tiled(q, k, v, case.ranges(), 0.25)
    assert torch.equal(out[:, :, :t], changed_out[:, :, :t])
    assert torch.equal(lse[:, :, :t], changed_lse[:, :, :t])
    assert not torch.equal(out[:, :, t:], changed_out[:, :, t:])


def test_work_stays_near_the_visible_pairs() -> None:
    n, width = 1 << 16, 512
    ranges = window(n, 8, width)
    schedule = build_schedule(
        ranges.lo_GNm.numpy().astype("int64"),
        ranges.hi_GNm.numpy().astype("int64"),
        ranges.group_BH.numpy(),
        keys=n,
        key_heads=8,
        tile=256,
        leaf=64,
        job=1 << 18,
        area=1 << 19,
        parts=2,
    )
    batches = [batch for part in range(2) for batch in schedule.batches(part, apart=True)]
    scores = sum(b.jobs * b.heads * b.run.rows * b.run.span for b in batches)
    assert n * width * 8 <= scores <= 1.13 * n * width * 8
    assert max(b.jobs * b.heads * b.run.rows * b.run.span for b in batches) <= schedule.area
    # The head of the sequence, its regular part, nothing else.
    assert len(schedule.runs[0]) <= 10


def test_a_row_that_sees_everything_costs_its_neighbours_nothing() -> None:
    """The others of its tile see the first and the last keys, and their own."""
    n, block = 4096, 64
    own = np.arange(n) // block * block
    lo_Nm = np.stack([0 * own, own, np.full(n, n - block)], axis=1)
    hi_Nm = lo_Nm + block
    # The first and the last block already hold what they would see twice.
    hi_Nm[:block, 1] = lo_Nm[:block, 1] = hi_Nm[-block:, 1] = lo_Nm[-block:, 1] = 0
    lo_Nm[:block], hi_Nm[:block] = 0, [n, 0, 0]
    pairs = (hi_Nm - lo_Nm).sum()
    schedule = build_schedule(
        lo_Nm[None],
        hi_Nm[None],
        np.zeros((1, 1), dtype=np.int64),
        keys=n,
        key_heads=1,
        tile=512,
        leaf=block,
        job=1 << 18,
        area=1 << 19,
        parts=1,
    )
    batches = list(schedule.batches(0, apart=False))
    scores = sum(b.jobs * b.run.rows * b.run.span for b in batches)
    assert pairs <= scores <= 1.1 * pairs


def test_memory_does_not_hold_a_row_by_key_tensor() -> None:
    """Forward and backward over 32768 x 32768: no single tensor may pass a few times the
    inputs."""
    n = 1 << 15
    case = Case(name="long", make=lambda c: window(c.N, c.H, 64), H=1, K=1, N=n, D=16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return result

    with Watch():
        run(tiled, make_qkv(case, torch.float32), case.ranges())
    inputs = n * case.D * 4
    work = torch.get_num_threads() * tiled_module._BACKWARD.area * 4
    # Test data are made in float64, hence the factor two.
    assert largest <= max(2 * inputs, work) < n * n


def test_schedules_are_kept_for_ranges_and_go_with_them() -> None:
    case = BY_NAME["window"]
    ranges = case.ranges()
    qkv = make_qkv(case)
    tiled(*qkv, ranges, 0.25)
    kept = tiled_module._plans[ranges]
    first = next(iter(kept.values()))
    tiled(*qkv, ranges, 0.25)
    assert [id(x) for x in kept.values()] == [id(first)]
    gone = weakref.ref(ranges)
    del ranges
    gc.collect()
    assert gone() is None
