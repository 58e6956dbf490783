"""Plans of the Hopper kernel, and a stand-in that goes through them on the CPU."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops import cases
from tests.ops.cases import On
from tests.ops.test_flex import regrouped, scattered, shifted, tensors, window

from longspan.errors import Refusal
from longspan.ops import kept
from longspan.ops.kernels import _hopper_calls, _hopper_parts, _hopper_plan, _hopper_tasks
from longspan.ops.kernels.reference import reference
from longspan.ops.merge import merge
from longspan.ops.ranges import KeyRanges

module = importlib.import_module("longspan.ops.kernels.hopper")


def alternating(n: int, keys: int, ranges: int, heads: int) -> KeyRanges:
    """Blocks of 64 rows that see blocks of keys of their own; a tile of rows holds two of them."""
    generator = torch.Generator().manual_seed(ranges)
    blocks = -(-n // 64)
    at = torch.stack(
        [
            torch.randperm(keys // 64, generator=generator)[:ranges].sort().values
            for _ in range(blocks)
        ]
    )
    lo_GNm = (at * 64).repeat_interleave(64, 0)[None, :n].int()
    return KeyRanges(lo_GNm, lo_GNm + 64, torch.zeros(1, heads, dtype=torch.int64), keys)


def gaps(n: int = 700) -> KeyRanges:
    """Tiles of keys that nobody sees between others, and heads that see one key in one row."""
    lo_GNm, hi_GNm = torch.zeros(2, 2, n, 1, dtype=torch.int32)
    hi_GNm[0, :300] = 60
    lo_GNm[0, 500:] = 500
    hi_GNm[0, 500:, 0] = torch.arange(501, n + 1)
    lo_GNm[1, -1], hi_GNm[1, -1] = n - 1, n
    return KeyRanges(lo_GNm, hi_GNm, torch.tensor([[0, 1, 1, 1]]), n)


PLANNED = {
    "gaps": (gaps, 1, 4, 2),
    **{str(case): (case.ranges, case.B, case.H, case.K) for case in cases.CASES},
    "per batch row": (
        lambda: regrouped(
            scattered(290, 270, ranges=2, groups=2, batch=1, heads=1), [[0] * 4, [1] * 4]
        ),
        2,
        4,
        2,
    ),
    **{
        f"{m} ranges": (
            lambda m=m: scattered(700, 900, ranges=m, groups=3, batch=2, heads=4, seed=m),
            2,
            4,
            2,
        )
        for m in range(1, 6)
    },
    "blocks of 64": (lambda: alternating(500, 1024, 5, 2), 1, 2, 1),
    "own key": (lambda: window(300, 1, heads=2), 1, 2, 2),
    "shifted": (lambda: shifted(1000, 256, heads=8), 1, 8, 2),
}


def split_keys(monkeypatch, parts):
    """Every task is split, as far as it has tiles."""
    for name, value in (
        ("PROGRAMS", 1 << 30),
        ("MOST_PARTS", parts),
        ("_LEAST", 1),
        ("_ONCE", 0),
        ("_JOINED", 0),
        ("_WORTH", 1),
    ):
        monkeypatch.setattr(_hopper_parts, name, value)
    forget_plans(monkeypatch)


def forget_plans(monkeypatch):
    monkeypatch.setattr(_hopper_plan.PLANS, "latest", [])
    monkeypatch.setattr(_hopper_plan.PLANS, "by_ranges", WeakKeyDictionary())


def plan(ranges, batch, heads, key_heads, *, shared=False):
    own = 1 if shared else batch
    return _hopper_plan.plan_of(ranges, (batch, heads), (own, key_heads), 512)


def in_rows(ranges, batch, least=3):
    """At least so many batch rows, which differ in what they see wherever heads do."""
    batch = max(batch, least)
    group_BH = ranges.group_BH[torch.arange(batch) % len(ranges.group_BH)]
    turned = [row.roll(b) for b, row in enumerate(group_BH)]
    return batch, KeyRanges(ranges.lo_GNm, ranges.hi_GNm, torch.stack(turned), ranges.keys)


def unpacked(made: _hopper_plan.HopperPlan):
    """Tasks as (row, head, batch row of the output, edges, entries)."""
    for row, head, batch, first, edges, count, key, about in made.tasks.tolist():
        entries = made.entries[first : first + count].tolist()
        if made.parts > 1 and about == _hopper_parts._HIDDEN and entries[0] != [key, about]:
            # A part without entries.
            assert edges == count == 1
            entries = [[key, about]]
        assert entries[0] == [key, about]
        assert 1 <= edges <= count
        yield row, head, batch, edges, entries


def seen(made: _hopper_plan.HopperPlan, row: int, key: int, about: int, *, whole: bool):
    """bool [128, 128]: what the kernel takes of a tile, going by the bits of its entry."""
    key_S = torch.arange(key, key + 128)
    lo, hi = (x[about >> 6, row : row + 128, None] for x in (made.lo_PN, made.hi_PN))
    inside = torch.ones(len(lo), 128, dtype=torch.bool)
    if about & 15:
        inside = key_S >= lo if about & 16 else key_S < hi
        if about & 32:
            inside = inside & (key_S >= lo)
    for half in range(2):
        kind = about >> 2 * half & 3
        if kind >= 2 and not whole:
            inside[64 * half : 64 * half + 64, 64:128] &= kind == 3
            inside[64 * half : 64 * half + 64, :64] &= kind == 2
    return inside


@pytest.mark.parametrize("parts", [1, 2, 5, 32])
@pytest.mark.parametrize("name", PLANNED)
def test_every_pair_is_in_one_entry_and_full_ones_are_full(name, parts, monkeypatch):
    if parts > 1:
        split_keys(monkeypatch, parts)
    build, *shape = PLANNED[name]
    made = check_plan(build(), *shape)
    assert made.parts <= parts


def check_plan(ranges, batch, heads, key_heads, *, shared=False):
    n, keys = ranges.queries, ranges.keys
    made = plan(ranges, batch, heads, key_heads, shared=shared)
    for x in (made.lo_PN, made.hi_PN, made.entries, made.tasks):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    assert made.lo_PN.shape == made.hi_PN.shape == (ranges.lo_GNm[:, 0].numel(), n)
    counted = torch.zeros(batch, heads, n, keys + 128, dtype=torch.int32)
    tasks = set()
    for row, head, out_b, edges, entries in unpacked(made):
        tasks.add((row, head, out_b))
        part, b = divmod(out_b, batch)
        assert all(about & 15 for _, about in entries[1:edges])
        for at, (key, about) in enumerate(entries):
            assert 0 <= key < keys + (made.parts > 1)
            # All but the first one and the edges are whole, and the first one if any is; a part
            # may begin with any edge.
            leads = part == at == 0 < edges < len(entries)
            assert about & 63 == 0 if at >= edges or leads else True
            assert about & 15 or 0 in (at, about & 63)
            inside = seen(made, row, key, about, whole=at == 0)
            counted[b, head, row : row + 128, key : key + 128] += inside
    assert len(tasks) == len(made.tasks) == made.parts * batch * heads * -(-n // 128)
    assert {out_b for *_, out_b in tasks} == set(range(made.parts * batch))
    expected = ranges.mask_GNM()[ranges.group_BH.expand(batch, heads)]
    assert (counted[..., :keys] == expected).all()
    assert (counted[..., keys:] == 0).all()
    assert len(made.entries) - 1 <= _hopper_plan.most_tiles(ranges)
    return made


# Around whole tiles and halves of them.
LENGTHS = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 256, 257, 384, 385])


@st.composite
def any_ranges(draw):
    """Ranges of any kind, and batch rows, heads and key heads."""
    n, keys, count, groups = draw(LENGTHS), draw(LENGTHS), draw(count_of(4)), draw(count_of(4))
    batch, (heads, key_heads) = draw(count_of(2)), draw(st.sampled_from([(1, 1), (4, 2), (3, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    # Rows that stay alike for a while, bounds at any key or at whole tiles, ranges that touch.
    alike, grain = draw(st.sampled_from([1, 63, 64, 128, 1000])), draw(st.sampled_from([1, 64]))
    blocks = -(-n // alike)
    cuts = rng.integers(0, keys // grain + 2, (groups, blocks, 2 * count)) * grain
    cuts = np.sort(cuts.clip(max=keys).repeat(alike, 1)[:, :n], 2)
    if draw(st.booleans()):
        cuts[..., 2::2] = cuts[..., 1:-1:2]
    slide = draw(st.booleans()) * np.arange(n)[:, None]
    lo, hi = ((cuts[..., at::2] + slide).clip(max=keys) for at in range(2))
    gone = (rng.random(lo.shape) < draw(st.sampled_from([0, 0.1, 0.9]))) | (lo >= hi)
    # What is empty may begin behind its end, and lie anywhere.
    lo[gone] = rng.integers(0, keys + 1, gone.sum())
    hi[gone] = lo[gone] * draw(st.booleans())
    group = rng.integers(0, groups, (draw(st.sampled_from([1, batch])), heads))
    return cases.key_ranges(lo, hi, group, heads=heads, keys=keys), batch, heads, key_heads


def count_of(most):
    return st.integers(1, most)


@pytest.mark.parametrize("parts", [1, 3, 32])
@settings(max_examples=60, deadline=None)
@given(any_ranges(), st.booleans())
def test_every_pair_of_any_ranges_is_in_one_entry(parts, given, shared):
    with pytest.MonkeyPatch.context() as patch:
        if parts > 1:
            split_keys(patch, parts)
        check_plan(*given, shared=shared)


def test_few_tiles_are_visited(monkeypatch):
    monkeypatch.setattr(_hopper_parts, "PROGRAMS", 0)
    n = 4096
    for ranges, most in (
        # A tile of rows sees W + 127 keys.
        (window(n, 1024, heads=2), 9),
        (window(n, 1, heads=2), 1),
        (cases.causal(n, 2), n // 128),
        (cases.sink_window(n, 2, 128, 1024), 10),
        # As many as two blocks of rows have.
        (alternating(n, n, 7, 2), 14),
    ):
        made = plan(ranges, 1, 2, 1)
        assert made.tasks[:, 5].max() == most
    # All but the first and the last tile of a window, and the diagonal, need no mask; each half of
    # the rows sees half of one of them, and one bound cuts.
    first_half, last_half, begins = 1 + (3 << 2), 2 + (1 << 2), 16
    for ranges, bits in (
        (window(n, 1024, heads=2), [0, first_half + begins, last_half]),
        (cases.causal(n, 2), [0, last_half]),
    ):
        made = plan(ranges, 1, 2, 1)
        (entries,) = (e for row, head, _, _, e in unpacked(made) if (row, head) == (2048, 0))
        assert [about & 63 for _, about in entries[: len(bits) + 1]] == [*bits, 0]
        assert made.tasks[:, 4].max() == len(bits)


def test_gaps_between_the_rows_of_a_tile_hold_no_tiles():
    lo = np.r_[np.zeros(64), np.full(64, 100_000)]
    ranges = cases.key_ranges(lo, lo + 130, heads=1, keys=200_000)
    made = plan(ranges, 1, 1, 1)
    assert made.entries[:-1, 0].tolist() == [128 * at for at in (0, 1, 781, 782)]


def test_long_tasks_first_in_sections_of_key_heads(monkeypatch):
    ranges = cases.causal(512, 4)
    monkeypatch.setattr(_hopper_plan, "_SECTION_BYTES", 512 * 512)
    tasks = plan(ranges, 1, 4, 2).tasks[:, :2].tolist()
    half = [[row, head] for row in (384, 256, 128, 0) for head in (0, 1)]
    assert tasks == [*half, *([row, head + 2] for row, head in half)]
    monkeypatch.setattr(_hopper_plan, "_SECTION_BYTES", 2 * 512 * 512)
    tasks = plan(ranges, 1, 4, 2).tasks[:, :2].tolist()
    assert tasks == [[row, head] for row in (384, 256, 128, 0) for head in range(4)]
    # As long: in the order of key heads, rows, and heads of a key head.
    ranges = window(512, 1, heads=4)
    tasks = plan(ranges, 1, 4, 2).tasks[:, :2].tolist()
    assert tasks == [
        [row, head] for pair in ((0, 1), (2, 3)) for row in (0, 128, 256, 384) for head in pair
    ]


def test_plans_are_kept(monkeypatch):
    monkeypatch.setattr(_hopper_plan.PLANS, "latest", [])
    one, same, other = window(300, 40), window(300, 40), window(300, 41)
    made = plan(one, 1, 2, 1)
    assert plan(one, 1, 2, 1) is made
    assert plan(same, 1, 2, 1) is made
    assert plan(other, 1, 2, 1) is not made
    assert plan(one, 2, 2, 1) is not made
    assert plan(one, 1, 2, 2) is not made
    monkeypatch.setattr(kept, "_MOST_BYTES", 0)
    plan(window(300, 42), 1, 2, 1)
    assert _hopper_plan.PLANS.latest == []


def test_what_is_made_in_inference_mode_serves_training():
    ranges = scattered(300, 200, ranges=2, groups=3, batch=2, heads=4)
    with torch.inference_mode():
        made = plan(ranges, 2, 4, 2)
    tables = (made.lo_PN, made.hi_PN, made.entries, made.tasks)
    assert not any(x.is_inference() for x in tables)


def test_a_plan_of_a_million_rows():
    n = 1 << 20
    made = plan(window(n, 1024, heads=8), 1, 8, 2)
    assert len(made.tasks) == 8 * n // 128
    assert made.tasks[:, 0].max() == n - 128
    assert len(made.entries) == 9 * (n // 128) - sum(range(1, 9)) + 1


def test_few_tasks_of_many_tiles_are_split():
    def sizes(ranges, batch, heads):
        made = plan(ranges, batch, heads, 1)
        return made.parts, made.tasks[:, 5].tolist()

    # Three global rows, and one query of a decoding step.
    assert sizes(cases.dense(3, 32, 32768), 1, 32) == (4, 128 * [64])
    assert sizes(window(1, 4000, keys=4000, heads=8), 2, 8) == (2, 32 * [16])
    assert sizes(window(1, 40_000, keys=40_000, heads=1), 1, 1) == (19, [17] * 9 + [16] * 10)
    assert sizes(cases.dense(1, 1, 1 << 20), 1, 1) == (32, 32 * [256])
    # As many turns of all processors as there are, nearly full ones.
    assert sizes(cases.dense(1, 48, 131_072), 1, 48)[0] == 11
    # Few tiles, or nothing to gain.
    assert sizes(window(1, 3900, keys=3900, heads=8), 2, 8) == (1, 16 * [31])
    assert sizes(cases.dense(1, 120, 32768), 1, 120) == (1, 120 * [256])
    assert sizes(cases.dense(1, 132, 32768), 1, 132) == (1, 132 * [256])
    assert sizes(window(32768, 1024, heads=1), 1, 1)[0] == 1


def test_short_tasks_have_fewer_parts_and_long_ones_come_first():
    # Heads of 100, 50, 3 and no tiles.
    seen = 128 * np.array([[100], [50], [3], [0]])
    ranges = cases.key_ranges(0 * seen, seen, [[0, 1, 2, 3]], heads=4, keys=20_000)
    made = plan(ranges, 1, 4, 1)
    assert made.parts == 6
    lengths = [tuple(sorted(len(e) for _, h, *_, e in unpacked(made) if h == x)) for x in range(4)]
    assert lengths == [
        (16, 16, 17, 17, 17, 17),
        (1, 1, 1, 16, 17, 17),
        (1, 1, 1, 1, 1, 3),
        (1, 1, 1, 1, 1, 1),
    ]
    assert (made.tasks[:, 5].diff() <= 0).all()


def test_batch_rows_that_share_keys_run_together(monkeypatch):
    ranges = window(256, 1, heads=2)
    monkeypatch.setattr(_hopper_plan, "_SECTION_BYTES", 0)
    for shared in (False, True):
        tasks = plan(ranges, 2, 2, 2, shared=shared).tasks[:, :3].tolist()
        if shared:
            order = [(row, head, b) for head in (0, 1) for row in (0, 128) for b in (0, 1)]
        else:
            order = [(row, head, b) for b in (0, 1) for head in (0, 1) for row in (0, 128)]
        assert [tuple(task) for task in tasks] == order


# The kernel's way through a plan, one task after another.


def for_each_row(q, k, v, ranges, scale):
    """The oracle; gradients of keys that batch rows share are summed over them."""
    return reference(q, *(x.expand(len(q), -1, -1, -1) for x in (k, v)), ranges, scale)


def executed(made, q, k, v, scale, length=None):
    return merge(list(zip(*executed_parts(made, q, k, v, scale, length), strict=True)))


def executed_parts(made, q, k, v, scale, length=None):
    """Output and log-sum-exp of each part, the first axis.

    With a length, keys are those of all batch rows in turn.
    """
    many = made.parts * len(q), *q.shape[1:3]
    out = torch.full((*many, v.shape[3]), math.nan, dtype=q.dtype)
    lse = torch.full(many, math.nan, dtype=q.dtype)
    share = q.shape[1] // k.shape[1]
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 128)) for x in (k, v))
    for row, head, out_b, _, entries in unpacked(made):
        rows, b = slice(row, row + 128), out_b % len(q)
        own = q[b, head, rows]
        top, total = own.new_full((len(own),), -math.inf), own.new_zeros(len(own))
        acc = own.new_zeros(len(own), v.shape[3])
        for at, (key, about) in enumerate(entries):
            key_b, at_key = divmod(key, length) if length else (b if len(k) > 1 else 0, key)
            own_k, own_v = (x[key_b, head // share, at_key : at_key + 128] for x in (k, v))
            s = own @ own_k.mT * scale
            s = s.where(seen(made, row, key, about, whole=at == 0), -math.inf)
            new = torch.maximum(top, s.amax(1))
            base = new.where(new > -math.inf, 0.0)
            p, shrink = (s - base[:, None]).exp(), (top - base).exp()
            top, total = new, total * shrink + p.sum(1)
            acc = acc * shrink[:, None] + p @ own_v
        out[out_b, head, rows] = torch.where(total[:, None] == 0, 0.0, acc / total[:, None])
        lse[out_b, head, rows] = torch.where(total == 0, -math.inf, top + total.log())
    return out.unflatten(0, (made.parts, -1)), lse.unflatten(0, (made.parts, -1))


def check_execution(q, k, v, ranges, batch, heads, key_heads, *, shared=False):
    made = plan(ranges, batch, heads, key_heads, shared=shared)
    expected = for_each_row(q, k, v, ranges, 0.3)
    for found, value in zip(executed(made, q, k, v, 0.3), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_going_through_a_plan_equals_the_oracle(case, parts, shared, monkeypatch):
    if parts > 1:
        split_keys(monkeypatch, parts)
    q, k, v = cases.make_qkv(case)
    batch, ranges = case.B, case.ranges()
    if shared:
        batch, ranges = in_rows(ranges, batch)
        q = torch.cat([q, -q, q.flip(2)])[:batch]
        k, v = k[:1], v[:1]
    check_execution(q, k, v, ranges, batch, case.H, case.K, shared=shared)


@pytest.mark.parametrize("parts", [2, 3, 32])
@settings(max_examples=30, deadline=None)
@given(any_ranges())
def test_going_through_parts_of_any_ranges_equals_the_oracle(parts, given):
    ranges, batch, heads, key_heads = given
    shape = batch, heads, key_heads, ranges.queries, ranges.keys, 8, 8
    with pytest.MonkeyPatch.context() as patch:
        split_keys(patch, parts)
        check_execution(*(x.double() for x in tensors(*shape)), *given)


def test_far_longer_tasks_do_not_begin_last(monkeypatch):
    monkeypatch.setattr(_hopper_tasks, "PROGRAMS", 4)
    grid = torch.zeros(1, 4, 10, 1, 8, dtype=torch.int32)
    grid[..., 0] = torch.arange(10)[:, None]
    grid[..., 1] = torch.arange(4)[:, None, None]
    grid[..., 5] = 3
    grid[:, :, 7, 0, 5] = 12

    def order(section):
        return [
            tuple(one)
            for one in _hopper_tasks.in_order(grid.flatten(2, 3), section)[:, :2].tolist()
        ]

    rest = [(row, head) for head in range(4) for row in (7, 0, 1, 2, 3, 4, 5, 6, 8, 9)]
    # In the last head four programs have 39 tiles, and one of them 12.
    late = [(7, 3)]
    assert order(1) == late + [one for one in rest if one not in late]
    # All heads together: long ones are first anyway.
    assert order(4)[:4] == [(7, head) for head in range(4)]
    # Tasks that differ little stay in their sections, as the last ones do.
    grid[:, :, 7, 0, 5] = 6
    assert order(1) == rest


def test_what_is_kept_for_ranges_tells_calls_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(module, "missing_gluon", lambda: None)
    ranges = window(512, 100, heads=4)

    def ready(scale=1.0, *, backward=False, batch=1, width=64, dtype=torch.bfloat16):
        q, k = (On(batch, heads, 512, width, dtype=dtype) for heads in (4, 2))
        return module._ready(q, k, k, ranges, scale, backward=backward)

    first = ready()
    assert ready() is first
    assert first.back is None
    others = [
        ready(0.5),
        ready(backward=True),
        ready(batch=2),
        ready(width=128),
        ready(dtype=torch.float16),
    ]
    assert len({id(one) for one in (first, *others)}) == 6
    assert (first.scale, others[0].scale) == (1.0, 0.5)
    assert others[1].back is not None
    assert len(others[2].plan.tasks) == 2 * len(first.plan.tasks)
    # Nothing that was allowed before stays so.
    monkeypatch.setattr(module, "needs_grad", lambda *_: True)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(Refusal, match="not deterministically"):
            ready(backward=True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("parts", [1, 3])
def test_outputs_of_parts_are_joined_in_the_layout_of_the_queries(parts, monkeypatch):
    if parts > 1:
        split_keys(monkeypatch, parts)
    ranges = scattered(290, 700, ranges=2, groups=3, batch=2, heads=4)
    given = tensors(2, 4, 2, 290, 700, 8, 16)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in given)
    made = plan(ranges, 2, 4, 2)
    assert made.parts == parts
    joined = []

    def launched(_, grid, args, **__):
        *rows, more_k, more_v, room, lse = args[:7]
        assert more_k is more_v is None
        assert grid == (min(132, len(made.tasks)), 1, 1)
        assert args[12] == len(made.tasks)
        # Every key that int32 can count lies in the batch row of the queries.
        assert args[16:18] == (1, torch.iinfo(torch.int32).max)
        for x, found in zip((room, lse), executed_parts(made, *rows, 0.3), strict=True):
            x.copy_(found.flatten(0, 1))

    def stacked(outs, lses, out):
        assert outs.is_contiguous()
        joined.append(len(outs))
        found, lse = merge(list(zip(outs, lses.view(outs.shape[:4]), strict=True)))
        out.copy_(found)
        return lse

    kernels = SimpleNamespace(forward=None, described=lambda x, *_: x)
    monkeypatch.setattr(_hopper_calls, "forward_kernels", lambda: kernels)
    monkeypatch.setattr(_hopper_calls, "_tiles", lambda: kernels)
    monkeypatch.setattr(_hopper_calls, "launch", launched)
    monkeypatch.setattr(_hopper_calls, "merge_stacked", stacked)
    monkeypatch.setattr(_hopper_calls, "processors", lambda _: 132)
    ready = _hopper_calls.Ready(made, None, 0.3)
    for value in (v, v[..., :8]):
        out, lse = ready.forward(q, k, value)
        expected = reference(q, k, value, ranges, 0.3)
        torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)
    assert out.stride() == q.stride()
    assert joined == ([] if parts == 1 else [parts, parts])
