"""Keys that the tiled kernel gathers: the same values, and only where segments are many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.ops.cases import CASES, Case, make_qkv, run
from tests.ops.test_tiled import assert_same

import longspan as ls
from longspan.ops.kernels import _tiled_schedule as schedule_module
from longspan.ops.kernels import tiled as tiled_module
from longspan.ops.kernels._tiled_runs import Costs, Mask, Run
from longspan.ops.kernels._tiled_schedule import Schedule
from longspan.ops.kernels.reference import reference
from longspan.ops.kernels.tiled import tiled
from longspan.ops.loading import load
from longspan.pattern import Blocks, VerticalSlash

# Rows of 3 see nothing, and neither do those past the end of the map.
MAP = [[0, 5, 9], [2, 7], [1, 3, 11], [], [4, 12], [0, 3, 6, 9, 12], [10], [2, 3, 4, 11], [8]]
PATTERNS = {
    "bigbird": ls.parse("bigbird(16, 2)"),
    "random_blocks": ls.parse("random_blocks(16, 3)"),
    "blocks": Blocks(tuple(map(tuple, MAP)), 16),
    "blocks-causal": Blocks(tuple(map(tuple, MAP)), 16, causal=True),
    "vertical_slash": VerticalSlash((3, 40, 41, 77, 150), (0, 1, 30, 64, 101)),
    "vertical_slash-blocks": VerticalSlash((9, 60, 133), (0, 48, 100), 16),
}
CAUSAL = [name for name, pattern in PATTERNS.items() if pattern.is_causal]
REGULAR = [
    "window(512)",
    "window(129, causal=false)",
    "sink(4) | window(128)",
    "chunk(512)",
    "shifted_chunk(1024)",
    "scca.flow(128)",
    "strided(16)",
    "dilated(128, 8)",
    "ssa(256, 16)",
    "sda(1024, 8)",
    "longnet([256, 512, 1024], [1, 2, 4])",
]


def gathered(schedule: Schedule) -> list[Run]:
    return [run for runs in schedule.runs for run in runs if run.blocks_CB is not None]


@pytest.fixture
def schedules(monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """The schedules that a test makes; copying costs nothing there, everything else does."""
    made: list[Schedule] = []

    def build(*given: Any, **named: Any) -> Schedule:
        made.append(schedule_module.build_schedule(*given, **named))
        return made[-1]

    monkeypatch.setattr(tiled_module, "build_schedule", build)
    monkeypatch.setattr(schedule_module, "_REGULAR", 0)
    monkeypatch.setattr(schedule_module, "_FEW", 0)
    for way in ("_FORWARD", "_BACKWARD"):
        eager = replace(getattr(tiled_module, way), costs=Costs(call=0, score=0, copy=-1))
        monkeypatch.setattr(tiled_module, way, eager)
    return made


def attend(pattern, qkv, impl: str, **more) -> dict[str, torch.Tensor]:
    """Output, lse and gradients of a plan of a pattern."""
    plan = ls.plan(pattern, qkv[0].shape[2], qkv[0].shape[1], **more)

    def kernel(q, k, v, ranges, scale):
        return ls.attend(q, k, v, plan, scale=scale, impl=impl, return_lse=True)

    return run(kernel, qkv, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranges_of_all_kinds(case: Case, dtype: torch.dtype, schedules) -> None:
    qkv, ranges = make_qkv(case, dtype), case.ranges()
    found = run(tiled, qkv, ranges)
    expected = run(reference, [x.double() for x in qkv], ranges)
    assert_same(found, expected, {8: 1e-10, 4: 1e-5, 2: 1e-2}[dtype.itemsize])
    # Most are windows or see nearly everything.
    assert any(map(gathered, schedules)) or case.name not in ("scattered-smooth", "sink-window")


@pytest.mark.parametrize("n", [256, 203])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str, key_heads: int, n: int, schedules) -> None:
    qkv = make_qkv(Case(name=name, make=None, B=2, H=4, K=key_heads, N=n, Dv=8))
    assert_same(
        attend(PATTERNS[name], qkv, "tiled"), attend(PATTERNS[name], qkv, "reference"), 1e-10
    )
    assert any(map(gathered, schedules))


@pytest.mark.parametrize("name", PATTERNS)
def test_padding_and_packed_documents(name: str, schedules) -> None:
    n = 301
    qkv = make_qkv(Case(name=name, make=None, B=3, H=4, K=2, N=n))
    segments = torch.zeros(3, n, dtype=torch.int64)
    segments[0, :21] = segments[1, -35:] = -1
    segments[2, 130:] = 1
    found, expected = (
        attend(PATTERNS[name], qkv, impl, segments=segments) for impl in ("tiled", "reference")
    )
    assert_same(found, expected, 1e-10)
    assert (found["dq"][0, :, :21] == 0).all()
    assert any(map(gathered, schedules))


@pytest.mark.parametrize("name", CAUSAL)
def test_later_keys_change_no_bit_of_earlier_rows(name: str, schedules) -> None:
    n, t = 300, 187
    q, k, v = make_qkv(Case(name=name, make=None, H=4, K=2, N=n), torch.float32)
    before = ls.attend(q, k, v, PATTERNS[name], impl="tiled", return_lse=True)
    k[:, :, t:], v[:, :, t:], q[:, :, t:] = 7.0, 5.0, -3.0
    after = ls.attend(q, k, v, PATTERNS[name], impl="tiled", return_lse=True)
    assert all(torch.equal(x[:, :, :t], y[:, :, :t]) for x, y in zip(before, after, strict=True))
    assert any(map(gathered, schedules))


def test_small_jobs_and_batches(schedules, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered keys are cut into several jobs too, and joined again through lse."""
    monkeypatch.setattr(schedule_module, "_GATHERED", 1)
    for way in ("_FORWARD", "_BACKWARD"):
        small = replace(getattr(tiled_module, way), job=64, area=64)
        monkeypatch.setattr(tiled_module, way, small)
    case = Case(name="", make=None, B=2, H=4, K=2, N=900)
    pattern = ls.parse("random_blocks(16, 24)")
    qkv = make_qkv(case)
    assert_same(attend(pattern, qkv, "tiled"), attend(pattern, qkv, "reference"), 1e-10)
    assert max(run.wave for schedule in schedules for run in gathered(schedule)) > 0


def test_several_threads_and_layouts_compute_the_same(
    schedules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_module, "_WORTH_THREADS", 0)
    pattern = PATTERNS["bigbird"]
    qkv = make_qkv(Case(name="", make=None, B=2, H=4, K=2, N=203))
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        once, again = attend(pattern, qkv, "tiled"), attend(pattern, qkv, "tiled")
        assert all(torch.equal(once[name], again[name]) for name in once)
        assert_same(attend(pattern, moved, "tiled"), once, 1e-12)
    finally:
        torch.set_num_threads(threads)
    assert all(len(schedule.parts) == 2 for schedule in schedules)
    assert all(map(gathered, schedules))


def plans(text: str, n: int, way: str) -> list[tuple[Schedule, Schedule]]:
    """Of each pass of a pattern, the schedule with gathering and the one without."""
    heads, found = 4, []
    q, k = (torch.zeros(1, heads, n, 64) for _ in range(2))
    for one in ls.plan(ls.parse(text), n, heads).passes:
        ranges = load(one, q, k).ranges
        rows, keys = (torch.zeros(1, heads, count, 64) for count in (ranges.queries, ranges.keys))
        ours = getattr(tiled_module, way)
        without = replace(ours, costs=None)
        found.append(
            tuple(tiled_module._plan(ranges, rows, keys, each)[0] for each in (ours, without))
        )
    return found


def described(schedule: Schedule) -> list[list[tuple[Any, ...]]]:
    """Runs by value, their masks too."""

    def of(mask: Mask | None) -> tuple[Any, ...] | None:
        if mask is None:
            return None
        return mask.lo_Tm.tolist(), mask.hi_Tm.tolist(), mask.span, mask.left, mask.right

    return [[(replace(run, mask=None), of(run.mask)) for run in runs] for runs in schedule.runs]


@pytest.mark.parametrize("way", ["_FORWARD", "_BACKWARD"])
@pytest.mark.parametrize("n", [700, 4096])
@pytest.mark.parametrize("text", REGULAR)
def test_regular_patterns_gather_nothing(text: str, n: int, way: str) -> None:
    for ours, without in plans(text, n, way):
        assert not gathered(ours)
        assert described(ours) == described(without)


@pytest.mark.parametrize("way", ["_FORWARD", "_BACKWARD"])
@pytest.mark.parametrize("text", ["bigbird(64, 3)", "random_blocks(64, 4, causal=false)"])
def test_scattered_blocks_are_few_batches_without_scores_in_vain(text: str, way: str) -> None:
    n = 2048
    ((ours, without),) = plans(text, n, way)
    work = []
    for schedule in (ours, without):
        batches = [b for p in range(len(schedule.parts)) for b in schedule.batches(p, apart=True)]
        work.append((len(batches), sum(b.jobs * b.run.rows * b.run.span for b in batches)))
    (few, scores), (many, more) = work
    assert gathered(ours)
    assert 4 * few < many
    assert scores <= more
    # Each leaf in one job.
    assert {run.wave for runs in ours.runs for run in runs} == {0}


def test_gathered_blocks_are_those_that_the_leaf_sees() -> None:
    (((schedule, _),)) = plans("random_blocks(64, 4, causal=false)", 2048, "_FORWARD")
    q = torch.zeros(1, 4, 2048, 64)
    (one,) = ls.plan(ls.parse("random_blocks(64, 4, causal=false)"), 2048, 4).passes
    mask_GNM = load(one, q, q).ranges.mask_GNM().numpy()
    for group, runs in enumerate(schedule.runs):
        for each in runs:
            if each.blocks_CB is None:
                continue
            for i, block_B in enumerate(each.blocks_CB):
                row = each.row + i * each.row_step
                seen_M = mask_GNM[group, row : row + each.rows].any(0)
                assert np.array_equal(np.flatnonzero(seen_M[::16]), block_B)
