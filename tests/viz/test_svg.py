"""Charts: where values are drawn, not only that something is."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from longspan.viz.svg import Series, heat_map, label, line_chart


def dots(svg: str) -> list[tuple[float, float]]:
    return [
        (float(c.attrib["cx"]), float(c.attrib["cy"])) for c in ET.fromstring(svg).iter("circle")
    ]


def test_log_axis_puts_factors_at_equal_distances() -> None:
    points = [(1, 1.0), (2, 10.0), (3, 100.0)]
    svg = line_chart(
        [Series(name="s", color=1, points=points)], x_label="x", y_label="y", log_y=True
    )
    (_, a), (_, b), (_, c) = dots(svg)
    assert a - b == pytest.approx(b - c, abs=0.2)
    assert a > b > c, "larger values are drawn higher"


def test_points_that_are_missing_or_infinite_break_the_line() -> None:
    points = [(0, 1.0), (1, None), (2, math.inf), (3, 2.0), (4, 3.0)]
    svg = line_chart([Series(name="s", color=1, points=points)], x_label="x", y_label="y")
    path = re.search(r'<path d="(M[^"]*)" class="line"', svg)
    assert path is not None
    assert path[1].count("M") == 2
    assert len(dots(svg)) == 3


def test_no_data_is_said() -> None:
    svg = line_chart([Series(name="s", color=1, points=[(1, None)])], x_label="x", y_label="y")
    assert "no data" in svg


def test_one_value_has_room_around_it() -> None:
    svg = line_chart(
        [Series(name="s", color=1, points=[(1, 5.0), (2, 5.0)])],
        x_label="x",
        y_label="y",
        log_y=True,
    )
    assert all(math.isfinite(v) for dot in dots(svg) for v in dot)


def test_heat_map_shades_by_value_and_leaves_gaps() -> None:
    svg = heat_map(
        [[0.0, 1.0], [0.5, None]],
        rows=("512", "1,024"),
        columns=("0", "1"),
        row_label="r",
        column_label="c",
    )
    cells = list(ET.fromstring(svg).iter("rect"))
    shades = [float(cell.attrib["fill-opacity"]) for cell in cells]
    assert len(cells) == 3
    assert shades[0] < shades[2] < shades[1]
    assert [t.text for t in ET.fromstring(svg).iter("title")][1] == "512 tokens, depth 1: 100%"


def test_texts_are_escaped() -> None:
    svg = line_chart([Series(name="<&>", color=1, points=[(0, 1.0)])], x_label="<x>", y_label="&")
    ET.fromstring(svg)


@pytest.mark.parametrize(
    ("value", "text"), [(4096.0, "4,096"), (0.25, "0.25"), (1e7, "10M"), (5, "5")]
)
def test_label(value: float, text: str) -> None:
    assert label(value) == text
