"""The Hopper kernel: its plans and a stand-in that goes through them on the CPU; refusals; results
on a GPU."""

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
from tests.ops.test_flex import gpu, regrouped, relative, scattered, shifted, tensors, to, window

import longspan as ls
from longspan.errors import Refusal
from longspan.ops import capability, kept
from longspan.ops.kernels import _hopper_parts, _hopper_plan
from longspan.ops.kernels.reference import reference
from longspan.ops.merge import merge
from longspan.ops.ranges import KeyRanges

module = importlib.import_module("longspan.ops.kernels.hopper")


# Plans.


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
    monkeypatch.setattr(_hopper_plan, "PROGRAMS", 4)
    grid = torch.zeros(1, 4, 10, 1, 8, dtype=torch.int32)
    grid[..., 0] = torch.arange(10)[:, None]
    grid[..., 1] = torch.arange(4)[:, None, None]
    grid[..., 5] = 3
    grid[:, :, 7, 0, 5] = 12

    def order(section):
        return [tuple(one) for one in _hopper_plan._in_order(grid, section)[:, :2].tolist()]

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
    monkeypatch.setattr(module, "_kernels", lambda: kernels)
    monkeypatch.setattr(module, "launch", launched)
    monkeypatch.setattr(module, "merge_stacked", stacked)
    monkeypatch.setattr(module, "processors", lambda _: 132)
    ready = module._Ready(made, None, 0.3)
    for value in (v, v[..., :8]):
        out, lse = ready.forward(q, k, value)
        expected = reference(q, k, value, ranges, 0.3)
        torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)
    assert out.stride() == q.stride()
    assert joined == ([] if parts == 1 else [parts, parts])


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
    "many tasks": (lambda: window(20_001, 300, heads=4), (1, 4, 1, 20_001, 20_001, 128, 128)),
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
    monkeypatch.setattr(module, "processors", lambda _: programs)
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
