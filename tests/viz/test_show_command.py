"""``longspan show`` as a user calls it, and the gallery page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner, Result

import longspan as ls
from longspan.cli.app import app
from longspan.errors import DataError, InputError, PatternError
from longspan.viz.cards import CARDS
from longspan.viz.gallery import page


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["show", *arguments], catch_exceptions=False)


def test_shows_pictures_coverage_and_plan():
    text = call("window(4) | sink(1)", "--n", "24", "--heads", "2", "--layers", "2").output
    for part in (
        "every head",
        "reached after layer 1 2",
        "coverage of window(4) | sink(1)",
        "plan of window(4) | sink(1)",
        "tiles",
        "pass 0",
    ):
        assert part in text


def test_json_holds_coverage_plan_and_rectangles():
    found = json.loads(call("chunk(4)", "--n", "8", "--heads", "2", "--json").output)
    assert found["pictures"][0]["heads"] == [0, 1]
    cells = {
        (x + dx, y + dy)
        for x, y, width, height in found["pictures"][0]["rectangles"]
        for dx in range(width)
        for dy in range(height)
    }
    assert cells == {(j, i) for i in range(8) for j in range(i + 1) if i // 4 == j // 4}
    assert found["coverage"]["never"] == 16
    assert found["plan"]["pairs"] == 40


def test_writes_files(tmp_path):
    svg, png = tmp_path / "a.svg", tmp_path / "a.png"
    text = call("scca.flow(8)", "--n", "32", "--svg", str(svg), "--png", str(png)).output
    assert svg.read_text().startswith("<svg ")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "a.svg" in text
    with pytest.raises(DataError, match="cannot write"):
        call("chunk(4)", "--svg", str(tmp_path / "no" / "a.svg"))


def test_a_page_that_cannot_be_written_is_not_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.viz.gallery.page", lambda **_: pytest.fail("drawn"))
    with pytest.raises(DataError, match="cannot write"):
        call("--all", "--out", str(tmp_path / "no" / "all.html"))


def test_words_as_text_and_json():
    sentence = ["--tokens", "a b c d", "--heads", "1"]
    text = call("window(3, causal=false) | prefix(1)", *sentence).output
    assert text.count("✓") == 10 + 12
    found = json.loads(call("window(2) | sink(1)", *sentence, "--json").output)
    assert [table["title"] for table in found["tables"]] == ["window(2)", "window(2) | sink(1)"]
    assert found["tables"][1]["sees"]["3 d"] == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["window(4)", "--out", "x.svg"], "--out"),
        (["window(4)", "--tokens", "a b", "--svg", "x.svg"], "--svg and --png"),
        (["--all", "--png", "x.png"], "--svg and --png"),
        (["--all", "--tokens", "a b"], "--tokens"),
        (["--all", "--heads", "2"], "--heads"),
        (["--all", "--n", "5"], "--n and --layers"),
        (["window(4)", "--tokens", "a b", "--layers", "2"], "--n and --layers"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments, name):
    with pytest.raises(InputError, match=f"^{name} would be ignored here"):
        call(*arguments)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_outputs_without_blocks(encoding):
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "longspan", "show", *arguments]
        setting = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        done = subprocess.run(command, env=setting, capture_output=True, check=True)
        return done.stdout.decode(encoding)

    picture = run("heads(window(2), causal())", "--n", "4", "--heads", "2")
    for line in ("|##  ", "|####", "|::##", "|1111"):
        assert line in picture, picture
    assert "quick   x     x" in run("causal()", "--tokens", "The quick \u65e5")


def test_wide_letters_stand_under_their_column():
    lines = call("causal()", "--tokens", "a \u65e5\u672c b").output.splitlines()
    places = [cell_len(lines[1][: lines[1].index(word)]) for word in ("a", "\u65e5", "b")]
    last = lines[4]
    assert [at for at, sign in enumerate(last) if sign == "\u2713"] == [
        places[0],
        places[1] + 1,
        places[2],
    ]


def test_asks_for_one_thing_to_show():
    with pytest.raises(InputError, match=r"a pattern, as in .* or --all"):
        call()
    with pytest.raises(InputError, match="or --all"):
        call("window(3)", "--all")
    with pytest.raises(PatternError, match="did you mean 'window'"):
        call("windw(3)")


def test_needs_no_torch_and_answers_fast():
    code = (
        "import sys, time; sys.argv = ['longspan', 'show', 'window(8) | sink(1)']\n"
        "from longspan.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])\n"
        "print(time.process_time())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = run.stdout.splitlines()[-2:]
    assert heavy == "[]"
    # Time on the processor: other tests may be running on the same cores.
    assert float(seconds) < 1.5


class Reader(HTMLParser):
    """Counts what the page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "path":
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def gallery() -> str:
    return page(tokens=128)[0]


def test_page_holds_every_card_and_closes_every_tag(gallery):
    reader = Reader(gallery)
    assert reader.open == []
    sections = [attrs for tag, attrs in reader.tags if tag == "section" and "data-words" in attrs]
    assert [section["id"] for section in sections] == [card.name for card in CARDS]
    assert all(section["data-family"] for section in sections)
    rows = re.findall(r"<tr><th scope=\"row\">", gallery)
    assert len(rows) == len(CARDS)


def test_page_needs_nothing_from_outside(gallery):
    reader = Reader(gallery)
    assert not [tag for tag, attrs in reader.tags if "src" in attrs or tag in ("link", "img")]
    assert "url(" not in gallery
    assert "@import" not in gallery
    outside = {attrs.get("href") or "" for tag, attrs in reader.tags if tag == "a"}
    assert all(link.startswith(("#", "https://arxiv.org/abs/")) for link in outside)
    assert gallery.count("http") == gallery.count("https://arxiv.org/abs/")


def test_page_states_the_figures_of_the_plan(gallery):
    laid = ls.plan(ls.parse("chunk(4096)"), n=128, heads=32)
    assert f"of {laid.tiles():,} tiles" in gallery
    assert "<p>At 128 tokens, <code>chunk(4096)</code></p>" in gallery


def test_command_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.viz.gallery.page", lambda progress: ("<!doctype html>", 3))
    out = tmp_path / "g.html"
    assert f"wrote 3 patterns to {out}" in call("--all", "--out", str(out)).output.replace(
        "\n", ""
    )
    assert Path(out).read_text() == "<!doctype html>"
    assert json.loads(call("--all", "--out", str(out), "--json").output)["patterns"] == 3
