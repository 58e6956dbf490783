"""report.html of a benchmark: time, memory and rate against the length, with nothing external."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from longspan.bench.setting import WAYS
from longspan.errors import DataError
from longspan.eval.records import read_lines
from longspan.viz.svg import Series, label, line_chart

FILE = "records.jsonl"
# Colours of the charts: dense attention, then peers, and our own.
_DENSE, _PEERS, _OURS = 1, (2, 4), 3

Row = dict[str, Any]


def read(folder: Path) -> dict[str, Any]:
    """Settings and records of a benchmark.

    Raises:
        DataError: if the folder holds none.
    """
    path = folder / FILE
    lines = read_lines(path) if path.exists() else []
    if not lines or "header" not in lines[0]:
        raise DataError(
            f"{folder} holds no benchmark: expected {FILE}, as longspan bench --out writes it"
        )
    return {"settings": lines[0]["header"]["settings"], "records": lines[1:]}


def points(found: dict[str, Any], pattern: str, way: str, name: str, what: str) -> list[Any]:
    """(length, value) of one competitor, sorted by length; of dense attention the fastest."""
    pairs = []
    for record in found["records"]:
        if (record["pattern"], record["way"]) != (pattern, way):
            continue
        values = [row[what] for row in record["rows"] if _is(row, name) and what in row]
        values = [value for value in values if value is not None]
        if values:
            pairs.append((record["n"], min(values)))
    return sorted(pairs)


def break_even(ours: Sequence[Any], dense: Sequence[Any]) -> str:
    """From which length on ours takes less time, between measured lengths by their logarithms."""
    other = dict(dense)
    gains = [(n, math.log(other[n] / seconds)) for n, seconds in ours if n in other]
    if not gains:
        return "not measured"
    if gains[-1][1] <= 0:
        return f"beyond {label(gains[-1][0])}"
    later = [at for at, (_, gain) in enumerate(gains) if gain <= 0]
    if not later:
        return f"below {label(gains[0][0])}"
    (n, lost), (m, won) = gains[later[-1]], gains[later[-1] + 1]
    share = -lost / (won - lost)
    return f"about {label(round(math.exp(math.log(n) + share * math.log(m / n)), -2))}"


def render(found: dict[str, Any]) -> str:
    """The page."""
    settings, records = found["settings"], found["records"]
    patterns = list(dict.fromkeys(record["pattern"] for record in records))
    ways = [way for way in WAYS if any(record["way"] == way for record in records)]
    style = resources.files("longspan.viz").joinpath("report.css").read_text(encoding="utf-8")
    sizes = (
        f"{settings['heads']} heads over {settings['key_heads']} key heads of width "
        f"{settings['width']}, {settings['dtype']}, {settings['device']}"
    )
    charts = [
        section
        for pattern in patterns
        for way in ways
        for section in (_section(found, pattern, way),)
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>longspan bench</title><style>{style}</style></head><body><main>"
        f'<header><p class="kicker">longspan bench</p><h1>{len(patterns)} patterns against '
        f"dense attention</h1><p>{escape(sizes)}. Medians of {settings['rounds']} rounds taken in "
        "turns; what was not equal to the oracle was not timed.</p></header>"
        f"{_shares(found, patterns, ways)}{''.join(charts)}{_table(records)}"
        f"{_left_out(records)}{_machine(settings)}</main></body></html>\n"
    )


def picture(found: dict[str, Any], path: Path) -> None:
    """The same curves as a PNG, by matplotlib; one row of three charts for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = found["records"]
    patterns = list(dict.fromkeys(record["pattern"] for record in records))
    ways = [way for way in WAYS if any(record["way"] == way for record in records)]
    lengths = sorted({record["n"] for record in records})
    figure = Figure(figsize=(13.5, 4.2 * len(ways) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(ways), 3, squeeze=False)
    for axes, way in zip(grid, ways, strict=True):
        kinds: tuple[tuple[str, str, Callable[[float], float]], ...] = (
            ("seconds", "milliseconds", lambda x: x * 1e3),
            ("memory_bytes", "peak memory, MiB", lambda x: x / 2**20),
            ("of_dense", "rate on useful pairs, of dense", lambda x: x),
        )
        for axis, (what, title, scale) in zip(axes, kinds, strict=True):
            names = [("dense", pattern) for pattern in patterns[:1]]
            for name, pattern in [*names, *((_ours(records), p) for p in patterns)]:
                line = points(found, pattern, way, name, what)
                if line:
                    dashed = "--" if name == "dense" else "-"
                    drawn = [scale(y) for _, y in line]
                    text = "dense" if name == "dense" else pattern
                    axis.plot([n for n, _ in line], drawn, dashed, marker="o", ms=3, label=text)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [label(n) for n in lengths])
            axis.minorticks_off()
            if what == "of_dense":
                axis.set_ylim(bottom=0)
            elif axis.lines:
                axis.set_yscale("log")
            axis.set_title(f"{way}: {title}", fontsize=10, loc="left")
            axis.set_xlabel("rows", fontsize=9)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=160)


def _is(row: Row, name: str) -> bool:
    return row["name"].startswith("dense ") if name == "dense" else row["name"] == name


def _ours(records: Sequence[Row]) -> str:
    return next(
        row["name"] for r in records for row in r["rows"] if row["name"].startswith("longspan ")
    )


def _section(found: dict[str, Any], pattern: str, way: str) -> str:
    rows = [
        row
        for record in found["records"]
        if (record["pattern"], record["way"]) == (pattern, way)
        for row in record["rows"]
        if "seconds" in row
    ]
    own = [name for name in dict.fromkeys(row["name"] for row in rows) if "dense " not in name]
    peers = [name for name in own if not name.startswith("longspan ")]
    names = ["dense", *peers, *(name for name in own if name not in peers)]
    color = {name: _PEERS[at % len(_PEERS)] for at, name in enumerate(peers)}

    def chart(what: str, text: str, factor: float) -> str:
        lines = [
            Series(
                name=name,
                color=_DENSE if name == "dense" else color.get(name, _OURS),
                points=[(n, y * factor) for n, y in points(found, pattern, way, name, what)],
                dashed=name == "dense" or name in peers[len(_PEERS) :],
            )
            for name in names
        ]
        lines = [line for line in lines if line.points]
        lengths = sorted({x for line in lines for x, _ in line.points})
        return line_chart(
            lines,
            x_label="rows",
            y_label=text,
            log_x=len(lengths) > 1,
            log_y=True,
            x_ticks=lengths,
            height=260,
        )

    legend = "".join(
        f'<span><i style="--c:var(--s{_DENSE if n == "dense" else color.get(n, _OURS)})"'
        f"{' class=dashed' if n == 'dense' else ''}></i>{escape(n)}</span>"
        for n in names
    )
    even = break_even(
        points(found, pattern, way, _ours(found["records"]), "seconds"),
        points(found, pattern, way, "dense", "seconds"),
    )
    memory = ""
    if any("memory_bytes" in row and row["memory_bytes"] for row in rows):
        memory = f"<figure>{chart('memory_bytes', 'peak memory, MiB', 2**-20)}</figure>"
    return (
        f"<section><h2>{escape(pattern)}, {way}</h2><p>Break-even with dense causal attention: "
        f'{even} rows.</p><div class="legend">{legend}</div>'
        f"<figure>{chart('seconds', 'milliseconds', 1e3)}</figure>{memory}</section>"
    )


def _shares(found: dict[str, Any], patterns: Sequence[str], ways: Sequence[str]) -> str:
    name = _ours(found["records"])
    lengths = sorted({record["n"] for record in found["records"]})
    head = "".join(f"<th>{label(n)}</th>" for n in lengths)
    body = []
    for way in ways:
        for pattern in patterns:
            share = dict(points(found, pattern, way, name, "of_dense"))
            cells = "".join(
                f"<td>{share[n]:.2f}</td>" if n in share else "<td>-</td>" for n in lengths
            )
            even = break_even(
                points(found, pattern, way, name, "seconds"),
                points(found, pattern, way, "dense", "seconds"),
            )
            body.append(f"<tr><th>{escape(pattern)}, {way}</th>{cells}<td>{even}</td></tr>")
    return (
        "<section><h2>Rate of useful pairs, of dense attention's</h2><p>Pairs that the pattern "
        "allows per second, over those of dense causal attention in the same run; and from which "
        'length a call takes less time.</p><div class="wide"><table class="numbers"><thead><tr>'
        f"<th>pattern</th>{head}<th>break-even</th></tr></thead><tbody>{''.join(body)}</tbody>"
        "</table></div></section>"
    )


def _table(records: Sequence[Row]) -> str:
    body = []
    for record in records:
        for row in record["rows"]:
            if "seconds" not in row:
                continue
            memory = row.get("memory_bytes")
            cells = (
                f"{record['n']:,}",
                record["way"],
                row["name"],
                f"{row['seconds'] * 1e3:,.2f}",
                f"{row['spread']:.0%}",
                f"{row['of_dense']:.2f}",
                f"{memory / 2**20:,.0f}" if memory is not None else "-",
            )
            shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            body.append(f"<tr><th>{escape(record['pattern'])}</th>{shown}</tr>")
    head = ("pattern", "rows", "way", "what", "ms", "spread", "of dense", "MiB")
    titles = "".join(f"<th>{name}</th>" for name in head)
    return (
        '<section><h2>All numbers</h2><div class="wide"><table class="numbers"><thead><tr>'
        f"{titles}</tr></thead><tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _left_out(records: Sequence[Row]) -> str:
    reasons: dict[tuple[str, str], None] = {}
    for record in records:
        for row in record["rows"]:
            for kind in ("absent", "refused", "failed"):
                if kind in row:
                    reasons[row["name"], row[kind]] = None
            if row.get("wrong"):
                reasons[row["name"], f"wrong on {record['pattern']}: {row['wrong']}"] = None
    if not reasons:
        return ""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(why)}</td></tr>" for name, why in reasons
    )
    return f"<section><h2>Not timed</h2><table>{body}</table></section>"


def _machine(settings: dict[str, Any]) -> str:
    found = settings["environment"]
    facts = {
        "cpu": f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads",
        "gpu": ", ".join(g["name"] for g in found["cuda"]) or "-",
        "platform": found["platform"],
        "python": found["python"],
        **{k: v for k, v in (found["packages"] | settings["peer_versions"]).items() if v},
    }
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<section><h2>Measured on</h2><table>{body}</table></section>"
