"""Random expressions over all atoms: every promise of patterns, plans and kernels at once.

``HYPOTHESIS_PROFILE=nightly`` draws ten times as many expressions, other ones every time.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longspan as ls
from longspan.pattern import At

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
cases = settings(max_examples=2000 if NIGHTLY else 200, deadline=None, derandomize=not NIGHTLY)

N, HEADS = 21, 4
small = st.integers(1, 9)
flag = st.booleans()
positions = st.lists(st.integers(0, N + 3), min_size=1, max_size=5)


def longnet(cls):
    pair = st.integers(1, 12).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, min(w, 4))))
    pairs = st.lists(pair, min_size=1, max_size=3)
    words = st.sampled_from(["paper", "torchscale"])
    return st.builds(
        lambda found, causal, offsets: cls(*zip(*found, strict=True), causal, offsets),
        pairs,
        flag,
        words,
    )


ATOMS = st.one_of(
    st.just(ls.Causal()),
    st.just(ls.Dense()),
    st.builds(ls.Window, small, flag),
    st.builds(ls.Sink, small),
    st.builds(ls.Prefix, small),
    small.flatmap(lambda g: st.builds(ls.Chunk, st.just(g), st.integers(0, g - 1), flag)),
    st.builds(lambda g, causal: ls.ShiftedChunk(2 * g, causal), small, flag),
    st.builds(ls.SCCA.fixed, small, st.none() | small, flag),
    st.builds(ls.SCCA.flow, small, st.just("past"), flag),
    st.builds(ls.SCCA.flow, small, st.just("none")),
    st.builds(lambda lengths: ls.Document(*lengths), st.lists(small, max_size=3)),
    st.builds(ls.Strided, small, flag, flag),
    st.builds(ls.Diagonals, small, flag),
    st.builds(ls.Dilated, small, small, flag),
    st.builds(ls.Dilated, small, st.tuples(small, small), flag),
    st.builds(ls.SSA, small, small, positions.map(tuple)),
    small.flatmap(lambda s: st.builds(ls.SDA, st.just(s), st.integers(1, s), flag)),
    st.builds(ls.SDA.neighborhood, small, small),
    longnet(ls.LongNet),
    longnet(ls.LongNetSet),
    st.integers(2, 9).flatmap(
        lambda k: st.builds(
            ls.Neighborhood, st.just(k), st.integers(1, 4), st.integers(1, k), flag
        )
    ),
    st.builds(lambda p, causal: ls.Global(*p, causal=causal), positions, flag),
    st.builds(ls.Random, small, small, flag),
    st.builds(ls.RandomBlocks, small, st.integers(1, 3), small, small, st.integers(0, 2), flag),
    st.builds(
        lambda rows, size, causal: ls.Blocks(tuple(map(tuple, rows)), size, causal),
        st.lists(st.lists(st.integers(0, 6), max_size=3, unique=True), min_size=1, max_size=6),
        small,
        flag,
    ),
    st.builds(ls.BandBlocks, small, st.integers(0, 2), st.integers(0, 2)),
    st.builds(ls.EdgeBlocks, small, st.integers(0, 2), st.integers(0, 2)),
    st.builds(ls.Summaries, st.just(9), small),
    st.builds(ls.VerticalSlash, positions.map(tuple), positions.map(tuple), st.integers(1, 5)),
)


def combined(parts):
    pair = st.tuples(parts, parts)
    return st.one_of(
        pair.map(lambda p: p[0] | p[1]),
        pair.map(lambda p: p[0] & p[1]),
        pair.map(lambda p: p[0] - p[1]),
        pair.map(lambda p: ls.PerHead(*p)),
        pair.map(lambda p: ls.Mixture(*p)),
    )


PATTERNS = st.recursive(ATOMS, combined, max_leaves=4).filter(lambda p: _fits(p))
CAUSAL = PATTERNS.map(lambda p: p if p.is_causal else p & ls.Causal()).filter(lambda p: _fits(p))


def _fits(pattern):
    """Not: runs of heads too short for a list of steps, causal only by a cut (see below)."""
    try:
        pattern.require(HEADS)
    except ls.LongspanError:
        return False
    return True


def counts(pattern, n):
    """The pattern's own word on every pair [HEADS, n, n]."""
    token = np.arange(n)
    each = [
        pattern.counts(token[:, None], token[None], At(head=h, heads=HEADS, length=n))
        for h in range(HEADS)
    ]
    found = np.stack([np.broadcast_to(count, (n, n)) for count in each])
    if pattern.is_causal:
        found = found + ~found.any(-1, keepdims=True) * np.eye(n, dtype=int)
    return found


ORDERS = st.sampled_from(["auto", "apart", "joined", 1, 6])


@cases
@given(PATTERNS, st.integers(1, N), ORDERS)
def test_plan_equals_predicate(pattern, n, orders):
    plan = ls.plan(pattern, n, HEADS, orders=orders)
    expected = counts(pattern, n)
    np.testing.assert_array_equal(plan.counts()[0], expected)
    np.testing.assert_array_equal(pattern.mask(n, HEADS), expected > 0)
    assert plan.pairs == expected.sum()


@cases
@given(PATTERNS)
def test_text_round_trip(pattern):
    assert ls.parse(str(pattern)) == pattern


@cases
@given(CAUSAL, st.integers(1, N - 1))
def test_a_prefix_never_changes_and_nothing_leaks(pattern, n):
    found = ls.plan(pattern, N, HEADS).counts()[0]
    assert not np.triu(found.sum(0), 1).any()
    np.testing.assert_array_equal(ls.plan(pattern, n, HEADS).counts()[0], found[:, :n, :n])


@cases
@given(CAUSAL, st.integers(1, 3), st.integers(3, N), ORDERS)
def test_decoding_equals_prefill(pattern, last, n, orders):
    whole = ls.plan(pattern, n, HEADS).counts()[0]
    found = ls.plan(pattern, last, HEADS, keys=n, orders=orders).counts()[0]
    np.testing.assert_array_equal(found, whole[:, n - last :])


@cases
@given(
    PATTERNS,
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(0, 3),
    flag,
    ORDERS,
)
def test_padding_and_packing_equal_separate_runs(pattern, lengths, padding, left, orders):
    named = [np.full(n, 2 * s + 1) for s, n in enumerate(lengths)]
    blank = [np.full(padding, -1)]
    segments = np.concatenate(blank + named if left else named + blank)
    found = ls.plan(pattern, len(segments), HEADS, segments=segments, orders=orders)
    found = found.counts()[0]
    rows = np.flatnonzero(segments >= 0)
    expected = np.zeros_like(found)
    for segment, n in zip(np.unique(segments[rows]), lengths, strict=True):
        own = np.flatnonzero(segments == segment)
        expected[np.ix_(range(HEADS), own, own)] = counts(pattern, n)
    np.testing.assert_array_equal(found, expected)


@cases
@given(
    PATTERNS,
    st.sets(st.integers(0, N - 1), min_size=1),
    st.sets(st.integers(0, N - 1), min_size=1),
    ORDERS,
)
def test_a_cache_with_holes_is_other_positions(pattern, kept, asked, orders):
    # Two-sided patterns may look at the length, which is where the last key stands.
    kept = sorted(kept | {N - 1})
    asked = sorted(asked)
    found = ls.plan(
        pattern,
        len(asked),
        HEADS,
        keys=len(kept),
        positions=asked,
        key_positions=kept,
        orders=orders,
    ).counts()[0]
    np.testing.assert_array_equal(found, counts(pattern, N)[:, asked][:, :, kept])


@cases
@given(PATTERNS, st.sampled_from([1, 2, 4]), st.integers(0, 99), ORDERS)
def test_kernels_equal_the_counted_softmax(pattern, kv_heads, seed, orders):
    make = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, heads, N, 4, generator=make, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    count = torch.as_tensor(counts(pattern, N), dtype=torch.float64)[None]
    seen = count.sum(-1) > 0
    logits = q @ k.repeat_interleave(HEADS // kv_heads, 1).mT / 2
    weight = count * logits.exp()
    total = torch.where(seen, weight.sum(-1), 1.0)
    expected = (weight / total[..., None]) @ v.repeat_interleave(HEADS // kv_heads, 1)
    d_out = torch.randn(expected.shape, generator=make, dtype=expected.dtype)
    d_lse = torch.where(seen, torch.randn(seen.shape, generator=make, dtype=expected.dtype), 0.0)
    grads = torch.autograd.grad((expected, total.log()), (q, k, v), (d_out, d_lse))
    plan = ls.plan(pattern, N, HEADS, orders=orders)
    for impl in ("reference", "tiled"):
        out, lse = ls.attend(q, k, v, plan, return_lse=True, impl=impl)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse[seen], total.log()[seen], rtol=1e-9, atol=1e-9)
        assert torch.isneginf(lse[~seen]).all()
        ours = torch.autograd.grad((out, lse), (q, k, v), (d_out, d_lse))
        for a, b in zip(ours, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
