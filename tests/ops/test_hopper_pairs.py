"""Tiles of two halves: every pair of a query and a key once, and no half in vain."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from tests.ops import cases
from tests.ops.test_flex import gpu, tensors, to, window
from tests.ops.test_hopper import (
    compare,
    here,
    on_gpu,
)
from tests.ops.test_hopper_backward import equals_the_oracle
from tests.ops.test_hopper_plan import (
    PLANNED,
    alternating,
    any_ranges,
    forget_plans,
    in_rows,
    plan,
)

from longspan.ops.kernels import _hopper_calls, _hopper_plan
from longspan.ops.ranges import KeyRanges

module = importlib.import_module("longspan.ops.kernels.hopper")


def always(monkeypatch, each=2):
    """Whatever can be put together is, for so many heads."""
    for name, value in (("_IN_VAIN", 0), ("_WORTH", 1 << 30), ("_FEW", 0)):
        monkeypatch.setattr(_hopper_plan, name, value)
    if each == 1:
        monkeypatch.setattr(_hopper_plan, "_neighbours_alike", lambda x, _: x.new_zeros(()))
    forget_plans(monkeypatch)


def half(made, row, key, about, *, masked):
    """bool [64, 64]: what the kernel takes of half a tile."""
    key_S = torch.arange(key, key + 64)
    lo, hi = (x[about >> 6, row : row + 64, None] for x in (made.lo_PN, made.hi_PN))
    inside = torch.ones(len(lo), 64, dtype=torch.bool)
    if masked:
        inside = key_S >= lo if about & 16 else key_S < hi
        if about & 32:
            inside = inside & (key_S >= lo)
    return inside


def check_pairs(ranges, batch, heads, key_heads, *, shared=False, each=2):
    n, keys = ranges.queries, ranges.keys
    made = plan(ranges, batch, heads, key_heads, shared=shared)
    assert made.halves == each
    assert made.parts == 1
    for x in made.tensors:
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    counted = torch.zeros(batch, heads, n, keys + 128, dtype=torch.int32)
    tasks = set()
    for row, head, b, first, edges, count, *own in (x[:10] for x in made.tasks.tolist()):
        entries = made.entries[first : first + count].tolist()
        assert own == entries[0]
        assert 1 <= edges <= count
        assert head % each == 0
        tasks.add((row, head, b))
        missing = 0
        for at, (key, about, other, about_other) in enumerate(entries):
            masked, absent = about & 1, about >> 1 & 1
            # All but the first one and the edges are whole.
            assert at < edges or not masked
            assert masked or at == 0 or at >= edges
            assert absent == (other == keys)
            assert masked or not absent
            missing += absent
            for own_key, own_about in ((key, about), (other, about_other)):
                inside = half(made, row, own_key, own_about, masked=masked)
                part = slice(own_key, own_key + 64)
                counted[b, head : head + each, row : row + 64, part] += inside
        assert missing <= 1
    assert len(tasks) == len(made.tasks) == batch * heads // each * -(-n // 64)
    expected = ranges.mask_GNM()[ranges.group_BH.expand(batch, heads)]
    assert (counted[..., :keys] == expected).all()
    assert (counted[..., keys:] == 0).all()
    return made


def by_twos(ranges):
    """The same for twice as many heads."""
    group_BH = ranges.group_BH.repeat_interleave(2, 1)
    return KeyRanges(ranges.lo_GNm, ranges.hi_GNm, group_BH, ranges.keys)


each_of = pytest.mark.parametrize("each", [1, 2])


@each_of
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("name", PLANNED)
def test_every_pair_is_in_one_half(name, shared, each, monkeypatch):
    always(monkeypatch, each)
    build, batch, heads, key_heads = PLANNED[name]
    ranges = build()
    if shared:
        batch, ranges = in_rows(ranges, batch)
    check_pairs(by_twos(ranges), batch, 2 * heads, key_heads, shared=shared, each=each)


@each_of
@settings(max_examples=60, deadline=None)
@given(given=any_ranges())
def test_every_pair_of_any_ranges_is_in_one_half(given, each):
    ranges, batch, heads, key_heads = given
    with pytest.MonkeyPatch.context() as patch:
        always(patch, each)
        check_pairs(by_twos(ranges), batch, 2 * heads, key_heads, each=each)


def test_plans_of_equal_bounds_and_other_numbers_of_keys(monkeypatch):
    always(monkeypatch)
    few = alternating(300, 448, 5, 4)
    many = KeyRanges(few.lo_GNm.clone(), few.hi_GNm, few.group_BH, 700)
    # The half that is missing lies behind all keys, of which nothing is read.
    for ranges in (few, many):
        check_pairs(ranges, 1, 4, 2)


def test_a_missing_half_is_hidden_from_rows_that_see_nothing_behind_the_keys(monkeypatch):
    always(monkeypatch)
    blocks = alternating(300, 512, 1, 4)
    nothing = torch.full_like(blocks.lo_GNm, 600)
    bounds = (torch.cat([nothing, x]) for x in (blocks.lo_GNm, blocks.hi_GNm))
    lo, hi = bounds
    hi[0] = 600
    check_pairs(KeyRanges(lo, hi, torch.ones(1, 4, dtype=torch.int64), 512), 1, 4, 2)


def test_blocks_of_64_fill_their_tiles(monkeypatch):
    ranges = alternating(4096, 4096, 11, 8)
    made = check_pairs(ranges, 1, 8, 2)
    # Eleven blocks, or fewer runs of them that are no longer: the sixth tile lacks a half.
    assert made.tasks[:, 5].eq(6).all()
    # A whole tile, one with the half that is missing, whole ones.
    assert made.tasks[:, 4].eq(2).all()
    monkeypatch.setattr(_hopper_plan, "_IN_VAIN", 100)
    forget_plans(monkeypatch)
    assert plan(ranges, 1, 8, 2).tasks[:, 5].min() > 12


@pytest.mark.parametrize(
    ("ranges", "heads", "key_heads"),
    [
        # No tile is in vain.
        (cases.causal(4096, 8), 8, 2),
        (window(4096, 1024, heads=8), 8, 2),
        # Few tasks are split by keys.
        (alternating(256, 4096, 9, 4), 4, 2),
    ],
)
def test_others_stay_as_they_are(ranges, heads, key_heads):
    assert not plan(ranges, 1, heads, key_heads).halves


@pytest.mark.parametrize(
    ("width", "key_heads", "each"), [(192, 2, 2), (192, 8, 1), (320, 2, 2), (320, 8, 0)]
)
def test_one_head_is_computed_alone_where_that_saves_more(width, key_heads, each):
    """A tile of one head has half of the pairs, and takes 0.65 of the time."""
    ranges = window(4096, width, heads=8)
    assert plan(ranges, 1, 8, key_heads).halves == each


@pytest.mark.parametrize("key_heads", [2, 6])
def test_three_heads_have_no_neighbour_and_one_has_a_key_head_of_its_own(key_heads):
    check_pairs(alternating(4096, 4096, 9, 6), 1, 6, key_heads, each=1)


def test_heads_that_differ_are_not_put_together():
    ranges = alternating(4096, 4096, 9, 8)
    other = alternating(4096, 4096, 9, 8)
    lo, hi = (
        torch.cat([x, y])
        for x, y in zip((ranges.lo_GNm, ranges.hi_GNm), (other.lo_GNm, other.hi_GNm), strict=True)
    )
    for group, each in (([0, 0, 1, 1] * 2, 2), ([0, 1, 1, 0] * 2, 1)):
        check_pairs(KeyRanges(lo, hi, torch.tensor([group]), 4096), 1, 8, 2, each=each)


# Every pair of heads sees the same in these.
PAIRED = [
    "odd, 96",
    "window",
    "window of 128",
    "sink",
    "segments",
    "blocks of 64",
    "blocks of 64, few",
    "blocks of 64, many",
    "dense",
    "blocks of 64, wider values",
]


@gpu
@each_of
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", PAIRED)
def test_equals_the_oracle(name, dtype, each, monkeypatch):
    here()
    always(monkeypatch, each)
    made = []
    monkeypatch.setattr(
        module, "plan_of", lambda *x: made.append(_hopper_plan.plan_of(*x)) or made[-1]
    )
    compare(*on_gpu(name, dtype))
    assert [one.halves for one in made] == [each]
    equals_the_oracle(name, dtype)


@gpu
@each_of
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("name", PAIRED)
def test_few_programs_go_through_all_tasks(name, programs, each, monkeypatch):
    here()
    always(monkeypatch, each)
    monkeypatch.setattr(_hopper_calls, "processors", lambda _: programs)
    given = on_gpu(name, torch.bfloat16)
    assert module._ready(*given[1:], given[0], 1.0, backward=False).plan.halves == each
    compare(*given)


@gpu
@each_of
def test_batch_rows_share_keys(each, monkeypatch):
    here()
    always(monkeypatch, each)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(3, 8, 2, 500, 640, 128, 128))
    compare(to(alternating(500, 640, 3, 8), "cuda"), q, k[:1], v[:1])


@gpu
@each_of
def test_what_lies_behind_the_keys_does_not_matter(each, monkeypatch):
    here()
    always(monkeypatch, each)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 4, 2, 512, 700, 128, 128))
    ranges = to(alternating(512, 448, 5, 4), "cuda")
    ranges = KeyRanges(ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH, 700)
    expected = module.hopper(q, k, v, ranges, 0.1)
    for x in (k, v):
        x[:, :, 448:] = float("nan")
    for x, y in zip(module.hopper(q, k, v, ranges, 0.1), expected, strict=True):
        assert torch.equal(x, y)
