"""Laws of the algebra, and each atom against a definition written by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import longspan as ls
from longspan.errors import PatternError
from longspan.pattern import names

N, HEADS = 23, 4


def pairs(rule, n=N, heads=HEADS):
    """Dense mask from a rule of (head, query, key)."""
    return np.array(
        [[[rule(h, i, j) for j in range(n)] for i in range(n)] for h in range(heads)], dtype=bool
    )


def keep_self(mask):
    for head in mask:
        for i, row in enumerate(head):
            row[i] |= not row.any()
    return mask


ATOMS = {
    "causal": (ls.Causal(), lambda h, i, j: j <= i),
    "dense": (ls.Dense(), lambda h, i, j: True),
    "window": (ls.Window(5), lambda h, i, j: 0 <= i - j < 5),
    "window of one": (ls.Window(1), lambda h, i, j: i == j),
    "window, two-sided": (ls.Window(5, causal=False), lambda h, i, j: abs(i - j) <= 2),
    "window, two-sided, even": (ls.Window(4, causal=False), lambda h, i, j: abs(i - j) <= 2),
    "sink": (ls.Sink(3), lambda h, i, j: j < 3 and j <= i),
    "prefix": (ls.Prefix(3), lambda h, i, j: j < 3),
    "chunk": (ls.Chunk(6), lambda h, i, j: i // 6 == j // 6 and j <= i),
    "chunk, moved": (
        ls.Chunk(6, offset=2, causal=False),
        lambda h, i, j: (i - 2) // 6 == (j - 2) // 6,
    ),
    # spec: visible range in split mode is max(0, s + g ((i - s) // g)) <= j <= i
    "shifted chunk": (
        ls.ShiftedChunk(8),
        lambda h, i, j: (s := 4 * (h >= 2)) + 8 * ((i - s) // 8) <= j <= i,
    ),
    "scca fixed": (
        ls.SCCA.fixed(6),
        lambda h, i, j: (c := i // 6 * 6 - 3 * (h >= 2)) <= j < c + 6 and j <= i,
    ),
    "scca fixed, whole chunk": (
        ls.SCCA.fixed(6, shift=6),
        lambda h, i, j: (c := i // 6 * 6 - 6 * (h >= 2)) <= j < c + 6 and j <= i,
    ),
    "scca flow": (
        ls.SCCA.flow(6),
        lambda h, i, j: j // 6 == i // 6 - h % (i // 6 + 1) and j <= i,
    ),
    "scca flow, literal": (
        ls.SCCA.flow(6, wrap="none"),
        lambda h, i, j: j // 6 == i // 6 - h and j <= i,
    ),
    "scca flow, ring": (
        ls.SCCA.flow(6, causal=False),
        lambda h, i, j: j // 6 == (i // 6 - h) % 4,
    ),
    "document": (
        ls.Document(4, 9),
        lambda h, i, j: (i >= 4) + (i >= 13) == (j >= 4) + (j >= 13),
    ),
    "per head": (
        ls.PerHead(ls.Window(2), ls.SCCA.flow(6)),
        lambda h, i, j: (
            0 <= i - j < 2 if h < 2 else j // 6 == i // 6 - (h - 2) % (i // 6 + 1) and j <= i
        ),
    ),
}


@pytest.mark.parametrize("name", ATOMS)
def test_atom_equals_its_definition(name):
    pattern, rule = ATOMS[name]
    expected = pairs(rule)
    if pattern.is_causal:
        assert not np.triu(expected, 1).any()
        expected = keep_self(expected)
    np.testing.assert_array_equal(pattern.mask(N, HEADS), expected)


def test_operators_are_set_operations():
    a, b = ls.Window(7), ls.Chunk(5, causal=False)
    ma, mb = a.mask(N), b.mask(N)
    np.testing.assert_array_equal((a & b).mask(N), ma & mb)
    np.testing.assert_array_equal((a | b).mask(N), ma | mb)
    np.testing.assert_array_equal((b - a).mask(N), mb & ~ma)


def test_equality_hash_and_flattening():
    a, b, c = ls.Window(7), ls.Sink(2), ls.Chunk(4)
    assert (a | b) | c == a | (b | c)
    assert a | a == a
    assert a | b | a == a | b
    assert ls.Window(7) == a
    assert ls.Window(8) != a
    assert len({a | b, ls.Window(7) | ls.Sink(2), a & b}) == 2


def test_causality_is_known_from_the_structure():
    two_sided = ls.Window(5, causal=False)
    assert (two_sided & ls.Causal()).is_causal
    assert not (two_sided | ls.Causal()).is_causal
    assert (ls.Causal() - two_sided).is_causal
    assert not (two_sided - ls.Causal()).is_causal
    assert not ls.PerHead(ls.Causal(), two_sided).is_causal


def test_sink_is_causal_prefix():
    np.testing.assert_array_equal(ls.Sink(3).mask(N), (ls.Prefix(3) & ls.Causal()).mask(N))


def test_flow_with_as_many_heads_as_chunks_covers_the_past():
    union = ls.SCCA.flow(4).mask(32, heads=8).any(axis=0)
    np.testing.assert_array_equal(union, np.tri(32, dtype=bool))


def test_layers_take_turns():
    swin = ls.PerLayer(ls.Chunk(8, causal=False), ls.Chunk(8, offset=4, causal=False))
    np.testing.assert_array_equal(swin.mask(N, layer=2), ls.Chunk(8, causal=False).mask(N))
    np.testing.assert_array_equal(
        swin.mask(N, layer=3), ls.Chunk(8, offset=4, causal=False).mask(N)
    )
    mixed = swin & ls.Causal() | ls.Sink(1)
    np.testing.assert_array_equal(
        mixed.mask(N, layer=1), (ls.Chunk(8, offset=4) | ls.Sink(1)).mask(N)
    )


@pytest.mark.parametrize(
    "pattern", [p for p, _ in ATOMS.values() if p.is_causal], ids=lambda p: str(p)
)
def test_causal_masks_do_not_depend_on_the_length(pattern):
    long = pattern.mask(N, HEADS)
    for n in range(1, N):
        np.testing.assert_array_equal(pattern.mask(n, HEADS), long[:, :n, :n])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ls.Window(0), ["Window", "size", "0"]),
        (lambda: ls.Window(2.5), ["whole number", "2.5", "float"]),
        (lambda: ls.Window(True), ["whole number", "True"]),
        (lambda: ls.Window(2**40), ["2147483647"]),
        (lambda: ls.Chunk(4, offset=4), ["offset", "below size"]),
        (lambda: ls.ShiftedChunk(7), ["even", "7"]),
        (lambda: ls.SCCA.fixed(4, shift=-1), ["shift", "-1"]),
        (lambda: ls.SCCA.flow(4, wrap="ring"), ["wrap", "ring", "past"]),
        (lambda: ls.Document(3, 0), ["length", "0"]),
        (lambda: ls.swin(4).at_layer(-1), ["layer", "-1"]),
        (lambda: ls.swin(4).at_layer(1.5), ["layer", "whole number", "1.5"]),
        (lambda: ls.Causal().mask(-1), ["n must be from 0", "-1"]),
        (lambda: ls.Causal().mask(4, heads=0), ["heads must be from 1", "0"]),
        (lambda: ls.longformer(8, 3), ["tokens", "list", "3"]),
        (lambda: ls.Blocks.of([[1, 0], [1]], 4), ["expected a matrix"]),
        (lambda: ls.PerHead(), ["at least one"]),
        (lambda: ls.Document(np.array([9, 11])), ["one by one, Document(9, 11)"]),
        (lambda: ls.Window(torch.tensor(4)), ["size", "whole number", "tensor(4)"]),
        (lambda: ls.PerHead(3), ["expected patterns", "3"]),
        (lambda: ls.PerHead(ls.Causal(), ls.Window(2)).mask(8, heads=3), ["2 patterns", "3"]),
    ],
)
def test_errors_name_what_was_passed_and_expected(make, words):
    with pytest.raises(PatternError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


FLAGS = [
    (name, field.name)
    for name, cls in names().items()
    if dataclasses.is_dataclass(cls)
    for field in dataclasses.fields(cls)
    if isinstance(field.default, bool)
]
SIZES = {"blocks": ([[0]], 2), "global": (0,), "longnet": ([4], [2]), "longnet_set": ([4], [2])}


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_flags_are_true_or_false(name, flag):
    make, sizes = names()[name], SIZES.get(name)
    if sizes is None:
        own = [f for f in dataclasses.fields(make) if f.default is dataclasses.MISSING]
        sizes = (2,) if name == "random" else (4,) * len(own)
    assert getattr(make(*sizes, **{flag: False}), flag) is False
    # "maybe" would count as true, and 0 would not survive the text form.
    for wrong in ("maybe", 0, None):
        with pytest.raises(PatternError, match=f"{flag} must be True or False, got {wrong!r}"):
            make(*sizes, **{flag: wrong})


NUMBERS = {
    "window": lambda of: ls.Window(of(5), causal=False),
    "dilated": lambda of: ls.Dilated(of(100), of(100)),
    "dilated, a step for each run": lambda of: ls.Dilated(of(5), [of(3), of(120)]),
    "strided": lambda of: ls.Strided(of(5)),
    "diagonals": lambda of: ls.Diagonals(of(5)),
    "chunk": lambda of: ls.Chunk(of(8), of(3)),
    "shifted chunk": lambda of: ls.ShiftedChunk(of(8)),
    "scca fixed": lambda of: ls.SCCA.fixed(of(8), of(3)),
    "scca flow": lambda of: ls.SCCA.flow(of(8), causal=False),
    "sda": lambda of: ls.SDA(of(100), of(7)),
    "sda neighborhood": lambda of: ls.SDA.neighborhood(of(100), of(100)),
    "ssa": lambda of: ls.SSA(of(5), of(7), (of(3), of(50), of(9))),
    "longnet": lambda of: ls.LongNet((of(16), of(100)), (of(1), of(5))),
    "neighborhood": lambda of: ls.Neighborhood(of(5), of(3), of(2)),
    "global": lambda of: ls.Global(of(3), of(60)),
    "sink and prefix": lambda of: ls.Sink(of(4)) | ls.Prefix(of(4)),
    "random": lambda of: ls.Random(of(3), of(100)),
    "random blocks": lambda of: ls.RandomBlocks(of(8), of(3), of(1), of(1), of(1)),
    "blocks": lambda of: ls.Blocks([[of(0)], [of(9), of(2)]], of(50)),
    "vertical slash": lambda of: ls.VerticalSlash([of(3), of(70)], [of(0), of(100)], of(16)),
    "documents": lambda of: ls.Document(of(100), of(100)),
    "bigbird": lambda of: ls.bigbird(of(8), of(2)),
    "etc": lambda of: ls.etc(of(100), of(4)),
    "sparse transformer": lambda of: ls.sparse_transformer(of(16), kind="fixed", summary=of(3)),
    "longmixed": lambda of: ls.longmixed(of(20), of(10)),
}


@pytest.mark.parametrize("number", [np.int8, np.uint8, np.int64, np.uint64])
@pytest.mark.parametrize("name", NUMBERS)
def test_whole_numbers_of_numpy_are_whole_numbers(name, number):
    """They equal plain ones, so what they make is the same: nothing overflows."""
    plain, own = NUMBERS[name](int), NUMBERS[name](number)
    assert own == plain
    assert ls.parse(str(own)) == plain
    expected = plain.mask(201, heads=4)
    np.testing.assert_array_equal(own.mask(201, heads=4), expected)
    laid = ls.plan(own, number(100), number(4))
    np.testing.assert_array_equal(laid.mask()[0], plain.mask(100, heads=4))


def test_presets_check_their_flags():
    for make in (ls.longformer, ls.bigbird):
        with pytest.raises(PatternError, match="causal must be True or False"):
            make(causal="maybe")


def test_operators_refuse_what_is_no_pattern():
    with pytest.raises(TypeError):
        ls.Window(3) | 4
