"""Strided, dilated, SSA, SDA and LongMixed against their definitions, written out as loops."""

from __future__ import annotations

import numpy as np
import pytest

import longspan as ls
from longspan.errors import PatternError

N, HEADS = 29, 4


def dense(allowed, n=N, heads=HEADS, keep_self=True):
    """Mask of a rule (h, i, j) -> bool, by loops; rows without keys keep themselves."""
    mask = np.array(
        [[[allowed(h, i, j) for j in range(n)] for i in range(n)] for h in range(heads)], bool
    )
    if keep_self:
        mask |= ~mask.any(-1, keepdims=True) & np.eye(n, dtype=bool)
    return mask


def assert_is(pattern, mask):
    """Predicate and plan equal the loops."""
    n = mask.shape[-1]
    np.testing.assert_array_equal(pattern.mask(n, HEADS), mask)
    np.testing.assert_array_equal(ls.plan(pattern, n, HEADS).mask()[0], mask)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 7, 40])
def test_strided(r):
    assert_is(ls.Strided(r), dense(lambda h, i, j: j <= i and j % r == h % r))
    assert_is(ls.Strided(r, per_head=False), dense(lambda h, i, j: j <= i and j % r == 0))
    assert_is(ls.Strided(r, causal=False), dense(lambda h, i, j: j % r == h % r, keep_self=False))
    assert_is(ls.Diagonals(r), dense(lambda h, i, j: j <= i and (i - j) % r == 0))
    assert_is(
        ls.Diagonals(r, causal=False), dense(lambda h, i, j: (i - j) % r == 0, keep_self=False)
    )


@pytest.mark.parametrize("r", [1, 2, 3, 5])
@pytest.mark.parametrize("w", [1, 2, 4, 9])
def test_dilated(w, r):
    def causal(h, i, j):
        return any(j == i - r * t for t in range(w))

    def two_sided(h, i, j):
        return any(j == i + r * t for t in range(-(w // 2), w // 2 + 1))

    assert_is(ls.Dilated(w, r), dense(causal))
    assert_is(ls.Dilated(w, r, causal=False), dense(two_sided))
    if r == 1:
        assert_is(ls.Dilated(w, r), ls.Window(w).mask(N, HEADS))
        assert_is(ls.Dilated(w, r, causal=False), ls.Window(w, causal=False).mask(N, HEADS))


def test_dilation_per_head():
    steps = [1, 3]
    rule = dense(lambda h, i, j: any(j == i - steps[h // 2] * t for t in range(4)))
    assert_is(ls.Dilated(4, (1, 3)), rule)
    with pytest.raises(PatternError, match="3 steps cannot be spread evenly over 4"):
        ls.plan(ls.Dilated(4, (1, 2, 3)), N, HEADS)


@pytest.mark.parametrize("anchors", [(0,), (0, 1, 2), (3, 8, 9, 20)])
def test_ssa(anchors):
    rule = dense(
        lambda h, i, j: j <= i and (i - j < 5 or j in anchors or j % 3 == h % 3), keep_self=False
    )
    pattern = ls.SSA(5, 3, anchors)
    assert_is(pattern, rule)
    assert rule.any(-1).all()
    assert ls.plan(pattern, N, HEADS).pairs == rule.sum()


def test_ssa_is_its_parts_and_covers_the_past():
    parts = ls.Window(5) | ls.Sink(1) | ls.Strided(4)
    np.testing.assert_array_equal(ls.SSA(5, 4).mask(N, HEADS), parts.mask(N, HEADS))
    assert (ls.SSA(5, 4).mask(N, HEADS).any(0) == np.tri(N, dtype=bool)).all()
    assert not (ls.SSA(5, 5).mask(N, HEADS).any(0) == np.tri(N, dtype=bool)).all()


@pytest.mark.parametrize(("segment", "r"), [(8, 2), (8, 3), (12, 4), (64, 4), (5, 5)])
def test_sda_keys_of_the_segment(segment, r):
    def rule(h, i, j):
        return i // segment == j // segment and (j % segment) % r == h % r

    assert_is(ls.SDA(segment, r), dense(lambda h, i, j: j <= i and rule(h, i, j)))
    assert_is(ls.SDA(segment, r, causal=False), dense(rule, keep_self=False))


def test_sda_leaves_the_rows_that_the_spec_counts():
    bare = dense(
        lambda h, i, j: i // 16 == j // 16 and (j % 16) % 4 == h % 4 and j <= i,
        32,
        keep_self=False,
    )
    assert (~bare.any(-1)).sum(-1).tolist() == [0, 2, 4, 6]
    together = ls.SDA(16, 4).mask(32, 4).any(0)
    np.testing.assert_array_equal(together, ls.Chunk(16).mask(32)[0])


@pytest.mark.parametrize(("k", "r"), [(1, 1), (3, 2), (4, 4), (2, 7)])
def test_sda_neighborhood(k, r):
    def rule(h, i, j):
        back = i - j - h % r
        return back >= 0 and back % r == 0 and back // r < k

    assert_is(ls.SDA.neighborhood(k, r), dense(rule))
    if r <= HEADS:
        together = dense(rule, keep_self=False).any(0)
        np.testing.assert_array_equal(together, ls.Window(r * k).mask(N)[0])


def test_longmixed_is_scca_and_sda():
    mixed = ls.longmixed(4, 2)
    mask = mixed.mask(N, 4)
    np.testing.assert_array_equal(mask[:2], ls.SCCA.flow(4).mask(N, 2))
    np.testing.assert_array_equal(mask[2:], ls.SDA(8, 2).mask(N, 2))
    turns = ls.longmixed(4, 2, scca="fixed", by="layers", segment=12)
    np.testing.assert_array_equal(turns.mask(N, 4, layer=2), ls.SCCA.fixed(4).mask(N, 4))
    np.testing.assert_array_equal(turns.mask(N, 4, layer=3), ls.SDA(12, 2).mask(N, 4))
    with pytest.raises(PatternError, match="rows"):
        ls.longmixed(4, 2, by="rows")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ls.Strided(0), ["Strided", "step", "0"]),
        (lambda: ls.Strided(2.5), ["whole number", "2.5"]),
        (lambda: ls.Dilated(-1, 2), ["Dilated", "size", "-1"]),
        (lambda: ls.Dilated(4, ()), ["step", "at least one"]),
        (lambda: ls.SSA(4, 2, anchors=(-1,)), ["SSA", "anchors", "-1"]),
        (lambda: ls.SSA(4, 2, anchors=()), ["anchors", "none"]),
        (lambda: ls.SDA(4, 5), ["segment", "5", "4"]),
        (lambda: ls.Diagonals("3"), ["Diagonals", "'3'"]),
    ],
)
def test_errors(make, words):
    with pytest.raises(PatternError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_orders_can_be_chosen_and_are_seen_in_the_plan():
    pattern = ls.Window(64) | ls.Strided(8)
    apart = ls.plan(pattern, 4096, HEADS, orders="apart")
    assert [one.steps for one in apart.passes] == [(1,), (8,)]
    # Four heads see four of eight remainders; the others are left out.
    assert apart.passes[1].key_order.shape == (1, 4096 * HEADS // 8)
    assert "keys by remainder mod 8" in str(apart)
    one = ls.plan(pattern, 4096, HEADS, orders=8)
    assert [part.steps for part in one.passes] == [(8,)]
    assert one.pairs == apart.pairs == ls.plan(pattern, 4096, HEADS, orders=1).pairs
    assert apart.tiles() < ls.plan(pattern, 4096, HEADS, orders=1).tiles() / 3
    own = ls.plan(ls.Diagonals(64), 4096, orders="apart")
    assert own.passes[0].query_order is not None
    assert "queries too" in str(own)
    with pytest.raises(ls.LongspanError, match="orders"):
        ls.plan(pattern, 64, HEADS, orders="mine")


def test_a_union_counts_shared_pairs_once():
    window, strided = ls.Window(9).mask(64, 4), ls.Strided(3).mask(64, 4)
    plan = ls.plan(ls.Window(9) | ls.Strided(3), 64, 4, orders="apart")
    assert plan.pairs == (window | strided).sum()
    assert plan.counts().max() == 1
