"""report.html of a benchmark: time, memory and rate against the length, with nothing external."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from longspan.bench.curves import (
    Row,
    break_even,
    crossing,
    left_out,
    named,
    ours,
    points,
    unrest,
)
from longspan.bench.setting import WAYS
from longspan.viz.svg import Series, label, line_chart

# Colours of the charts: dense attention, then peers, and our own.
_DENSE, _PEERS, _OURS = 1, (2, 4), 3


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
        f"turns; what was not equal to the oracle was not timed. {unrest(records)}</p></header>"
        f"{_shares(found, patterns, ways)}{''.join(charts)}{_table(records)}"
        f"{_left_out(records)}{_machine(settings)}</main></body></html>\n"
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

    own_times, dense_times = (
        points(found, pattern, way, name, "seconds") for name in (ours(found["records"]), "dense")
    )
    at = crossing(own_times, dense_times)

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
            log_y=what != "of_dense",
            x_ticks=lengths,
            marks=[(at, "break-even")] if at is not None and what == "seconds" else (),
            height=260,
        )

    legend = "".join(
        f'<span><i style="--c:var(--s{_DENSE if n == "dense" else color.get(n, _OURS)})"'
        f"{' class=dashed' if n == 'dense' else ''}></i>{escape(n)}</span>"
        for n in names
    )
    memory = ""
    if any("memory_bytes" in row and row["memory_bytes"] for row in rows):
        memory = f"<figure>{chart('memory_bytes', 'peak memory, MiB', 2**-20)}</figure>"
    return (
        f"<section><h2>{escape(pattern)}, {way}</h2><p>Break-even with dense causal attention: "
        f'{break_even(own_times, dense_times)} rows.</p><div class="legend">{legend}</div>'
        f"<figure>{chart('seconds', 'milliseconds', 1e3)}</figure>"
        f"<figure>{chart('of_dense', 'useful pairs, of dense', 1.0)}</figure>{memory}</section>"
    )


def _shares(found: dict[str, Any], patterns: Sequence[str], ways: Sequence[str]) -> str:
    name = ours(found["records"])
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
            words = (record["pattern"], record["way"], named(row))
            cells = (
                f"{record['n']:,}",
                f"{row['seconds'] * 1e3:,.2f}",
                f"{row['spread']:.0%}",
                f"{row['of_dense']:.2f}",
                f"{memory / 2**20:,.0f}" if memory is not None else "-",
            )
            shown = "".join(f"<th>{escape(word)}</th>" for word in words)
            shown += "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            body.append(f"<tr>{shown}</tr>")
    titles = "".join(f'<th class="words">{name}</th>' for name in ("pattern", "way", "what"))
    numbers = ("rows", "ms", "spread", "of dense", "MiB")
    titles += "".join(f"<th>{name}</th>" for name in numbers)
    return (
        '<section><h2>All numbers</h2><div class="wide"><table class="numbers"><thead><tr>'
        f"{titles}</tr></thead><tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _left_out(records: Sequence[Row]) -> str:
    reasons = left_out(records)
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
