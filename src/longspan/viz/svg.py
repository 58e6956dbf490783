"""Line charts and heat maps as inline SVG whose colours are CSS variables, so a page can follow
light and dark.

A page that shows them defines ``--ink --muted --grid --heat`` and the series colours ``--s1 ..
--s4``; each point carries a ``title``, which browsers show on hover. No script, no fonts, nothing
external.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 12, 46


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the hover text.
        color: number of its colour, 1 to 4.
        points: (x, y); None in y breaks the line.
        dashed: draw it dashed.
        faint: draw it thin and pale, without marks.
    """

    name: str
    color: int
    points: Sequence[tuple[float, float | None]]
    dashed: bool = False
    faint: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    dots: bool = True,
    width: int = 720,
    height: int = 340,
) -> str:
    """Lines over common axes.

    Args:
        series: what to draw, later ones on top.
        x_label: text below.
        y_label: text at the left.
        log_x: logarithmic x axis.
        log_y: logarithmic y axis; values of 0 and less, which it has no place for, break the line.
        x_ticks: where the x axis is labelled; default: round numbers.
        marks: (x, text) of dashed vertical lines.
        dots: mark the points.
        width: of the view box.
        height: of the view box.

    Returns:
        An ``<svg>`` element; one that says so if there is no finite point.
    """
    if log_y:
        series = [replace(s, points=[(x, _above_zero(y)) for x, y in s.points]) for s in series]
    known = [(x, y) for s in series for x, y in s.points if y is not None and math.isfinite(y)]
    if not known:
        return (
            f'<svg viewBox="0 0 {width} 40"><text x="0" y="24" class="tick">no data</text></svg>'
        )
    xs, ys = [x for x, _ in known], [y for _, y in known]
    x_lo, x_hi = _span(min(xs), max(xs), log_x, pad=0.0)
    y_lo, y_hi = _span(min(ys), max(ys), log_y, pad=0.06)
    to_x = _scale(x_lo, x_hi, _LEFT, width - _RIGHT, log_x)
    to_y = _scale(y_lo, y_hi, height - _BOTTOM, _TOP, log_y)
    ticks_x = x_ticks or _ticks(x_lo, x_hi, log_x)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)}">']
    for y in _ticks(y_lo, y_hi, log_y):
        at = to_y(y)
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{width - _RIGHT}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" class="tick end">{label(y)}</text>')
    base = height - _BOTTOM
    parts.append(f'<path d="M{_LEFT} {base}H{width - _RIGHT}" class="axis"/>')
    for x in ticks_x:
        at = to_x(x)
        parts.append(f'<path d="M{at:.1f} {base}v5" class="axis"/>')
        parts.append(f'<text x="{at:.1f}" y="{base + 19}" class="tick mid">{label(x)}</text>')
    for x, text in marks:
        at = to_x(x)
        near_end = at > 0.75 * width
        side = (
            f'x="{at - 6:.1f}" class="note end"' if near_end else f'x="{at + 6:.1f}" class="note"'
        )
        parts.append(f'<path d="M{at:.1f} {_TOP}V{base}" class="mark"/>')
        parts.append(f'<text {side} y="{_TOP + 10}">{escape(text)}</text>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" class="name mid">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {(_TOP + base) / 2}) rotate(-90)" class="name '
        f'mid">{escape(y_label)}</text>'
    )
    for one in series:
        parts += _draw(one, to_x, to_y, dots)
    return "".join(parts) + "</svg>"


def heat_map(
    values: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str,
    column_label: str,
    cell: tuple[int, int] = (64, 34),
) -> str:
    """Shares between 0 and 1 as a table of coloured cells; None is an empty cell.

    Args:
        values: [row][column].
        rows: names of the rows, top to bottom.
        columns: names of the columns.
        row_label: text at the left.
        column_label: text below.
        cell: width and height of a cell.
    """
    wide, high = cell
    left, width = 78, 78 + wide * len(columns) + 4
    height = high * len(rows) + 48
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escape(row_label)} by {escape(column_label)}">'
    ]
    for r, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = r * high
        parts.append(
            f'<text x="{left - 8}" y="{y + high / 2 + 4}" class="tick end">{escape(name)}</text>'
        )
        for c, value in enumerate(line):
            x = left + c * wide
            if value is None:
                continue
            hover = f"{name} tokens, depth {columns[c]}: {value:.0%}"
            tone = "cell strong" if value > 0.55 else "cell"
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{high - 2}" rx="4" '
                'class="heat" '
                f'fill-opacity="{0.07 + 0.93 * value:.2f}"><title>{escape(hover)}</title></rect>'
                f'<text x="{x + wide / 2}" y="{y + high / 2 + 4}" class="{tone} mid">{value:.0%}'
                "</text>"
            )
    base = high * len(rows)
    for c, name in enumerate(columns):
        parts.append(
            f'<text x="{left + (c + 0.5) * wide}" y="{base + 18}" class="tick '
            f'mid">{escape(name)}</text>'
        )
    middle = left + wide * len(columns) / 2
    parts.append(
        f'<text x="{middle}" y="{base + 40}" class="name mid">{escape(column_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {base / 2}) rotate(-90)" class="name '
        f'mid">{escape(row_label)}</text>'
    )
    return "".join(parts) + "</svg>"


def label(value: float) -> str:
    """A number as an axis shows it: 4,096 or 0.25 or 10M."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _draw(
    one: Series, to_x: Callable[[float], float], to_y: Callable[[float], float], dots: bool
) -> list[str]:
    path, pen, marks = [], "M", []
    for x, y in one.points:
        if y is None or not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{to_x(x):.1f} {to_y(y):.1f}")
        pen = "L"
        hover = escape(f"{one.name}: {label(x)}, {y:,.3f}")
        marks.append(
            f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="{3 if dots else 7}" '
            f'class="{"dot" if dots else "hover"}"><title>{hover}</title></circle>'
        )
    kind = "line faint" if one.faint else "line dashed" if one.dashed else "line"
    drawn = f'<path d="{"".join(path)}" class="{kind}"/>'
    return [f'<g style="--c:var(--s{one.color})">', drawn, *([] if one.faint else marks), "</g>"]


def _above_zero(value: float | None) -> float | None:
    return value if value is not None and value > 0 else None


def _span(low: float, high: float, log: bool, pad: float) -> tuple[float, float]:
    if log:
        low, high = math.log10(low), math.log10(high)
    if high == low:
        low, high = low - 0.5, high + 0.5
    margin = pad * (high - low)
    low, high = low - margin, high + margin
    return (10**low, 10**high) if log else (low, high)


def _scale(
    low: float, high: float, start: float, end: float, log: bool
) -> Callable[[float], float]:
    def place(value: float) -> float:
        return math.log10(value) if log else value

    rate = (end - start) / (place(high) - place(low))
    return lambda value: start + (place(value) - place(low)) * rate


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), range(1, 10)):
            found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
            if len(found) >= 4:
                break
        if len(found) >= 3:
            return found
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = size * next(m for m in (1, 2, 2.5, 5, 10) if m * size >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
