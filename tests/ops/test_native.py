"""The compiled kernel against the reference, on every instruction set that this machine has."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.ops.cases import (
    CASES,
    Case,
    causal,
    key_ranges,
    make_qkv,
    run,
    scattered,
    scca_flow,
    window,
)
from tests.ops.test_tiled import assert_same

import longspan as ls
from longspan.errors import Refusal
from longspan.ops import workers
from longspan.ops.capability import choose
from longspan.ops.kernels import native as module
from longspan.ops.kernels.native import native, native_passes
from longspan.ops.kernels.reference import reference
from longspan.ops.native import build
from longspan.ops.places import Places

BY_NAME = {case.name: case for case in CASES}
# Against the reference in float64 on the same inputs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LEVELS = {1: "AVX2", 2: "AVX-512", 3: "AVX512-BF16", 4: "AMX"}

pytestmark = pytest.mark.skipif(
    module.library() is None,
    reason="the CPU kernel was not compiled: no C compiler, or not x86-64",
)


def compiler() -> str:
    """The C compiler; the test is skipped where there is none: a library may come without."""
    own = os.environ.get("CC") or "cc"
    if shutil.which(shlex.split(own)[0]) is None:
        pytest.skip("needs a C compiler")
    return own


@pytest.fixture(scope="session")
def with_tile_registers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The compiled code with tile registers in plain C, for processors that have none."""
    own = compiler()
    header = Path(__file__).with_name("tile_registers.h")
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("native") / "native.so"
        for owner in (build, module):
            patch.setattr(owner, "LIBRARY", made)
        patch.setenv("CC", f"{own} -include {shlex.quote(str(header))}")
        assert build.build() == ""
        found = module.library.__wrapped__()
    if found.longspan_tile(module._AMX) == 1:
        pytest.skip("the compiler does not know AMX")
    return found


@pytest.fixture(params=LEVELS.values())
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: level for level, name in LEVELS.items()}[request.param]
    there = module.level()
    if own == module._AMX > there > module._SINGLE:
        made = request.getfixturevalue("with_tile_registers")
        monkeypatch.setattr(module, "library", lambda: made)
    elif own > there:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(module, "level", lambda: own)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These inputs are too small to share, and test processes already fill the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case: Case) -> None:
    qkv, ranges = make_qkv(case, torch.float32), case.ranges()
    found = run(native, qkv, ranges)
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert_same(found, run(reference, [x.double() for x in qkv], ranges), 1e-5)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    qkv, ranges = make_qkv(case, dtype), case.ranges()
    found = run(native, qkv, ranges)
    assert found["lse"].dtype == torch.float32
    assert {x.dtype for name, x in found.items() if name != "lse"} == {dtype}
    assert_same(found, run(reference, [x.double() for x in qkv], ranges), 1e-2)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [8, 40, 64, 96])
def test_equals_reference_on_random_ranges(seed: int, width: int, dtype: torch.dtype) -> None:
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
        D=width,
    )
    qkv, made = make_qkv(case, dtype), case.ranges()
    wanted = run(reference, [x.double() for x in qkv], made)
    assert_same(run(native, qkv, made), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "n"), [(4, 300), (6, 50), (7, 90), (8, 1), (32, 40), (64, 3)])
def test_heads_of_one_key_head_share_tiles(heads: int, n: int, dtype: torch.dtype) -> None:
    i = np.arange(n)
    ranges = key_ranges(0 * i, i + 1, heads=heads, keys=n)
    case = Case(name="", make=lambda c: ranges, B=2, H=heads, K=1, N=n, D=16)
    qkv = make_qkv(case, dtype)
    wanted = run(reference, [x.double() for x in qkv], ranges)
    assert_same(run(native, qkv, ranges), wanted, TOLERANCE[dtype])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("batch", "n", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)])
def test_nothing_to_do(batch: int, n: int, keys: int, dtype: torch.dtype) -> None:
    ranges = key_ranges(np.zeros((1, n)), np.zeros((1, n)), heads=2, keys=keys)
    shapes = [(batch, 2, rows, 32) for rows in (n, keys, keys)]
    found = run(native, [torch.randn(shape).to(dtype) for shape in shapes], ranges)
    assert found["out"].shape == shapes[0]
    assert not any(x.any() for name, x in found.items() if name != "lse")


# Values of 32 keys are kept by where they lie: keys 2048 apart take each other's place, within a
# block and from tile to tile, and so do key heads and batch rows.
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("apart", [96, 2048])
def test_kept_values_are_those_of_the_keys(apart: int, shift: int) -> None:
    n, keys = 200, 4200
    far = np.arange(n)[:, None] // 64 * shift + np.array([0, apart, 4096])
    ranges = key_ranges(far[None], far[None] + 32, heads=4, keys=keys)
    case = Case(name="", make=lambda c: ranges, B=2, H=4, K=2, N=n, M=keys, D=32)
    qkv = make_qkv(case, torch.bfloat16)
    wanted = run(reference, [x.double() for x in qkv], ranges)
    assert_same(run(native, qkv, ranges), wanted, TOLERANCE[torch.bfloat16])


# Rows of keys that lie apart are kept by their place: as many as half of a core's cache holds.
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("apart", [96, 512, 1024])
def test_kept_rows_are_those_of_the_keys(apart: int, shift: int) -> None:
    n, keys = 200, 4200
    far = np.arange(n)[:, None] // 16 * shift + np.array([0, apart, 4096])
    # All of some keys is more than there is room for.
    long = np.where(np.arange(n)[:, None] // 48 == 2, [0, apart, 5 * apart // 2 - 40], 32)
    ranges = key_ranges(
        np.stack([far, far]),
        np.minimum(np.stack([far + 32, far + long]), [apart, 4096, keys]),
        [[0, 0, 1, 1], [1, 1, 0, 0]],
        heads=4,
        keys=keys,
    )
    case = Case(name="", make=lambda c: ranges, B=2, H=4, K=2, N=n, M=keys, D=128)
    q, k, v = make_qkv(case, torch.float32)
    wanted = run(reference, [x.double() for x in (q, k, v)], ranges)
    for moved in ((k, v), (k, by_rows(v)), (by_rows(k), v), (by_rows(k), by_rows(v))):
        assert_same(run(native, [q, *moved], ranges), wanted, 1e-5)


# Slots are kept for what all tiles see, or not.
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("width", [16, 40, 128])
@pytest.mark.parametrize("n", [1, 17, 200])
@pytest.mark.parametrize("keys", [300, 9000])
def test_keys_in_bfloat16_are_turned_as_they_are_read(
    keys: int, n: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what they give when all of them are turned at first."""
    single = min(module.level(), module._SINGLE)
    monkeypatch.setattr(module, "level", lambda: single)
    narrow, ran = [], module._Call.run

    def run_noted(call, what):
        narrow.append(call.task.narrow)
        ran(call, what)

    monkeypatch.setattr(module._Call, "run", run_noted)
    far = np.arange(n)[:, None] % 7 + np.array([0, 100, 200])
    ranges = key_ranges(
        np.stack([far, far * 0 + [3, 150, 300]]),
        np.stack([far + 64, far * 0 + [100, 280, keys]]),
        [[0, 0, 1, 1], [1, 1, 0, 0]],
        heads=4,
        keys=keys,
    )
    case = Case(name="", make=lambda c: ranges, B=2, H=4, K=2, N=n, M=keys, D=width)
    q, k, v = make_qkv(case, torch.bfloat16)
    order = torch.randperm(keys).expand(1, 1, -1)
    for own_k, own_v in ((k, v), (by_rows(k), v), (by_rows(k), by_rows(v))):
        for places in (None, Places(key_rows=order)):
            found = []
            for most in (1 << 30, 0):
                monkeypatch.setattr(module, "_FEW_ROWS", most)
                with torch.no_grad():
                    found.append(native(q, own_k, own_v, ranges, 0.3, places))
            assert narrow[-2:] == [1, 0]
            for a, b in zip(*found, strict=True):
                assert torch.equal(a, b)
    wanted = reference(q.double(), k.double(), v.double(), ranges, 0.3)
    assert_same(
        dict(zip(("out", "lse"), native(q, k, v, ranges, 0.3), strict=True)),
        dict(zip(("out", "lse"), wanted, strict=True)),
        TOLERANCE[torch.bfloat16],
    )


@pytest.mark.parametrize(
    ("level", "rows", "narrow"),
    [(2, 128, 1), (2, 129, 0), (3, 8, 1), (3, 9, 0), (4, 1, 0)],
)
def test_few_queries_turn_keys_where_that_is_faster(
    level: int, rows: int, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of bfloat16 fill strips of 32 queries: here two heads share a vector of 16."""
    q, k = torch.zeros(1, 4, rows, 16), torch.zeros(1, 2, 300, 16)
    monkeypatch.setattr(module, "level", lambda: level)
    assert module._turned_as_read(q, k) == bool(narrow)


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """The same with heads side by side, as models have them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["gqa-4", "scca-flow-odd-gqa", "segments", "scattered-8"])
def test_several_threads_compute_the_same_every_time(
    name: str, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WORTH_THREADS", 0)
    case = BY_NAME[name]
    qkv, ranges = make_qkv(case, dtype), case.ranges()
    alone = run(native, qkv, ranges)
    torch.set_num_threads(threads)
    once = run(native, qkv, ranges)
    # Threads of OpenMP, where it is there, and ours.
    monkeypatch.setattr(workers, "_team", lambda: None)
    again = run(native, qkv, ranges)
    assert all(torch.equal(once[name], again[name]) for name in once)
    # Only gradients of keys are added up in parts.
    assert all(torch.equal(once[name], alone[name]) for name in ("out", "lse", "dq"))
    assert_same(once, alone, TOLERANCE[dtype])


# A process of its own: what pytest and other tests have started stays out of the fork.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_several_threads_after_a_fork() -> None:
    program = """
import os, torch
from tests.ops.cases import CASES, make_qkv
from longspan.ops.kernels import native as module
module._WORTH_THREADS = 0
torch.set_num_threads(2)
case = next(case for case in CASES if case.name == "window")
qkv = make_qkv(case, torch.float32)
wanted = module.native(*qkv, case.ranges(), 0.25)[0]
child = os.fork()
if not child:
    same = torch.equal(wanted, module.native(*qkv, case.ranges(), 0.25)[0])
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    folder = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, timeout=60)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_parts_hold_every_row_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Call, "parts", lambda self: 7)
    for name in ("one-token", "gqa-4", "causal"):
        case = BY_NAME[name]
        qkv, ranges = make_qkv(case, dtype), case.ranges()
        wanted = run(reference, [x.double() for x in qkv], ranges)
        assert_same(run(native, qkv, ranges), wanted, TOLERANCE[dtype])


def test_reads_and_gives_any_layout() -> None:
    case = BY_NAME["gqa-4"]
    qkv, ranges = make_qkv(case, torch.float32), case.ranges()
    wanted = run(native, qkv, ranges)
    for order in ((0, 2, 1, 3), (1, 2, 0, 3), (2, 0, 1, 3)):
        back = [order.index(axis) for axis in range(4)]
        moved = [x.permute(order).contiguous().permute(back) for x in qkv]
        assert_same(run(native, moved, ranges), wanted, 1e-6)
        out, _ = native(*moved, ranges, 0.3)
        assert out.permute(order).is_contiguous()
    q, k, v = qkv
    odd = [q, k.mT.contiguous().mT, torch.cat([v, v], dim=-1)[..., : v.shape[-1]]]
    assert_same(run(native, odd, ranges), wanted, 1e-6)


def test_large_pages_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["gqa-4"]
    qkv, ranges = make_qkv(case, torch.float32), case.ranges()
    wanted = run(native, qkv, ranges)
    monkeypatch.setattr(module, "_MAPPED", 0)
    assert_same(run(native, qkv, ranges), wanted, 0.0)
    # Less than a page, and a large page that nothing else lies in.
    for numbers in (0, 3, 1 << 21):
        x = module._fresh(torch.zeros(numbers))
        assert not x.any()


# Rows that overlap, fewer than columns: tensors like these may lie with their rows innermost.
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rows", [3, 16])
def test_windows_of_one_row(rows: int) -> None:
    i = np.arange(rows)
    ranges = key_ranges(0 * i, i + 1, heads=2, keys=rows)
    torch.manual_seed(0)
    qkv = [torch.randn(1, 2, rows + 31).unfold(2, 32, 1).requires_grad_() for _ in range(3)]

    def gradients(kernel: Callable, own: list[torch.Tensor]) -> list[torch.Tensor]:
        out, lse = kernel(*own, ranges, 0.3)
        return [out, lse, *torch.autograd.grad(out.square().sum(), own)]

    wanted = gradients(reference, [x.detach().double().requires_grad_() for x in qkv])
    for found, want in zip(gradients(native, qkv), wanted, strict=True):
        torch.testing.assert_close(found.double(), want.double(), rtol=1e-5, atol=1e-5)


# Rows of a pass in another order, some of them without a place, and some heads left out.
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_and_heads_where_they_lie(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    batch, heads, key_heads, rows, keys, n, m = 2, 6, 3, 70, 90, 60, 80
    query_heads, kv_heads = [2, 3, 4, 5], [1, 2]
    # Queries differ per key head, keys per batch row.
    table_q = np.stack([rng.permutation(rows)[:n] for _ in range(2)])[None]
    table_q[:, :, 5:8] = -1
    table_k = np.stack([rng.permutation(keys)[:m] for _ in range(2)])[:, None]
    ranges = scattered(n, batch, 4, m, 3, 1)
    places = Places(
        query_rows=torch.from_numpy(table_q),
        key_rows=torch.from_numpy(table_k),
        query_heads=torch.tensor(query_heads),
        key_heads=torch.tensor(kv_heads),
        covers=False,
    )
    shapes = [(heads, rows), (key_heads, keys), (key_heads, keys)]
    torch.manual_seed(0)
    qkv = [torch.randn(batch, *shape, 16).to(dtype) for shape in shapes]

    def moved(q, k, v, ranges, scale):
        out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf)
        group = ranges.group_BH.expand(batch, -1)
        for b in range(batch):
            for h, head in enumerate(query_heads):
                places = np.flatnonzero(table_q[0, h // 2] >= 0)
                own = [
                    torch.from_numpy(table_q[0, h // 2][places]),
                    torch.from_numpy(table_k[b, 0]),
                ]
                one = key_ranges(
                    *(x[group[b, h]][places][None] for x in (ranges.lo_GNm, ranges.hi_GNm)),
                    heads=1,
                    keys=m,
                )
                own_q = q[b, head, own[0]]
                own_k, own_v = (x[b, kv_heads[h // 2], own[1]] for x in (k, v))
                found = reference(*(x[None, None] for x in (own_q, own_k, own_v)), one, scale)
                out = out.index_put((torch.tensor(b), torch.tensor(head), own[0]), found[0][0, 0])
                lse = lse.index_put((torch.tensor(b), torch.tensor(head), own[0]), found[1][0, 0])
        return out, lse

    found = run(partial(native, places=places), qkv, ranges)
    assert_same(found, run(moved, [x.double() for x in qkv], ranges), TOLERANCE[dtype])


# Overlapping passes: a key that several see counts in each, as LongNet wants it.
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_passes_are_joined(dtype: torch.dtype) -> None:
    n = 200
    nothing = key_ranges(np.zeros(n), np.zeros(n), heads=4, keys=n)
    cases = [window(n, 4, 30), nothing, scca_flow(n, 4, 20), causal(n, 4)]
    torch.manual_seed(0)
    qkv = [torch.randn(2, heads, n, 16).to(dtype) for heads in (4, 2, 2)]

    def joined(q, k, v, ranges, scale):
        parts = [reference(q, k, v, one, scale) for one in cases]
        lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
        weights = [(own - lse).exp().nan_to_num(0.0)[..., None] for _, own in parts]
        return sum(w * out for w, (out, _) in zip(weights, parts, strict=True)), lse

    def ours(q, k, v, ranges, scale):
        return native_passes(q, k, v, [(one, Places()) for one in cases], scale)

    found = run(ours, qkv, cases[0])
    assert_same(found, run(joined, [x.double() for x in qkv], cases[0]), TOLERANCE[dtype])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["window", "scca-flow", "shifted-chunk", "sink-window", "causal"])
def test_later_keys_change_no_bit_of_earlier_rows(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    q, k, v = make_qkv(case, dtype)
    out, lse = native(q, k, v, case.ranges(), 0.25)
    t = case.N * 5 // 8 + 1
    _, other_k, other_v = make_qkv(case, dtype, seed=9)
    k[:, :, t:], v[:, :, t:] = other_k[:, :, t:], other_v[:, :, t:]
    changed_out, changed_lse = native(q, k, v, case.ranges(), 0.25)
    assert torch.equal(out[:, :, :t], changed_out[:, :, :t])
    assert torch.equal(lse[:, :, :t], changed_lse[:, :, :t])
    assert not torch.equal(out[:, :, t:], changed_out[:, :, t:])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_nobody_sees_may_hold_anything(dtype: torch.dtype) -> None:
    lo, hi = np.array([[3, 20]] * 100), np.array([[9, 50]] * 100)
    ranges = key_ranges(lo[None], hi[None], heads=2, keys=60)
    q, k, v = (torch.randn(1, 2, rows, 16, dtype=dtype) for rows in (100, 60, 60))
    wanted = run(native, [q, k, v], ranges)
    unseen = torch.ones(60, dtype=torch.bool)
    unseen[3:9], unseen[20:50] = False, False
    k[:, :, unseen], v[:, :, unseen] = torch.nan, torch.inf
    found = run(native, [q, k, v], ranges)
    assert all(torch.equal(found[name], want) for name, want in wanted.items())


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_see_nothing_may_hold_anything(value: float, dtype: torch.dtype) -> None:
    lo, hi = np.zeros(100), np.arange(100) + 1
    hi[::3] = 0
    case = Case(name="holes", make=lambda c: key_ranges(lo, hi, heads=c.H, keys=c.N), N=100, D=32)
    qkv, d_out = make_qkv(case, dtype), make_qkv(case, dtype, seed=1)[0]

    def gradients() -> list[torch.Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in qkv)
        out, _ = native(q, k, v, case.ranges(), 0.25)
        return [out, *torch.autograd.grad(out, (q, k, v), d_out)]

    wanted = gradients()
    qkv[0][:, :, ::3], d_out[:, :, ::3] = value, value
    assert all(torch.equal(*pair) for pair in zip(gradients(), wanted, strict=True))


# Gradients of queries and keys are differences from the row's output.
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("width", [4, 16, 40])
def test_values_far_from_zero_leave_gradients_as_they_are_in_float32(width: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 200, 64) for heads in (4, 2, 2))
    qkv = [x.bfloat16() for x in (q, k, v.repeat(1, 1, 1, 4) + 20)]
    ranges = window(200, 4, width)

    def gradients(kernel: Callable, own: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        own = [x.clone().requires_grad_() for x in own]
        return torch.autograd.grad(kernel(*own, ranges, 0.125)[0].sum(), own[:2])

    wanted = gradients(reference, [x.double() for x in qkv])
    for found, want in zip(gradients(native, qkv), wanted, strict=True):
        # That outputs are rounded makes 0.04 to 0.06.
        assert (found.double() - want).norm() < 0.08 * want.norm()


# A training loop finds out by it that a step went wrong.
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_nan_is_not_hidden(at: int, value: float, dtype: torch.dtype) -> None:
    case = BY_NAME["window"]
    qkv, ranges = make_qkv(case, dtype), case.ranges()
    qkv[at][:, :, case.N // 2] = value
    found = run(native, qkv, ranges)
    own = {name: x[:, :, case.N // 2] for name, x in found.items()}
    assert all(x.isnan().flatten(1).any(1).all() for x in own.values())


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    case = BY_NAME["window"]
    qkv = [(x * 30).to(dtype) for x in make_qkv(case, torch.float32)]
    found = run(native, qkv, case.ranges())
    expected = run(reference, [x.double() for x in qkv], case.ranges())
    assert_same({"out": found["out"]}, {"out": expected["out"]}, 1e-2)
    assert all(x.isfinite().all() for x in found.values())


# Rounding a logit of 1e30 is worth more than all exponents of float32.
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [1e6, -1e6, 1e30])
def test_a_huge_scale_leaves_the_value_of_the_greatest_logit(
    scale: float, dtype: torch.dtype
) -> None:
    case = BY_NAME["window"]
    qkv, ranges = make_qkv(case, dtype), case.ranges()
    out, lse = native(*qkv, ranges, scale)
    wanted = reference(*(x.double() for x in qkv), ranges, scale)
    assert torch.equal(out, wanted[0].to(dtype))
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-5, atol=0.0)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_that_see_nothing_have_no_gradient(dtype: torch.dtype) -> None:
    lo, hi = np.zeros(100), np.arange(100) + 1
    hi[::3] = 0
    case = Case(name="holes", make=lambda c: key_ranges(lo, hi, heads=c.H, keys=c.N), N=100)
    q, k, v = (x.requires_grad_() for x in make_qkv(case, dtype))
    out, lse = native(q, k, v, case.ranges(), 0.25)
    assert (out[:, :, ::3] == 0).all()
    assert lse[:, :, ::3].isneginf().all()
    # The infinite lse of those rows goes into the loss on purpose.
    dq, dk, dv = torch.autograd.grad(out.sum() + lse.exp().sum(), (q, k, v))
    assert (dq[:, :, ::3] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


def test_autocast_rounds_nothing() -> None:
    case = BY_NAME["window"]
    qkv, ranges = make_qkv(case, torch.float32), case.ranges()
    plain = run(native, qkv, ranges)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(native, qkv, ranges)
    assert all(torch.equal(found[name], want) for name, want in plain.items())


def test_works_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORTH_THREADS", 0)
    torch.set_num_threads(2)
    case = BY_NAME["gqa-4"]
    qkv, ranges = make_qkv(case, torch.float32), case.ranges()
    with torch.inference_mode():
        out, _ = native(*[x + 0 for x in qkv], ranges, 0.25)
    assert torch.equal(out, native(*qkv, ranges, 0.25)[0])


@pytest.mark.parametrize(
    "text",
    [
        "strided(5)",
        "dilated(9, [1, 4])",
        "sda.neighborhood(7, 3)",
        "ssa(20, 5)",
        "longnet([16, 32, 64], [1, 2, 4])",
        "diagonals(5)",
        "longformer(20, tokens=[0, 50])",
        "longmixed(16, 3)",
    ],
)
@pytest.mark.parametrize(("n", "heads", "key_heads"), [(120, 8, 2), (97, 4, 4)])
def test_orders_need_no_gathering(
    text: str, n: int, heads: int, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("rows were moved")

    plan = ls.plan(ls.parse(text), n, heads)
    torch.manual_seed(0)
    qkv = [torch.randn(2, h, n, 16) for h in (heads, key_heads, key_heads)]

    def through(impl: str) -> Callable:
        return lambda q, k, v, *_: ls.attend(q, k, v, plan, return_lse=True, impl=impl, scale=0.3)

    wanted = run(through("reference"), [x.double() for x in qkv], None)
    monkeypatch.setattr("longspan.ops.rows.Table.take", never)
    assert_same(run(through("native"), qkv, None), wanted, 1e-5)


def test_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["window"]
    qkv, ranges = make_qkv(case), case.ranges()
    with pytest.raises(Refusal, match="computes in float32, the tensors are float64"):
        choose("native", *qkv, ranges)
    single = [x.float() for x in qkv]
    assert choose("auto", *single, ranges).name == "native"
    monkeypatch.setattr(module, "level", lambda: 0)
    with pytest.raises(Refusal, match="no AVX2"):
        choose("native", *single, ranges)
    monkeypatch.setattr(module, "library", lambda: None)
    with pytest.raises(Refusal, match="was not compiled"):
        choose("native", *single, ranges)
    # A choice is kept with the ranges.
    assert choose("auto", *single, case.ranges()).name == "tiled"


def test_few_queries_over_many_keys_are_left_to_tiled() -> None:
    def chosen(heads: int, n: int, keys: int) -> str:
        q, k = torch.randn(1, heads, n, 16), torch.randn(1, 2, keys, 16)
        ranges = key_ranges(np.zeros(n), np.full(n, keys), heads=heads, keys=keys)
        return choose("auto", q, k, k, ranges).name

    assert chosen(2, 1, 4096) == chosen(4, 2, 4096) == "tiled"
    assert chosen(2, 1, 200) == chosen(2, 16, 4096) == chosen(8, 4, 4096) == "native"


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_few_queries_see_and_where_it_lies(dtype: torch.dtype) -> None:
    """``tiled`` would copy a cache with room to grow; no kernel reads what nobody sees."""
    turned = dtype == torch.float16
    amx = dtype == torch.bfloat16 and module.level() == module._AMX

    def chosen(seen: int, *, room: bool) -> str:
        q, k = (torch.randn(1, 2, n, 16, dtype=dtype) for n in (1, 6000 + 50 * room))
        ranges = key_ranges(np.full(1, 6000 - seen), np.full(1, 6000), heads=2, keys=6000)
        found = [choose("auto", q, x, x, ranges).name for x in (k[:, :, :6000], k[:, :, -6000:])]
        assert found[0] == found[1]
        return found[0]

    native = "tiled" if turned or amx else "native"
    assert chosen(2048, room=False) == native
    assert chosen(2049, room=False) == "tiled"
    assert chosen(2049, room=True) == chosen(6000, room=True) == native


def test_a_choice_for_new_tokens_depends_on_where_keys_lie() -> None:
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 6050, 16)
    ranges = key_ranges(np.zeros(1), np.full(1, 6000), heads=2, keys=6000)
    keys = k[:, :, :6000]
    found = [choose("auto", q, x, x, ranges).name for x in (keys, keys.contiguous(), keys)]
    assert found == ["native", "tiled", "native"]


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_queries_over_keys_in_another_order_are_not_gathered_for_tiled(
    dtype: torch.dtype,
) -> None:
    def chosen(keys: int) -> str:
        q, k = (torch.randn(1, 2, n, 16, dtype=dtype) for n in (1, keys))
        ranges = key_ranges(np.zeros(1), np.full(1, keys // 8), heads=2, keys=keys)
        return choose("auto", q, k, k, ranges, moved=True).name

    assert chosen(4096) == "native"
    turned = dtype == torch.float16
    amx = dtype == torch.bfloat16 and module.level() == module._AMX
    assert chosen(4224) == ("tiled" if turned or amx else "native")


def test_a_library_of_other_sources_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fingerprint", lambda: 1)
    module.library.cache_clear()
    try:
        assert module.library() is None
    finally:
        module.library.cache_clear()


@pytest.mark.parametrize("what", [b"", b"\x7fELF of another machine"])
def test_a_broken_library_is_left_alone(
    what: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "native.so"
    broken.write_bytes(what)
    other = ctypes.util.find_library("m")
    for found in (broken, Path(other) if other else broken):
        monkeypatch.setattr(module, "LIBRARY", found)
        module.library.cache_clear()
        try:
            assert module.library() is None
        finally:
            module.library.cache_clear()


def test_builds_anew_and_says_why_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler()
    copy = shutil.copytree(build.FOLDER, tmp_path / "native")
    (copy / "native.so").unlink()
    monkeypatch.setattr(build, "FOLDER", copy)
    monkeypatch.setattr(build, "LIBRARY", copy / "native.so")
    assert build.build() == ""
    assert ctypes.CDLL(str(copy / "native.so")).longspan_level() == module.level()
    assert [path.name for path in copy.glob("*.so")] == ["native.so"]
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in build.build()
    # What worked before is still there.
    assert (copy / "native.so").exists()
    before = build.fingerprint()
    (copy / "native.h").write_text((copy / "native.h").read_text() + "\n")
    assert build.fingerprint() != before


@pytest.mark.parametrize(("without", "most"), [("AMX", 3), ("BF16", 2)])
def test_compilers_that_do_not_know_all_instructions(
    without: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old-cc"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *-DLONGSPAN_WITHOUT_{without}*) exec {compiler()} "$@";; esac\n'
        "exit 1\n"
    )
    old.chmod(0o700)
    monkeypatch.setenv("CC", str(old))
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "native.so")
    assert build.build() == ""
    found = ctypes.CDLL(str(tmp_path / "native.so"))
    assert found.longspan_level() == min(module.level(), most)
    for level in LEVELS:
        # A tile of one row is that of a level without code.
        known = level <= most and module.library().longspan_tile(level) > 1
        assert (found.longspan_tile(level) > 1) == known
