"""The page: complete, self-contained, and honest about what is missing."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

from longspan.train.extend_folder import write_report
from longspan.viz.report import render


class Page(HTMLParser):
    """Collects links, text and whether tags close."""

    VOID = frozenset({"meta", "br", "rect", "circle", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.external: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.external += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.external += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_and_loads_nothing(report: dict[str, Any]) -> None:
    html = render(report)
    page = Page(html)
    assert page.open == []
    assert page.external == []
    for word in ("@import", "url(", "http://", "https://", "<script"):
        assert word not in html


def test_page_shows_the_numbers(report: dict[str, Any]) -> None:
    text = " ".join(Page(render(report)).text)
    row = report["trained"]["perplexity"]["lengths"][-1]
    assert f"{row['perplexity']:,.2f}" in text
    ratio = row["perplexity"] / report["dense"]["perplexity"]["lengths"][-1]["perplexity"] - 1
    assert f"{ratio:+.1%}" in text
    assert "scca.flow(512)" in text
    assert "tiny <llama>" in text
    assert report["command"] in text
    assert render(report).count("<svg") == 4 + 4


def test_page_without_comparison_passkey_or_finite_base(report: dict[str, Any]) -> None:
    report["dense"] = None
    for name in ("base", "scaled", "trained"):
        report[name]["passkey"] = None
    report["base"]["perplexity"]["lengths"][-1]["perplexity"] = float("inf")
    report["base"]["perplexity"]["positions"]["nll"][-1] = None
    text = " ".join(Page(render(report)).text)
    assert "overflow" in text
    assert "against dense" not in text
    assert "Passkey" not in text


def test_page_of_the_stored_report_is_the_same(report: dict[str, Any], tmp_path: Any) -> None:
    write_report(report, tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert render(stored) == (tmp_path / "report.html").read_text()
