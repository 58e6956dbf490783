"""Comparing patterns and mechanisms: what is counted is right, runs are resumed, tables agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import longspan as ls
from longspan.analysis import kept_tokens
from longspan.bench import compare, tally
from longspan.bench import compare_reach as sight
from longspan.bench import compare_report as report
from longspan.bench.compare import Compare, run
from longspan.bench.compare_entries import (
    GROUPS,
    MECHANISMS,
    DenseLayer,
    PatternLayer,
    choose,
    entry,
)
from longspan.cli.app import main
from longspan.cli.compare import _show
from longspan.errors import InputError, LongspanError
from longspan.eval.records import Records
from longspan.mechanism.layer import MechanismLayer
from longspan.ops import capability

SMALL = {"lengths": (32, 64), "tokens": 48, "followed": 4, "near": 8, "text": 64, "rounds": 1}


def layers(text: str, count: int = 2, **sizes) -> list[MechanismLayer]:
    torch.manual_seed(0)
    one = entry(text)
    return [one.kind(32, 4, **{"kv_heads": 2, **sizes}, **one.at(96)) for _ in range(count)]


def x(n: int) -> torch.Tensor:
    return torch.randn(1, n, 32, generator=torch.Generator().manual_seed(1))


def test_every_mechanism_and_many_patterns_are_in_the_tables():
    kinds = {getattr(ls.mechanism, name) for name in ls.mechanism.__all__}
    kinds = {k for k in kinds if isinstance(k, type) and issubclass(k, MechanismLayer)}
    assert {entry(text).kind for text in MECHANISMS} == kinds
    every = choose(())
    assert len(every) == len(set(GROUPS["patterns"]) | set(GROUPS["mechanisms"]))
    assert all(one.formula != "-" for one in every)
    assert choose(("mechanisms", "MoBA", "MoBA")) == (*choose(("mechanisms",)), entry("MoBA"))


def test_formulas_come_from_modules_and_cards():
    assert entry("AdaptiveSpan").formula == "N (z + R) D"
    assert entry("window(60) | sink(4)").formula == "N w + N n"
    assert entry("swin(64)").formula == "N g"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Nothing()", "no layer of longspan.mechanism"),
        ("MoBA(blocks=3)", "no option blocks; it has"),
        ("MoBA(3)", "options by name"),
        ("MoBA(block=open('x'))", "options by name"),
        ("MoBA(block=", "options by name"),
        ("PooledChunkAttention", "needs chunk, as in PooledChunkAttention"),
        ("windo(3)", "window"),
    ],
)
def test_wrong_entries_are_named(text, said):
    with pytest.raises(LongspanError, match=said):
        choose((text,))


@pytest.mark.parametrize("text", ["window(5) | sink(2)", "swin(8)", "scca.flow(4)"])
def test_gradients_see_what_the_mask_allows(text):
    n, own = 31, layers(text, 3)
    for number, layer in enumerate(own):
        assert isinstance(layer, PatternLayer)
        layer.layer = number
    rows = sight.starts(n, n)
    pattern = entry(text).pattern
    assert pattern is not None
    masks = sight.pattern_layers(pattern, n, 4, 3)
    found = sight.walk(own, [x(n)] * 3, rows)
    for mine, wanted in zip(found, sight.follow(masks, rows), strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_shares_count_legal_keys():
    n, w = 24, 4
    rows = sight.starts(n, n)
    mask = ls.Window(w).mask(n)[0]
    found = sight.shares(sight.follow([mask, mask], rows), rows, 8, causal=True)
    legal = n * (n + 1) / 2
    assert found["reach"][0] == pytest.approx(mask.sum() / legal)
    assert found["reach"][1] == pytest.approx(ls.coverage(ls.Window(w), n).reach[1].share)
    assert found["near"] == pytest.approx(mask.sum() / sum(min(i + 1, 8) for i in range(n)))


def test_a_leak_is_seen_and_causal_layers_have_none():
    assert sight.leak(layers("window(9, causal=false)")[0], x(40)) > sight.LEAK
    assert sight.leak(layers("TopK(keep=4)")[0], x(40)) <= sight.LEAK
    published = layers("RoutingAttention(selection='clusters', clusters=4, window=8)")[0]
    assert sight.leak(published, x(40)) > sight.LEAK


def test_states():
    assert kept_tokens(ls.Window(8), 32, 4, 2) == 7
    assert kept_tokens(ls.Causal(), 32, 4, 2) == 32
    # Each key head serves heads of two residues modulo 4.
    assert kept_tokens(ls.Strided(4), 32, 4, 2) == 16
    sizes = [(n, sight.mechanism_state(layers("TopK")[0], x(n))) for n in (16, 32)]
    assert sizes == [(16, 16.0), (32, 32.0)]
    linear = [sight.mechanism_state(layers("LinearAttention")[0], x(n)) for n in (16, 32)]
    assert linear[0] == linear[1]
    values = layers("Synthesizer(kind='dense', max_length=20)")[0]
    assert sight.mechanism_state(values, x(16)) == 8
    published = layers("RoutingAttention(selection='clusters')")[0]
    assert sight.mechanism_state(published, x(16)) is None


def test_growth_is_the_exponent():
    assert sight.growth([(n, 3 * n**1.5) for n in (10, 100, 1000)]) == pytest.approx(1.5)
    assert sight.growth([(10, 3.0)]) is None


def test_products_are_counted_without_projections():
    n, d = 40, 8
    dense = DenseLayer(32, 4, kv_heads=2)
    assert tally.products(dense, x(n)) == 4 * d * 4 * n * (n + 1) // 2
    linformer = layers("Linformer(rank=16)")[0]
    # Keys and values are projected, then attended to.
    assert tally.products(linformer, x(n)) == 2 * (2 * 2 * 16 * n * d) + 4 * d * 4 * n * 16


@pytest.mark.parametrize(("text", "least"), [("MoBA(block=16, top=2)", 0.2), ("Synthesizer", 1)])
def test_work_is_the_same_without_compiled_code(monkeypatch, text, least):
    asked = Compare(entries=choose((text,)), **{**SMALL, "rounds": 0})
    (compiled,) = run(asked, Records(None, asked.settings()))
    # The attention itself is in it.
    assert all(row["of_dense"] > least for row in compiled["lengths"])
    plain = tuple(kernel for kernel in capability.KERNELS if kernel.name != "native")
    monkeypatch.setattr(capability, "KERNELS", plain)
    (other,) = run(asked, Records(None, asked.settings()))
    assert other["lengths"] == compiled["lengths"]


def test_peak_counts_what_lives_at_a_time():
    before = torch.ones(1000)

    def call():
        one = before + 1
        two = one * 2
        del one
        return (two.view(10, 100) - 1).sum()

    assert 8000 <= tally.peak_bytes(call) < 8100
    assert tally.peak_bytes(lambda: before.add_(1)) == 0


@pytest.fixture(scope="module")
def found():
    texts = ("causal()", "window(8)", "swin(8)", "LinearAttention", "Synthesizer(max_length=20)")
    asked = Compare(entries=choose(texts), **SMALL)
    records = Records(None, asked.settings())
    return asked, records, run(asked, records)


def test_a_comparison(found):
    _, _, rows = found
    dense, window, swin, linear, refused = rows
    assert dense["error"] < 1e-5 < window["error"]
    assert dense["reach"] == [1.0] * 4
    assert [row["of_dense"] for row in dense["lengths"]] == [1.0, 1.0]
    pairs = [ls.plan(ls.Window(8), n, 8).pairs for n in (32, 64)]
    assert [row["operations"] for row in window["lengths"]] == [4 * 32 * p for p in pairs]
    assert window["exponent"] == pytest.approx(np.log2(pairs[1] / pairs[0]))
    assert (dense["state"], window["state"], swin["state"]) == (504, 7, None)
    assert linear["state_growth"] == pytest.approx(0, abs=1e-9)
    assert linear["leak"] <= sight.LEAK
    assert not swin["causal"]
    assert "made for 20 rows" in refused["refused"]
    for row in window["lengths"]:
        for way in ("forward", "forward+backward"):
            took = row[way]
            assert took["of_dense"] == pytest.approx(took["seconds"] / took["dense_seconds"])
        assert row["memory_bytes"] > row["n"] * 256 * 4


def test_what_is_recorded_is_not_measured_again(found, monkeypatch):
    asked, records, rows = found
    monkeypatch.setattr(compare, "Counts", None)
    assert run(asked, records) == rows


@pytest.mark.parametrize("python", [None, "false"])
def test_a_second_process_counts_the_same(found, monkeypatch, python):
    asked, _, rows = found
    asked, before = replace(asked, entries=asked.entries[:1]), deepcopy(rows[0])
    monkeypatch.setattr(compare, "_MANY", 1)
    monkeypatch.setattr(compare.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    if python is None:
        # Nothing is counted here.
        monkeypatch.setattr(compare, "Counts", None)
    else:
        # The process ends without a word: this one counts.
        monkeypatch.setattr(compare.sys, "executable", python)
    (again,) = run(asked, Records(None, asked.settings()))
    for row in (*again["lengths"], *before["lengths"]):
        for way in ("forward", "forward+backward"):
            assert row.pop(way)
    assert again == before


def test_tables_agree_everywhere(found):
    asked, _, rows = found
    settings = json.loads(json.dumps(asked.settings()))
    text, page = report.markdown(settings, rows), report.page(settings, rows)
    assert f"| {rows[1]['error']:.3f} |" in text
    assert text.count("| window(8) |") == 5
    for table in report.tables(settings, rows):
        assert table.title in text
        for row in report.done(rows):
            cells = [column.cell(row) for column in table.columns]
            assert "| " + " | ".join(cells) + " |" in text
            assert all(f">{cell}<" in page for cell in cells)
    assert "made for 20 rows" in text
    assert "made for 20 rows" in page
    assert "http" not in page
    assert "src=" not in page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TopK(keep=0)", "TopK.keep=0. cannot be compared: keep must be a whole number"),
        ("MoBA(impl='fast')", "cannot be compared: impl must be"),
        ("heads(window(4), window(3), window(2))", "8 query heads"),
        ("Linformer(causal=True)", "no causal form"),
    ],
)
def test_an_option_that_does_not_fit_is_found_before_any_work(tmp_path, monkeypatch, text, said):
    monkeypatch.setattr(compare, "Counts", None)
    monkeypatch.setattr(compare, "Clock", None)
    asked = Compare(entries=choose(("causal()", text)), **SMALL)
    with pytest.raises(InputError, match=said):
        run(asked, Records(None, asked.settings()))
    out = tmp_path / "out"
    for more in (["--dry-run"], ["--out", str(out), "--rounds", "0"]):
        monkeypatch.setattr(sys, "argv", ["longspan", "compare", text, *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2


def test_the_second_process_ends_quietly_without_the_first(tmp_path):
    sizes = json.dumps({"entries": ["window(8)"], **{**SMALL, "lengths": [32]}})
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "longspan.bench.compare_counts", sizes]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize(
    "changed",
    [
        {"entries": ()},
        {"lengths": ()},
        {"lengths": (1,)},
        {"rounds": -1},
        {"threads": 0},
        {"dtype": "int8"},
        {"device": "tpu"},
    ],
)
def test_wrong_sizes_are_refused(changed):
    with pytest.raises(InputError):
        Compare(**{"entries": choose(("causal()",)), **changed})


def test_a_table_that_cannot_be_written_is_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("measured"))
    asked = ["compare", "causal()", "--rounds", "0", "--html", str(tmp_path / "no" / "a.html")]
    monkeypatch.setattr(sys, "argv", ["longspan", *asked])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_comparison_without_figures_is_a_failure(monkeypatch, capsys, how):
    asked = ["compare", "Linformer(max_length=300)", "--lengths", "32", "--rounds", "0", *how]
    monkeypatch.setattr(sys, "argv", ["longspan", *asked])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code == 3
    assert "made for 300 rows" in said.out
    assert "No entry could be compared" in said.err


@pytest.mark.parametrize("width", [66, 80])
def test_narrow_tables_keep_words_of_headings_and_figures(found, monkeypatch, capsys, width):
    asked, _, records = found
    monkeypatch.setenv("COLUMNS", str(width))
    _show(asked.settings(), records)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    lines = [line.split() for line in shown.splitlines() if line[:1] in "┃│"]
    words = {word for line in lines for word in line}
    for table in report.tables(asked.settings(), records):
        for column in table.columns[1:]:
            wanted = column.title.split()
            if not column.left:
                wanted += map(column.cell, report.done(records))
            assert words.issuperset(wanted)


def test_the_command(tmp_path, monkeypatch, capsys):
    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["longspan", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    plan = json.loads(call("patterns", "MoBA", "--dry-run", "--json"))
    assert len(plan["entries"]) == len(GROUPS["patterns"]) + 1
    assert "Nothing was measured" in call("MoBA", "--dry-run")
    asked = ("window(8) | sink(2)", "--lengths", "64,32", "--rounds", 0, "--out", tmp_path)
    told = json.loads(call(*asked, "--json"))
    assert told["records"][0]["entry"] == "window(8) | sink(2)"
    assert told["settings"]["lengths"] == [32, 64]
    monkeypatch.setattr(compare, "Counts", None)
    files = [tmp_path / "a.md", tmp_path / "a.html"]
    shown = call(*asked, "--markdown", files[0], "--html", files[1])
    assert "Coverage" in shown
    assert "Time and memory" not in shown
    assert "window(8) \\| sink(2)" in files[0].read_text()
    assert "window(8) | sink(2)" in files[1].read_text()
