"""``longspan show``: pictures of a pattern in the terminal, as a file or in words; or of all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.eval.plain import to_json

if TYPE_CHECKING:
    from rich.console import Console

    from longspan.pattern import Pattern
    from longspan.viz.views import Views

EXAMPLE = 'longspan show "window(12) | sink(2)"'


def show(
    pattern: Annotated[
        str | None, typer.Argument(help='Where to look, such as "window(12) | sink(2)".')
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Tokens. Default: 64.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads. Default: 4.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers for the picture of reach. Default: 3.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the pictures as SVG.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the pictures as PNG.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="A sentence: print who sees whom, word by word.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Write a page with every pattern there is.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File for the page of --all. Default: gallery.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show where a pattern looks: each head, all heads, and what layers reach."""
    from longspan.errors import InputError
    from longspan.pattern import parse

    if every == (pattern is not None):
        raise InputError(f"say what to show: a pattern, as in {EXAMPLE}, or --all for every one")
    for name, given, where in (
        ("--out", out is not None, every),
        ("--tokens", tokens is not None, not every),
        ("--svg and --png", svg is not None or png is not None, not every and tokens is None),
        ("--heads", heads is not None, not every),
        ("--n and --layers", n is not None or layers is not None, not every and tokens is None),
    ):
        if given and not where:
            raise InputError(
                f"{name} would be ignored here: pictures of one pattern go to --svg and --png, "
                "its table to the terminal with --tokens, which has its own length, and the page "
                "of --all, whose lengths and heads are given, to --out"
            )
    if every:
        _gallery(out or Path("gallery.html"), as_json)
        return
    assert pattern is not None
    own = parse(pattern)
    heads = 4 if heads is None else heads
    if tokens is not None:
        _words(own, tokens, heads, as_json)
        return
    n, layers = 64 if n is None else n, 3 if layers is None else layers
    _pictures(own, n, heads, layers, svg, png, as_json)


def _pictures(
    pattern: Pattern,
    n: int,
    heads: int,
    layers: int,
    svg: Path | None,
    png: Path | None,
    as_json: bool,
) -> None:
    from rich.console import Console

    from longspan.analysis import coverage
    from longspan.eval.output import check_output_file
    from longspan.planning import plan
    from longspan.viz import matrices, terminal
    from longspan.viz.views import views

    for path in (svg, png):
        if path is not None:
            check_output_file(path)
    found = views(pattern, n, heads=heads, layers=layers)
    if svg is not None:
        svg.write_text(matrices.document(found), encoding="utf-8")
    if png is not None:
        from longspan.viz.png import write

        write(found, png)
    covered = coverage(pattern, n, heads=heads, layers=layers)
    laid = plan(pattern, n, heads)
    if as_json:
        typer.echo(to_json(_record(found, covered.to_dict(), laid)))
        return
    console = Console()
    small = views(pattern, n, heads=heads, layers=layers, cells=_fit(n, console))
    console.print(terminal.picture(small, console))
    console.print(terminal.legend(small, terminal.is_plain(console)), highlight=False)
    for text in (covered, laid):
        console.print()
        console.print(str(text), highlight=False, markup=False, soft_wrap=True)
    for path in (svg, png):
        if path is not None:
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def _fit(n: int, console: Console) -> int:
    """Cells on a side so that two pictures stand side by side, whole tokens in each cell."""
    most = max(8, (console.width - 1) // 2 - 2)
    return -(-n // -(-n // most))


def _words(pattern: Pattern, sentence: str, heads: int, as_json: bool) -> None:
    from rich.console import Console

    from longspan.viz.words import scenes, table

    tokens = sentence.split()
    found = scenes(pattern, tokens, heads)
    if as_json:
        rows = [
            {
                "title": scene.title,
                "note": scene.note,
                "sees": {
                    f"{at} {token}": [tokens[j] for j in range(len(tokens)) if scene.seen[at, j]]
                    for at, token in enumerate(tokens)
                },
            }
            for scene in found
        ]
        typer.echo(to_json({"tokens": tokens, "tables": rows}))
        return
    console = Console()
    for scene in found:
        text = table(scene, tokens, ascii_only=console.options.ascii_only)
        console.print(text, no_wrap=True, overflow="ignore", crop=False)


def _gallery(out: Path, as_json: bool) -> None:
    from longspan.cli.progress import Bars
    from longspan.eval.output import check_output_file
    from longspan.viz.gallery import page

    check_output_file(out)
    with Bars() as bars:
        text, count = page(progress=bars)
    out.write_text(text, encoding="utf-8")
    result = {"page": str(out), "patterns": count, "bytes": len(text.encode())}
    typer.echo(
        to_json(result) if as_json else f"wrote {count} patterns to {out} ({len(text):,} bytes)"
    )


def _record(found: Views, covered: dict[str, Any], laid: Any) -> dict[str, Any]:
    from longspan.viz.matrices import rectangles

    return {
        "pattern": str(found.pattern),
        "n": found.n,
        "heads": found.heads,
        "layers": found.layers,
        "cells": found.cells,
        "exact": found.exact,
        "pictures": [
            {
                "title": view.title,
                "heads": view.heads,
                "rectangles": rectangles(view.seen > 0),
            }
            for view in found.each
        ],
        "coverage": covered,
        "plan": {
            "pairs": laid.pairs,
            "density": laid.density,
            "tiles": laid.tiles(),
            "passes": [{"pairs": one.pairs, "tiles": one.tiles()} for one in laid.passes],
        },
    }
