"""Global tokens, block maps, random blocks, vertical-slash and presets, by loops."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

import longspan as ls
from longspan.errors import PatternError
from longspan.pattern import At


def dense(allowed, n, heads=1):
    return np.array(
        [[[allowed(h, i, j) for j in range(n)] for i in range(n)] for h in range(heads)], bool
    )


def assert_is(pattern, mask):
    """Predicate and plan equal the loops; causal rows without keys keep themselves."""
    heads, n, _ = mask.shape
    if pattern.is_causal:
        mask = mask | (~mask.any(-1, keepdims=True) & np.eye(n, dtype=bool))
    np.testing.assert_array_equal(pattern.mask(n, heads), mask)
    np.testing.assert_array_equal(ls.plan(pattern, n, heads).mask()[0], mask)


@pytest.mark.parametrize("n", [1, 9, 20])
@pytest.mark.parametrize("tokens", [(0,), (0, 1, 2), (3, 7, 8, 15, 19), (50,)])
def test_global(tokens, n):
    assert_is(ls.Global(*tokens), dense(lambda h, i, j: i in tokens or j in tokens, n))
    causal = dense(lambda h, i, j: (i in tokens or j in tokens) and j <= i, n)
    assert_is(ls.Global(*tokens, causal=True), causal)


MAP = ((0,), (0, 1, 3), (), (2, 3), (4, 0))


@pytest.mark.parametrize("n", [1, 13, 20, 29])
@pytest.mark.parametrize("size", [1, 4])
def test_block_map(size, n):
    def rule(h, i, j):
        return i // size < len(MAP) and j // size in MAP[i // size]

    assert_is(ls.Blocks(MAP, size), dense(rule, n))
    assert_is(
        ls.Blocks(MAP, size, causal=True), dense(lambda h, i, j: rule(h, i, j) and j <= i, n)
    )


def test_block_map_from_a_matrix_and_per_head():
    matrix = np.eye(3, 5, dtype=bool)
    matrix[2, :2] = True
    blocks = ls.Blocks.of(matrix, 4)
    assert blocks == ls.Blocks(((0,), (1,), (0, 1, 2)), 4)
    assert hash(blocks) == hash(ls.parse(str(blocks)))
    pair = ls.PerHead(blocks, ls.Blocks(((1,),), 4))
    assert pair.mask(12, 2)[1, :4, 4:8].all()
    wide = ls.Blocks(tuple((a // 8,) for a in range(4096)), 16)
    assert ls.plan(wide, 65536).nbytes < 2**20


@pytest.mark.parametrize("n", [5, 24, 30])
def test_vertical_slash(n):
    columns, offsets = (0, 4, 9, 10, 26), (0, 1, 5, 12, 400)
    exact = dense(lambda h, i, j: j <= i and (j in columns or i - j in offsets), n)
    assert_is(ls.VerticalSlash(columns, offsets), exact)
    assert_is(ls.VerticalSlash((), (3,)), dense(lambda h, i, j: i - j == 3, n))
    assert_is(ls.VerticalSlash((3,), ()), dense(lambda h, i, j: j == 3 and j <= i, n))

    def widened(h, i, j):
        rows = range(i // 4 * 4, i // 4 * 4 + 4)
        return j <= i and (j in columns or any(row - j in offsets for row in rows))

    assert_is(ls.VerticalSlash(columns, offsets, block=4), dense(widened, n))


def test_vertical_slash_of_everything_is_causal():
    every = tuple(range(16))
    np.testing.assert_array_equal(ls.VerticalSlash(every, every).mask(16), ls.Causal().mask(16))


def drawn_blocks(pattern, n, head, heads=2):
    """Key blocks of every query block, read off the mask."""
    mask = pattern.allows(
        np.arange(n)[:, None], np.arange(n)[None], At(head=head, heads=heads, length=n)
    )
    size = pattern.size
    return [set((np.flatnonzero(row) // size).tolist()) for row in mask[size - 1 :: size]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("apart", "skip"), [(0, 0), (2, 1), (1, 3), (30, 0)])
def test_random_blocks(apart, skip, causal):
    n, size, count = 96, 4, 3
    pattern = ls.RandomBlocks(size, count, 7, apart, skip, causal)
    for head in range(2):
        for a, found in enumerate(drawn_blocks(pattern, n, head)):
            stop = n // size - skip if not causal else a + 1
            eligible = {b for b in range(skip, stop) if abs(a - b) >= apart}
            assert found <= eligible
            assert len(found) == min(count, len(eligible))
    np.testing.assert_array_equal(ls.plan(pattern, 90, 2).mask()[0], pattern.mask(90, 2))


def test_packed_documents_draw_among_their_own_blocks():
    # The first block of one follows that of another, which has fewer blocks to draw among.
    pattern = ls.RandomBlocks(2, 2, skip=1, causal=False)
    segments = np.repeat([0, 1, 2], [2, 9, 14])
    found = ls.plan(pattern, 25, 2, segments=segments).mask()[0]
    for segment in range(3):
        rows = np.flatnonzero(segments == segment)
        np.testing.assert_array_equal(found[:, rows][:, :, rows], pattern.mask(len(rows), 2))


def test_as_many_random_draws_as_there_can_be():
    # A draw for each that was asked for would not fit into memory.
    assert (ls.Random(2**31 - 1).mask(9) == ls.Causal().mask(9)).all()
    assert (ls.plan(ls.Random(2**31 - 1), 9).mask()[0] == ls.Causal().mask(9)).all()
    blocks, few = ls.RandomBlocks(2, 2**31 - 1, apart=2), ls.RandomBlocks(2, 100, apart=2)
    assert (blocks.mask(23, 2) == few.mask(23, 2)).all()
    row = ls.plan(blocks, 1, keys=23).mask()[0, :, 0]
    assert (row == blocks.mask(23)[:, -1]).all()


def test_random_draws_are_fixed_differ_and_spread():
    one, other = ls.Random(3), ls.Random(3, seed=1)
    np.testing.assert_array_equal(one.mask(40, 2), ls.Random(3).mask(40, 2))
    assert (one.mask(40, 2) != other.mask(40, 2)).any()
    assert (one.mask(40, 2)[0] != one.mask(40, 2)[1]).any()
    np.testing.assert_array_equal(one.mask(60, 2)[:, :40, :40], one.mask(40, 2))
    drawn = np.bincount(
        [b for head in range(64) for b in drawn_blocks(ls.RandomBlocks(1, 3), 32, head)[31]],
        minlength=32,
    )
    # 64 draws of 3 from 32: 6 each on average; a constant or a clustered draw is far outside.
    assert drawn.max() < 20
    assert (drawn > 0).sum() > 28


def bigbird_blocks(count, drawn):
    """Published layout: first and last block global, three neighbours, random ones."""
    blocks = np.zeros((count, count), bool)
    blocks[0] = blocks[-1] = True
    for a in range(1, count - 1):
        for b in {0, count - 1, a - 1, a, a + 1} | drawn[a]:
            blocks[a, b] = True
    return blocks


def test_bigbird():
    size, count = 4, 12
    n = size * count
    pattern = ls.bigbird(size, 2, seed=3)
    drawn = drawn_blocks(ls.RandomBlocks(size, 2, 3, apart=2, skip=1, causal=False), n, 0)
    expected = np.kron(bigbird_blocks(count, drawn), np.ones((size, size), bool)).astype(bool)
    assert_is(pattern, expected[None])
    middle = pattern.mask(n)[0][size * 3 : size * (count - 3)]
    assert (middle.sum(-1) == (5 + 2) * size).all()
    past = ls.bigbird(size, 2, causal=True)
    assert past.is_causal
    np.testing.assert_array_equal(past.mask(n)[:, :20, :20], past.mask(20))


def test_longformer_and_etc():
    n, tokens = 24, (0, 9)
    rule = dense(lambda h, i, j: abs(i - j) <= 3 or i in tokens or j in tokens, n)
    assert_is(ls.longformer(6, tokens), rule)
    causal = dense(lambda h, i, j: j <= i and (i - j < 6 or i in tokens or j in tokens), n)
    assert_is(ls.longformer(6, tokens, causal=True), causal)
    dilated = ls.longformer(6, dilation=[1, 2])
    steps = [1, 2]
    assert_is(
        dilated,
        dense(lambda h, i, j: any(j == i + steps[h] * t for t in range(-3, 4)), n, heads=2),
    )
    assert_is(ls.etc(2, 3), dense(lambda h, i, j: abs(i - j) <= 2 or i < 3 or j < 3, n))


def test_sparse_transformer():
    n, stride, c = 26, 4, 2
    assert_is(
        ls.sparse_transformer(stride),
        dense(lambda h, i, j: j <= i and (i - j < stride or (i - j) % stride == 0), n),
    )
    near = dense(lambda h, i, j: i // stride == j // stride and j <= i, n)
    far = dense(lambda h, i, j: j <= i and j % stride >= stride - c, n)
    fixed = ls.sparse_transformer(stride, kind="fixed", summary=c)
    assert_is(fixed, near | far)
    split = ls.sparse_transformer(stride, kind="fixed", summary=c, heads="split")
    assert_is(split, np.concatenate([near, far]))
    for pattern in (fixed, ls.sparse_transformer(stride)):
        step = pattern.mask(n)[0].astype(int)
        np.testing.assert_array_equal(step @ step > 0, np.tri(n, dtype=bool))


@pytest.mark.parametrize(
    "pattern",
    [
        ls.longformer(8, (0, 5)),
        ls.longformer(8, dilation=(1, 2)),
        ls.bigbird(4, 2, seed=9),
        ls.bigbird(4, 0, causal=True),
        ls.etc(4, 3),
        ls.sparse_transformer(8),
        ls.sparse_transformer(8, kind="fixed", heads="split", summary=2),
        ls.swin(4),
        ls.longmixed(4, 2),
        ls.Random(4, seed=2, causal=False),
        ls.RandomBlocks(4, 2, seed=1, apart=1),
        ls.Blocks(MAP, 4, causal=True),
        ls.VerticalSlash((1, 2), (), block=4),
        ls.LongNet((4, 8), (1, 2), offsets="torchscale"),
        ls.Mixture(ls.Window(3), ls.Global(0, 4, causal=True)),
    ],
    ids=str,
)
def test_presets_and_lists_survive_their_text(pattern):
    assert ls.parse(str(pattern)) == pattern
    assert str(ls.parse(str(pattern))) == str(pattern)


def test_summaries_of_a_block_longer_than_the_sequence_take_no_memory_for_the_rest():
    pattern = ls.Summaries(2**24, 2**24)
    # What is imported at the first use does not count.
    ls.plan("causal()", 30)
    tracemalloc.start()
    laid = ls.plan(pattern, 30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    np.testing.assert_array_equal(laid.mask()[0], pattern.mask(30))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ls.Global(), ["Global", "at least one"]),
        (lambda: ls.Global(-3), ["Global", "-3"]),
        (lambda: ls.Global(1.5), ["whole number", "1.5"]),
        (lambda: ls.Blocks((), 4), ["map", "Blocks.of"]),
        (lambda: ls.Blocks((0, 1), 4), ["list of whole numbers", "0"]),
        (lambda: ls.Blocks.of(np.ones(3), 4), ["matrix", "[3]"]),
        (lambda: ls.Blocks.of([[0.0, -np.inf], [0.0, 0.0]], 4), ["true and false", "-inf"]),
        (lambda: ls.Blocks.of([[np.nan, 1]], 4), ["true and false", "nan"]),
        (lambda: ls.Blocks.of([["no", "yes"]], 4), ["true and false", "no"]),
        (lambda: ls.Blocks.of(torch.ones(2, 2, requires_grad=True), 4), ["matrix", "grad"]),
        (lambda: ls.Blocks([[1, 0, 0], [1, 1, 0]], 4), ["twice", "[1, 0, 0]", "Blocks.of"]),
        (lambda: ls.Global([3, 7]), ["one by one, Global(3, 7)", "[3, 7]"]),
        (lambda: ls.VerticalSlash((), ()), ["neither"]),
        (lambda: ls.VerticalSlash((0,), (-2,)), ["offsets", "-2"]),
        (lambda: ls.RandomBlocks(4, 0), ["RandomBlocks", "count"]),
        (lambda: ls.Random(0), ["Random", "count"]),
        (lambda: ls.Summaries(4, 5), ["count", "stride"]),
        (lambda: ls.sparse_transformer(4, kind="odd"), ["strided", "fixed", "odd"]),
    ],
)
def test_errors(make, words):
    with pytest.raises(PatternError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)
