"""Text form: round trip, and errors that show the place."""

from __future__ import annotations

import pytest

import longspan as ls
from longspan.errors import PatternError
from longspan.pattern import names

a, b, c = ls.Window(4096), ls.Sink(4), ls.Chunk(8, offset=2, causal=False)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (a | b, "window(4096) | sink(4)"),
        (ls.Window(512, causal=False), "window(512, causal=false)"),
        (ls.SCCA.flow(1024, wrap="none"), "scca.flow(1024, wrap=none)"),
        (ls.SCCA.fixed(64, shift=32), "scca.fixed(64, shift=32)"),
        ((a | b) & c, "(window(4096) | sink(4)) & chunk(8, offset=2, causal=false)"),
        (a | b & c, "window(4096) | sink(4) & chunk(8, offset=2, causal=false)"),
        (a - b - c, "window(4096) - sink(4) - chunk(8, offset=2, causal=false)"),
        (a - (b - c), "window(4096) - (sink(4) - chunk(8, offset=2, causal=false))"),
        ((a & b) - c, "(window(4096) & sink(4)) - chunk(8, offset=2, causal=false)"),
        (ls.PerHead(a, b | a), "heads(window(4096), sink(4) | window(4096))"),
        (ls.PerLayer(a, b) & ls.Document(3, 5), "layers(window(4096), sink(4)) & document(3, 5)"),
    ],
)
def test_round_trip(pattern, text):
    assert str(pattern) == text
    assert ls.parse(text) == pattern
    assert ls.parse(str(ls.parse(text))) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "Window(4_096)|SINK(size=4)",
        "  ( window ( size = 4096 ) ) | sink( 4 , ) ",
        "window(4096)\n| sink(4)",
    ],
)
def test_spelling_is_free(text):
    assert ls.parse(text) == a | b


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("windwo(3)", "did you mean 'window'?", 0),
        ("window(4) | slink(2)", "did you mean 'sink'?", 12),
        ("zzz(3)", "there are: ", 0),
        ("window(3", "expected , or )", 8),
        ("window(3) sink(4)", "expected an operator", 10),
        ("window(-1)", "size must be from 1", 0),
        ("sink(1) | window(2.5)", "whole number, got 2.5", 10),
        ("window()", "window: missing a required argument: 'size'; write window(size)", 0),
        ("window(4, true, 4)", "window: too many positional arguments; write window(size)", 0),
        ("sink(1) | window(4, causal=maybe)", "must be true or false, got 'maybe'", 10),
        ("window(3, casual=false)", "did you mean 'causal'?", 10),
        ("window(3, size=4, size=5)", "argument 'size' is given twice", 18),
        ("window(1__0)", "'1__0' is no number", 7),
        ("window(" + "9" * 5000 + ")", f"'{'9' * 24}...' is no number", 7),
        ("longformer(8, dilation=2.5)", "step must be a whole number, got 2.5", 0),
        ("window(size=3, 4)", "plain arguments come first", 15),
        ("window 3", "window needs its arguments in brackets: window(size)", 7),
        ("heads(causal, window(4))", "causal needs its arguments in brackets: causal()", 12),
        ("heads(causal(), widnow)", "did you mean 'window'?", 16),
        ("window(3) |", "expected a pattern", 11),
        ("(window(3)", "expected )", 10),
        ("heads(window(3), 4)", "expected a pattern", 17),
        ("heads()", "expected at least one pattern", 0),
    ],
)
def test_errors_show_the_place(text, message, column):
    with pytest.raises(PatternError) as caught:
        ls.parse(text)
    reason, line, mark = str(caught.value).rsplit("\n", 2)
    assert message in reason
    # What was found needs no other name.
    assert ("did you mean" in reason) == ("did you mean" in message)
    assert line == f"  {text}"
    assert mark == f"  {' ' * column}^"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("swin(8)", ls.swin(8)),
        (
            "longformer(8, tokens=[0, 5], dilation=[1, 2])",
            ls.longformer(8, (0, 5), dilation=(1, 2)),
        ),
        ("bigbird(4, 2, seed=7, causal=true)", ls.bigbird(4, 2, seed=7, causal=True)),
        ("etc(radius=3)", ls.etc(3)),
        (
            "sparse_transformer(8, kind=fixed, summary=2)",
            ls.sparse_transformer(8, kind="fixed", summary=2),
        ),
        ("longmixed(8, 2, by=layers) - sink(1)", ls.longmixed(8, 2, by="layers") - ls.Sink(1)),
        ("heads(etc(2, 1), dense())", ls.PerHead(ls.etc(2, 1), ls.Dense())),
    ],
)
def test_presets_are_read_as_what_they_are_made_of(text, pattern):
    assert ls.parse(text) == pattern
    assert ls.parse(str(pattern)) == pattern


def test_errors_in_presets_show_the_place():
    with pytest.raises(PatternError, match=r"causal must be true or false(.|\n)*\n            \^"):
        ls.parse("sink(1) | bigbird(causal=maybe)")
    with pytest.raises(PatternError, match="did you mean 'longformer'"):
        ls.parse("longfromer(8)")


def test_empty_and_foreign_input():
    with pytest.raises(PatternError, match="the pattern is empty"):
        ls.parse("  ")
    with pytest.raises(PatternError, match="expected a pattern as text, got 3"):
        ls.parse(3)
    with pytest.raises(PatternError, match="nested too deeply"):
        ls.parse("(" * 10_000)


def test_a_new_atom_parses_once_its_class_exists():
    assert {"window", "sink", "scca.flow", "heads", "layers"} <= set(names())
    assert "and" not in names()
