"""``longspan compare``: patterns and mechanisms side by side, every figure computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.errors import Refusal
from longspan.eval.plain import to_json

# Columns of a terminal that has room for any table.
_WIDE = 10_000


def compare(
    entries: Annotated[
        list[str] | None,
        typer.Argument(
            help='Patterns ("window(64)"), mechanisms ("TopK(keep=32)"), or the words patterns, '
            "mechanisms; default: all of both."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, e.g. 512,1024,4096.")] = "256,512",
    device: Annotated[str, typer.Option(help="Of time and memory: cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Of time and memory; default: float32, on cuda bfloat16.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count; 0: no time, no memory.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Of what mechanisms draw at random.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for records.jsonl: what it holds is not measured again."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the tables as one page.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list, measure nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Work, coverage, decoding state, memory, time and error against dense attention."""
    from longspan.bench import compare_report as report
    from longspan.bench.compare import Compare, run
    from longspan.bench.compare_asked import rehearse
    from longspan.bench.compare_entries import choose
    from longspan.cli.progress import Bars
    from longspan.cli.values import whole_numbers
    from longspan.eval.output import check_output_file, check_output_folder
    from longspan.eval.records import Records

    asked = Compare(
        entries=choose(entries or ()),
        lengths=tuple(sorted(set(whole_numbers(lengths)))),
        device=device,
        dtype=dtype or ("float32" if device == "cpu" else "bfloat16"),
        rounds=rounds,
        threads=threads,
        seed=seed,
    )
    settings = asked.settings()
    for path in (markdown, html):
        if path is not None:
            check_output_file(path)
    if out is not None:
        check_output_folder(out)
    if dry_run:
        rehearse(asked, asked.entries)
        _plan(asked, as_json)
        return
    records = Records(out / report.FILE if out else None, settings)
    with Bars() as bars:
        found = run(asked, records, bars)
    for path, text in ((markdown, report.markdown), (html, report.page)):
        if path is not None:
            path.write_text(text(settings, found), encoding="utf-8")
    if as_json:
        typer.echo(to_json({"settings": settings, "records": found}))
    else:
        _show(settings, found)
        for path in (markdown, html):
            if path is not None:
                typer.echo(f"wrote {path}")
    if not report.done(found):
        raise Refusal("No entry could be compared; why is said beside each.")


def _plan(asked: Any, as_json: bool) -> None:
    """What would be measured."""
    lines = [
        {"entry": one.text, "group": one.group, "causal": one.causal, "formula": one.formula}
        for one in asked.entries
    ]
    if as_json:
        typer.echo(to_json({"lengths": asked.lengths, "entries": lines}))
        return
    for line in lines:
        typer.echo(f"{line['entry']}  ({line['group'][:-1]})")
    sizes = ", ".join(f"{n:,}" for n in asked.lengths)
    where = f"time and memory on {asked.device}" if asked.rounds else "no time, no memory"
    count = f"{len(lines)} {'entry' if len(lines) == 1 else 'entries'}"
    typer.echo(f"{count} at {sizes} tokens; {where}. Nothing was measured.")


def _show(settings: dict[str, Any], found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from longspan.bench import compare_report as report

    console = Console()
    rows = report.done(found)
    for one in report.tables(settings, found) if rows else ():
        table = Table(title=one.title, title_justify="left")
        cells = [[column.cell(row) for row in rows] for column in one.columns]
        for column in one.columns:
            table.add_column(
                column.title, justify="left" if column.left else "right", overflow="fold"
            )
        for row in zip(*cells, strict=True):
            table.add_row(*map(_plain, row))
        # Where not all has room, names are folded before words of headings and figures are.
        whole = console.measure(table, options=console.options.update(width=_WIDE)).maximum
        if whole > console.width:
            for shown, column, texts in zip(table.columns, one.columns, cells, strict=True):
                if not column.left:
                    shown.width = max(map(len, [*column.title.split(), *texts]))
        console.print(table)
        console.print(one.note, highlight=False, markup=False, style="dim")
    for name, why in report.refused(found):
        console.print(f"{name}: {why}", highlight=False, markup=False)


def _plain(text: str) -> Any:
    from rich.text import Text

    # Brackets in patterns are no markup.
    return Text(text)
