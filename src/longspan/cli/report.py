"""``longspan report``: draw what ``longspan bench --out`` measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="What longspan bench --out wrote.")],
) -> None:
    """Write report.html, and report.png with matplotlib, beside the records of a benchmark."""
    from longspan.bench.curves import read
    from longspan.bench.picture import picture
    from longspan.bench.report import render

    found = read(folder)
    page = folder / "report.html"
    page.write_text(render(found), encoding="utf-8")
    typer.echo(page)
    if importlib.util.find_spec("matplotlib") is None:
        typer.echo("no report.png: it needs pip install 'longspan[viz]'", err=True)
        return
    picture(found, folder / "report.png")
    typer.echo(folder / "report.png")
