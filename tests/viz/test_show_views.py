"""Pictures: cells against masks, rectangles against cells, text, SVG, PNG and words."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

import longspan as ls
from longspan.analysis.reach import reach_exact
from longspan.errors import InputError, PatternError, Refusal
from longspan.viz import matrices, png, terminal, words
from longspan.viz.palette import blend, reach_color
from longspan.viz.views import Views, views

SENTENCE = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
SWIN = "layers(chunk(4, causal=false), chunk(4, offset=2, causal=false))"


@pytest.mark.parametrize("text", ["window(5) | sink(1)", "scca.flow(4)", "shifted_chunk(6)"])
def test_cells_are_pairs_while_they_fit(text):
    pattern = ls.parse(text)
    found = views(pattern, 29, heads=4, layers=3)
    mask = pattern.mask(29, 4)
    assert sorted(head for view in found.each for head in view.heads) == [0, 1, 2, 3]
    for view in found.each:
        for head in view.heads:
            np.testing.assert_array_equal(view.seen > 0, mask[head])
    np.testing.assert_allclose(found.together, mask.mean(axis=0))
    reached = list(reach_exact([mask.any(axis=0)], 3))
    np.testing.assert_array_equal(found.reach == 1, reached[0])
    np.testing.assert_array_equal((found.reach >= 1) & (found.reach <= 3), reached[2])


def test_never_is_told_from_not_yet():
    found = views(ls.Chunk(4), 12, layers=1)
    assert found.reach[8, 0] == -1
    assert views(ls.Window(2), 12, layers=1).reach[8, 0] == 0


def test_larger_cells_hold_the_share_of_their_pairs():
    pattern = ls.Window(7)
    found = views(pattern, 60, cells=7)
    mask = pattern.mask(60)[0]
    place = np.arange(60) * 7 // 60
    for row in range(7):
        for column in range(7):
            block = mask[np.ix_(place == row, place == column)]
            assert found.each[0].seen[row, column] == pytest.approx(block.mean())
    assert found.exact


def test_long_sequences_are_sampled_and_agree():
    found = views(ls.SCCA.flow(512), 4096, heads=2, layers=2, cells=8)
    exact = views(ls.SCCA.flow(1), 8, heads=2, layers=2)
    assert not found.exact
    for a, b in zip(found.each, exact.each, strict=True):
        np.testing.assert_array_equal(a.seen > 0, b.seen > 0)
    # Sampling cannot tell never from not yet.
    np.testing.assert_array_equal(found.reach, np.maximum(exact.reach, 0))


def test_layers_that_differ_are_shown_one_by_one():
    found = views(ls.parse(SWIN), 16, heads=2, layers=3)
    assert [view.title for view in found.each] == ["layer 0, every head", "layer 1, every head"]


def test_errors_name_the_bounds():
    with pytest.raises(InputError, match="n from 1 to 131,072, got 1,000,000"):
        views(ls.Causal(), 1_000_000)
    with pytest.raises(InputError, match="layers from 1"):
        views(ls.Causal(), 8, layers=0)
    with pytest.raises(PatternError, match="evenly over 3"):
        views(ls.PerHead(ls.Causal(), ls.Sink(1)), 8, heads=3)


@pytest.mark.parametrize("seed", range(5))
def test_rectangles_cover_exactly_the_set_cells(seed):
    flags = np.random.default_rng(seed).random((11, 13)) < 0.5
    covered = np.zeros(flags.shape, int)
    for x, y, width, height in matrices.rectangles(flags):
        covered[y : y + height, x : x + width] += 1
    np.testing.assert_array_equal(covered, flags)


def test_equal_rows_make_one_rectangle():
    assert matrices.rectangles(np.ones((9, 9), bool)) == [(0, 0, 9, 9)]
    assert matrices.rectangles(np.zeros((9, 9), bool)) == []


def test_svg_is_well_formed_and_grows_with_the_outline_only():
    sizes = []
    for n in (128, 256):
        text = matrices.document(views(ls.Window(16) | ls.Sink(2), n, heads=2))
        root = ET.fromstring(text)
        assert root.tag.endswith("svg")
        labels = [node.get("aria-label") for node in root.iter() if node.get("aria-label")]
        assert labels == ["every head", "reach"]
        sizes.append(len(text))
    assert sizes[1] < 2.2 * sizes[0]
    assert len(matrices.document(views(ls.Window(4096), 32768, cells=64))) < 20_000


def test_svg_escapes_and_is_free_of_outside_resources():
    text = matrices.document(views(ls.Document(3) & ls.Causal(), 8))
    assert "document(3) &amp; causal()" in text
    assert text.count("http") == 1, "the name space only"


def printed(found: Views, color: str | None) -> str:
    out = StringIO()
    console = Console(
        file=out,
        width=120,
        color_system=color,
        force_terminal=color is not None,
        legacy_windows=False,
    )
    console.print(terminal.picture(found, console))
    console.print(terminal.legend(found, color is None))
    return out.getvalue()


def test_terminal_draws_two_rows_in_a_line():
    text = printed(views(ls.Window(2), 4, layers=2), None)
    assert [line[1:5] for line in text.split("\n")[1:3]] == ["█▄  ", " ▀█▄"]
    assert "reached after layer 1 2" in text
    reach = [line.split("│")[3].rstrip() for line in text.split("\n")[1:3]]
    assert reach == ["1", "11"]


def test_terminal_writes_titles_in_full():
    text = printed(views(ls.swin(4), 8, layers=2), None)
    for title in ("layer 0, the head", "layer 1, the head", "all heads", "reach"):
        assert f"─ {title} ─" in text


def test_terminal_marks_what_is_never_reached():
    assert "xx11" in printed(views(ls.Chunk(2), 4, layers=1), None)
    assert "x never" in printed(views(ls.Chunk(2), 4, layers=1), None)


def test_terminal_uses_colours_where_there_are_some():
    text = printed(views(ls.Window(2), 4, layers=2), "truecolor")
    red, green, blue = (int(reach_color(2)[at : at + 2], 16) for at in (1, 3, 5))
    assert f"38;2;{red};{green};{blue}" in text


def test_blend():
    assert blend("#ff0080", 0.5, "#000000") == "#800040"
    assert blend("#ff0080", 1.0, "#123456") == "#ff0080"


@pytest.mark.parametrize("name", ["a.png", "a", "a.b"])
def test_png_is_written(name, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    png.write(views(ls.Chunk(4), 16, heads=2), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_png_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Refusal, match=r"pip install 'longspan\[viz\]'"):
        png.write(views(ls.Chunk(4), 16), tmp_path / "a.png")


def test_words_before_and_after_the_second_part():
    first, second = words.scenes(ls.parse("window(3, causal=false) | prefix(1)"), SENTENCE, 4)
    np.testing.assert_array_equal(first.seen, ls.Window(3, causal=False).mask(9)[0])
    assert not first.new.any()
    assert sorted(zip(*np.nonzero(second.new), strict=True)) == [(row, 0) for row in range(2, 9)]
    lines = words.table(second, SENTENCE).plain.split("\n")
    assert lines[0] == "window(3, causal=false) | prefix(1)"
    assert lines[1].split() == SENTENCE
    assert lines[6].split() == ["jumps", "✓", "·", "·", "✓", "✓", "✓", "·", "·", "·"]
    # Marks stand under their words.
    assert lines[1].index("fox") + 1 == lines[6].index("✓", 15)


def test_words_for_each_kind_of_head():
    found = words.scenes(ls.parse("scca.flow(2)"), SENTENCE[:4], 2)
    assert [scene.title for scene in found] == ["scca.flow(2), head 0", "scca.flow(2), head 1"]


def test_words_for_each_layer():
    pattern = ls.parse("layers(window(3) | sink(1), dilated(3, 2))")
    first, second = words.scenes(pattern, SENTENCE[:8], 2)
    assert [first.title, second.title] == [
        "layer 0: window(3) | sink(1)",
        "layer 1: dilated(3, 2)",
    ]
    np.testing.assert_array_equal(second.seen, ls.Dilated(3, 2).mask(8)[0])
    assert not first.new.any()
    assert not second.new.any()
    # 2 back in even layers and 4 in odd ones: 3 layers where the window alone would take 4.
    pattern = ls.parse("layers(window(3), dilated(3, 2))")
    assert "After 3 layers" in words.scenes(pattern, SENTENCE[:8], 2)[0].note


def test_words_tell_of_what_is_never_learned():
    (found,) = words.scenes(ls.Chunk(2), SENTENCE[:4], 1)
    assert found.note == (
        "Each token sees 1 to 2 of 4 tokens. "
        "'brown' never learns of 'The', whatever the number of layers."
    )
    with pytest.raises(InputError, match="1 to 40 tokens, got 0"):
        words.scenes(ls.Chunk(2), [], 1)


@pytest.mark.parametrize(
    ("n", "cells", "wide"),
    [(64, 22, "2.91"), (80, 32, "2.5"), (6400, 50, "128"), (65_536, 16, "4,096")],
)
def test_widths_of_cells_are_numbers_of_tokens(n, cells, wide):
    found = views(ls.Window(4), n, cells=cells)
    assert matrices.subtitle(found).endswith(f"a cell is {wide} tokens wide")
