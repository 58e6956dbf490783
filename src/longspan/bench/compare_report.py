"""Tables of a comparison: one definition for terminal, Markdown and a self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from longspan.bench.compare_reach import LEAK
from longspan.viz.svg import Series, line_chart

Row = dict[str, Any]
FILE = "records.jsonl"


@dataclass(frozen=True)
class Column:
    """A column: its title, and the text of a record's cell."""

    title: str
    cell: Callable[[Row], str]
    left: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its reading instructions."""

    title: str
    note: str
    columns: tuple[Column, ...]


def tables(settings: Row, records: Sequence[Row]) -> tuple[Table, ...]:
    """The tables of a comparison."""
    lengths = list(settings["lengths"])
    last, layers = f"{lengths[-1]:,}", _layers(records)
    name = Column("entry", lambda r: r["entry"], left=True)
    work = Table(
        "Work",
        "Formula: time for N tokens, as the documentation states it. Growth: exponent of N, "
        f"fitted to what was counted at {', '.join(f'{n:,}' for n in lengths)} tokens (pairs of "
        "a pattern, matrix products of a mechanism without projections); then the same of dense "
        f"causal attention's, at {last}. State: what decoding keeps after 504 tokens, in keys and "
        "values of so many tokens, and its growth.",
        (
            name,
            Column("formula", lambda r: r["formula"], left=True),
            Column("growth", lambda r: _power(r["exponent"])),
            Column(f"of dense at {last}", lambda r: _share(r["lengths"][-1]["of_dense"])),
            Column("state", lambda r: _number(r["state"])),
            Column("its growth", lambda r: _power(r["state_growth"])),
        ),
    )
    seen = Table(
        "Coverage",
        f"At {settings['tokens']:,} tokens of held-out text; of mechanisms from the gradients of "
        f"{settings['followed']} rows. Near: share of the {settings['near']} nearest keys that "
        "some head reads. Then the share of all legal pairs (causal: keys up to the row; "
        f"two-sided: all) read in one layer, and connected through {layers} layers. Leak: "
        "relative change of earlier rows when later tokens change.",
        (
            name,
            Column("direction", lambda r: "causal" if r["causal"] else "two-sided", left=True),
            Column("near", lambda r: _share(r["near"])),
            Column("one layer", lambda r: _share(r["reach"][0])),
            Column(f"{layers} layers", lambda r: _share(r["reach"][-1])),
            Column("leak", _leak, left=True),
        ),
    )
    error = Table(
        "Error against dense attention",
        f"|out - dense| / |dense| of the layer's output on {settings['text']:,} held-out tokens, "
        "with the model's own projections, nothing trained: a drop-in figure. Two-sided entries "
        "are held against two-sided dense attention.",
        (
            name,
            Column("mean", lambda r: f"{r['error']:.3f}"),
            *(
                Column(f"layer {at}", lambda r, at=at: f"{r['errors'][at]:.3f}")
                for at in range(layers)
            ),
        ),
    )
    return (work, seen, error, *(_speed(settings, n, at) for at, n in enumerate(lengths)))[
        : None if settings["rounds"] else 3
    ]


def _speed(settings: Row, n: int, at: int) -> Table:
    def way(name: str, key: str) -> Callable[[Row], float]:
        return lambda r: r["lengths"][at][name][key]

    columns = [Column("entry", lambda r: r["entry"], left=True)]
    for name in ("forward", "forward+backward"):
        took, ratio = way(name, "seconds"), way(name, "of_dense")
        columns += [
            # Spaces, at which a narrow heading breaks.
            Column(f"{name.replace('+', ' + ')}, ms", lambda r, f=took: f"{f(r) * 1e3:,.2f}"),
            Column("of dense", lambda r, f=ratio: f"{f(r):.2f}"),
        ]
    columns += [
        Column("peak MiB", lambda r: f"{r['lengths'][at]['memory_bytes'] / 2**20:,.1f}"),
        Column("of dense", lambda r: f"{_memory(r, at):.2f}"),
    ]
    return Table(
        f"Time and memory at {n:,} tokens",
        f"One layer, projections included, {settings['dtype']} on {settings['device']}; medians "
        f"of up to {settings['rounds']} rounds in turns with dense causal attention of PyTorch. "
        "Below 1 is faster or smaller than dense. Peak: tensors of forward + backward.",
        tuple(columns),
    )


def done(records: Sequence[Row]) -> list[Row]:
    """Records with figures."""
    return [row for row in records if "refused" not in row]


def refused(records: Sequence[Row]) -> list[tuple[str, str]]:
    """Entries without figures, and why."""
    return [(row["entry"], row["refused"]) for row in records if "refused" in row]


def markdown(settings: Row, records: Sequence[Row]) -> str:
    """The tables as Markdown."""
    parts = [f"# Attentions compared\n\n{_head(settings)}\n"]
    for table in tables(settings, records) if done(records) else ():
        parts.append(f"## {table.title}\n\n{table.note}\n")
        lines = ["| " + " | ".join(c.title for c in table.columns) + " |"]
        lines.append("|" + "|".join("---" if c.left else "---:" for c in table.columns) + "|")
        for row in done(records):
            cells = [c.cell(row).replace("|", "\\|") for c in table.columns]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    if missing := refused(records):
        parts.append("## Without figures\n")
        parts.append("\n".join(f"- `{name}`: {why}" for name, why in missing) + "\n")
    return "\n".join(parts)


def page(settings: Row, records: Sequence[Row]) -> str:
    """The tables as one page with nothing external in it."""
    style = resources.files("longspan.viz").joinpath("report.css").read_text(encoding="utf-8")
    sections = [_chart(settings, records)]
    for table in tables(settings, records) if done(records) else ():
        head = "".join(f"<th>{escape(c.title)}</th>" for c in table.columns)
        body = "".join(_line(table, row) for row in done(records))
        sections.append(
            f"<section><h2>{escape(table.title)}</h2><p>{escape(table.note)}</p>"
            f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div></section>"
        )
    if missing := refused(records):
        body = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(why)}</td></tr>" for name, why in missing
        )
        sections.append(f"<section><h2>Without figures</h2><table>{body}</table></section>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>longspan compare</title><style>{style}</style></head><body><main>"
        '<header><p class="kicker">longspan compare</p><h1>'
        f"{len(records)} attentions compared</h1><p>{escape(_head(settings))}</p></header>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _line(table: Table, row: Row) -> str:
    first, *others = (escape(c.cell(row)) for c in table.columns)
    return f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"


def _chart(settings: Row, records: Sequence[Row]) -> str:
    """Error against work: the lower left corner is where one wants to be."""
    points = [
        Series(
            name=row["entry"],
            color=3 if row["group"] == "patterns" else 1,
            points=[(row["lengths"][-1]["of_dense"], row["error"])],
        )
        for row in done(records)
        if row["lengths"][-1]["of_dense"] > 0
    ]
    if not points:
        return ""
    last = settings["lengths"][-1]
    chart = line_chart(
        points,
        x_label=f"work at {last:,} tokens, of dense causal attention",
        y_label="error against dense attention",
        log_x=len({series.points[0][0] for series in points}) > 1,
    )
    keys = "".join(
        f'<span><i style="--c:var(--s{color})"></i>{name}</span>'
        for color, name in ((3, "patterns"), (1, "mechanisms"))
    )
    return (
        "<section><h2>Error against work</h2><p>Each dot is an entry; its name shows when the "
        "pointer rests on it. Low and to the left is good.</p>"
        f'<div class="legend">{keys}</div><figure>{chart}</figure></section>'
    )


def _head(settings: Row) -> str:
    found = settings["environment"]
    gpu = ", ".join(one["name"] for one in found["cuda"])
    device = (
        gpu if settings["device"] != "cpu" else f"{found['cpu']}, threads: {settings['threads']}"
    )
    return (
        f"longspan {found['packages']['longspan']}, torch {found['packages']['torch']}, {device}. "
        "On the embedded model's own projections and Python's standard library, files that it "
        "was not trained on."
    )


def _layers(records: Sequence[Row]) -> int:
    return max((len(row["errors"]) for row in done(records)), default=0)


def _memory(row: Row, at: int) -> float:
    one = row["lengths"][at]
    return one["memory_bytes"] / max(one["dense_memory_bytes"], 1)


def _leak(row: Row) -> str:
    if row["leak"] is None:
        return "two-sided"
    return "none" if row["leak"] <= LEAK else f"{row['leak']:.1e}"


def _power(exponent: float | None) -> str:
    return (
        "-" if exponent is None else f"N^{abs(exponent) if abs(exponent) < 5e-3 else exponent:.2f}"
    )


def _share(share: float) -> str:
    return f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
