"""The report of a benchmark and its commands."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser

import pytest

from longspan.bench.curves import break_even, crossing, left_out, points, read, unrest
from longspan.bench.picture import picture
from longspan.bench.report import render
from longspan.cli.app import main
from longspan.errors import DataError
from longspan.eval.records import Records


class Page(HTMLParser):
    """Whether tags close, and what the page would load."""

    VOID = frozenset({"meta"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.external: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.external += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.external += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def call(monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["longspan", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        else:
            code = 0
        return code, *capfd.readouterr()

    return run


BENCH = ("--heads", 2, "--width", 16, "--rounds", 2, "--no-memory", "--device", "cpu")


def test_memory_of_zero_has_no_point(call, tmp_path):
    code, *_ = call("bench", "window(9)", "--lengths", "64,128", *BENCH, "--out", tmp_path)
    assert code == 0
    file = tmp_path / "records.jsonl"
    header, *records = map(json.loads, file.read_text().splitlines())
    for record in records:
        for row in record["rows"]:
            row["memory_bytes"] = 0 if record["n"] == 64 else 3 << 20
    file.write_text("".join(json.dumps(one) + "\n" for one in (header, *records)))
    code, _, err = call("report", tmp_path)
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    assert page.count("peak memory, MiB") == 2 * 2
    assert "<title>longspan auto: 128, 3.000</title>" in page
    assert "<title>longspan auto: 64, 0.000</title>" not in page


def test_a_benchmark_without_whole_records_is_refused(call, tmp_path):
    code, *_ = call("bench", "window(9)", "--lengths", "64", *BENCH, "--out", tmp_path)
    assert code == 0
    file = tmp_path / "records.jsonl"
    header, record, *_ = file.read_text().splitlines(keepends=True)
    # Killed before the first was measured.
    file.write_text(header)
    code, _, err = call("report", tmp_path)
    assert (code, "no finished measurement" in err) == (2, True), err
    file.write_text(header + record + '{"key": "4096/0", "nll": 2.5}\n')
    code, _, err = call("report", tmp_path)
    assert (code, "'4096/0'" in err) == (2, True), err
    assert not (tmp_path / "report.html").exists()


def test_axes_show_numbers_as_they_are(tmp_path):
    dense, ours = ({"name": name, "of_dense": 1.0} for name in ("dense SDPA", "longspan auto"))
    rows = [{**dense, "seconds": 3e-4}, {**ours, "seconds": 4e-5}]
    records = [{"pattern": "window(9)", "way": "forward", "n": n, "rows": rows} for n in (64, 128)]
    file = tmp_path / "drawn.svg"
    picture({"settings": {}, "records": records}, file)
    # Of texts that it draws as curves matplotlib keeps the words.
    drawn = file.read_text()
    assert "<!-- 0.1 -->" in drawn
    assert "e\N{MINUS SIGN}" not in drawn


def test_bench_then_report(call, tmp_path):
    sizes = ("--lengths", "64,128", *BENCH)
    code, out, err = call("bench", "window(9)", "ssa(8, 4)", *sizes, "--peers", "--out", tmp_path)
    assert code == 0, err
    assert "NATTEN: does not run on cpu" in out
    assert "window(9)" in out
    code, out, _ = call("report", tmp_path)
    assert code == 0
    assert out.split() == [str(tmp_path / "report.html"), str(tmp_path / "report.png")]
    page = Page((tmp_path / "report.html").read_text())
    assert page.external == []
    text = " ".join(page.text)
    for word in ("ssa(8, 4), forward+backward", "break-even", "NATTEN", "dense SDPA", "torch"):
        assert word in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_bench_as_json(call):
    code, out, _ = call("bench", "chunk(8)", "--lengths", "64", *BENCH, "--forward-only", "--json")
    assert code == 0
    found = json.loads(out)
    (record,) = found["records"]
    assert (record["pattern"], record["way"]) == ("chunk(8)", "forward")
    assert found["settings"]["environment"]["packages"]["longspan"]


def test_what_is_named_twice_is_measured_once(call):
    twice = ("window(9)", "window(9)", "--lengths", "64,64", "--impl", "tiled,tiled")
    code, out, _ = call("bench", *twice, *BENCH, "--forward-only", "--json")
    assert code == 0
    (record,) = json.loads(out)["records"]
    assert [row["name"] for row in record["rows"]] == ["longspan tiled", "dense SDPA"]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("bench", "windo(9)", *BENCH), 2, "window"),
        (("bench", "window(9)", "--lengths", "many"), 2, "whole numbers"),
        (("bench", "window(9)", "--lengths", "64", "--impl", "cudnn", *BENCH), 3, "cuda"),
        (("bench", "window(9)", "--key-heads", "0", *BENCH), 2, "key_heads"),
        (("report", "/nowhere"), 2, "holds no benchmark"),
    ],
)
def test_mistakes_are_one_paragraph(call, arguments, code, word):
    found, _, err = call(*arguments)
    assert found == code
    assert word in err
    assert "Traceback" not in err


def made(seconds):
    """Records of one pattern from {length: (ours, dense)}."""
    return {
        "settings": {},
        "records": [
            {
                "pattern": "p",
                "way": "forward",
                "n": n,
                "rows": [
                    {"name": "longspan auto", "seconds": ours},
                    {"name": "dense slow", "seconds": 9e9},
                    {"name": "dense quick", "seconds": dense},
                ],
            }
            for n, (ours, dense) in seconds.items()
        ],
    }


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1024: (2.0, 1.0), 4096: (8.0, 16.0)}, "about 2,000"),
        ({1024: (1.0, 2.0), 4096: (8.0, 16.0)}, "below 1,024"),
        ({1024: (2.0, 1.0), 4096: (17.0, 16.0)}, "beyond 4,096"),
        # Faster, slower and faster again: only the last change counts.
        ({512: (1.0, 2.0), 1024: (2.0, 1.0), 4096: (8.0, 16.0)}, "about 2,000"),
        ({}, "not measured"),
    ],
)
def test_break_even(seconds, expected):
    found = made(seconds)
    ours = points(found, "p", "forward", "longspan auto", "seconds")
    dense = points(found, "p", "forward", "dense", "seconds")
    assert [y for _, y in dense] == [d for _, d in seconds.values()]
    assert break_even(ours, dense) == expected


def test_break_even_lies_where_the_lines_cross():
    # Linear against quadratic time, alike at 2000.
    ours = [(n, n * 2000.0) for n in (1024, 4096)]
    dense = [(n, float(n * n)) for n in (1024, 4096)]
    assert break_even(ours, dense) == "about 2,000"


def test_break_even_is_marked_between_measured_lengths():
    ours = [(n, n * 2000.0) for n in (1024, 4096)]
    dense = [(n, float(n * n)) for n in (1024, 4096)]
    assert crossing(ours, dense) == pytest.approx(2000)
    assert crossing(ours[1:], dense[1:]) is None
    assert crossing(ours[:1], dense[:1]) is None
    assert crossing([], []) is None


def test_the_best_dense_kernel_is_what_rates_are_of():
    found = made({64: (1.0, 2.0)})
    for row, share in zip(found["records"][0]["rows"], (0.5, 0.8, 1.0), strict=True):
        row["of_dense"] = share
    assert points(found, "p", "forward", "dense", "of_dense") == [(64, 1.0)]


def test_who_was_left_out_and_where():
    def record(pattern, way, *rows):
        return {"pattern": pattern, "way": way, "rows": rows}

    gone = {"name": "gone", "absent": "not installed: pip install gone"}
    some = {"name": "some", "refused": "no backward"}
    odd = {"name": "odd", "wrong": {"dq": 0.25}}
    found = left_out(
        [
            record("a", "forward", gone),
            record("a", "backward", gone, some),
            record("b", "forward", gone, odd),
            record("b", "backward", gone, some),
        ]
    )
    assert found == [
        ("gone", "not installed: pip install gone"),
        ("some", "no backward (backward)"),
        ("odd", "wrong, so not timed: relative error of dq 0.25 (b; forward)"),
    ]


def test_a_busy_machine_is_told():
    def rows(*spreads):
        return [{"rows": [{"spread": spread} for spread in spreads] + [{"absent": "x"}]}]

    assert unrest(rows(0.1, 0.05, 0.3, 0.0, 0.1)) == ""
    assert unrest(rows()) == ""
    said = unrest(rows(0.1, 0.05, 0.3, 0.75))
    assert "2 of 4" in said
    assert "75%" in said


def test_only_records_are_read(tmp_path):
    with pytest.raises(DataError, match=r"records\.jsonl"):
        read(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"key": "x"}\n')
    with pytest.raises(DataError, match="holds no benchmark"):
        read(tmp_path)
    (tmp_path / "records.jsonl").unlink()
    # As longspan compare keeps them.
    Records(tmp_path / "records.jsonl", {"lengths": [64], "rounds": 0})
    with pytest.raises(DataError, match="holds no benchmark"):
        read(tmp_path)


def test_names_are_escaped(tmp_path):
    found = made({64: (1.0, 2.0), 128: (1.0, 4.0)})
    for record in found["records"]:
        record["pattern"] = "<b>"
        for row in record["rows"]:
            row |= {"spread": 0.1, "of_dense": 0.5}
    found["settings"] = {
        **{"heads": 1, "key_heads": 1, "width": 1, "dtype": "x", "device": "cpu", "rounds": 1},
        "environment": {
            **{"cpu": "c", "cores": 1, "threads": 1, "cuda": [], "platform": "p", "python": "3"},
            "packages": {},
        },
        "peer_versions": {},
    }
    page = render(found)
    Page(page)
    assert "<b>" not in page
