"""``longspan bench``: how fast patterns run here, against dense attention and other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.eval.plain import to_json


def bench(
    patterns: Annotated[
        list[str] | None, typer.Argument(help='Patterns, e.g. "window(512)"; default: three.')
    ] = None,
    lengths: Annotated[str, typer.Option(help="Rows, e.g. 4096,16384.")] = "4096,16384",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    key_heads: Annotated[
        int | None,
        typer.Option("--key-heads", "--kv-heads", help="Key heads; default: as many."),
    ] = None,
    width: Annotated[int, typer.Option("--width", "--head-dim", help="Width of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    impl: Annotated[str, typer.Option(help="Kernels with commas, or auto.")] = "auto",
    forward_only: Annotated[bool, typer.Option("--forward-only", help="No gradients.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Other libraries take part.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds that count; rivals take turns.")] = 9,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for records.jsonl: what it holds is not measured again."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Time and memory of patterns, checked against an oracle before anything is timed."""
    from longspan.bench.curves import FILE
    from longspan.bench.run import Bench, patterns_or_default, run
    from longspan.bench.setting import WAYS, Setting
    from longspan.cli.progress import Bars
    from longspan.cli.values import pick_device, whole_numbers
    from longspan.eval.records import Records

    sizes = tuple(dict.fromkeys(whole_numbers(lengths)))
    asked = Bench(
        patterns=patterns_or_default(patterns or ()),
        lengths=sizes,
        setting=Setting(
            n=max(sizes),
            heads=heads,
            key_heads=heads if key_heads is None else key_heads,
            width=width,
            dtype=dtype,
            device=pick_device(device),
        ),
        impls=tuple(dict.fromkeys(impl.split(","))),
        ways=tuple(WAYS)[:1] if forward_only else tuple(WAYS),
        peers=peers,
        rounds=rounds,
        memory=memory,
    )
    settings = asked.settings()
    records = Records(out / FILE if out else None, settings)
    with Bars() as bars:
        found = run(asked, records, bars)
    if as_json:
        typer.echo(to_json({"settings": settings, "records": found}))
    else:
        _tables(found)


def _tables(found: list[dict[str, Any]]) -> None:
    """A table for each pattern and way, narrow enough for a terminal."""
    from rich.console import Console
    from rich.table import Table

    from longspan.bench.curves import break_even, left_out, ours, points, unrest

    console = Console()
    whole = {"records": found}
    name = ours(found)
    for pattern, way in dict.fromkeys((record["pattern"], record["way"]) for record in found):
        table = Table(title=f"{pattern}, {way}", title_justify="left", title_style="bold")
        for column in ("rows", "what", "ms", "spread", "of dense", "MiB"):
            table.add_column(column, justify="left" if column == "what" else "right")
        for record in found:
            if (record["pattern"], record["way"]) == (pattern, way):
                for row in record["rows"]:
                    if "seconds" in row:
                        table.add_row(*_cells(record["n"], row))
                table.add_section()
        console.print(table)
        times, dense = (points(whole, pattern, way, one, "seconds") for one in (name, "dense"))
        if len(times) > 1:
            console.print(f"break-even with dense: {break_even(times, dense)} rows", style="dim")
        console.print()
    console.print(
        "of dense: allowed pairs per second, over those of dense causal attention.",
        style="dim",
    )
    if said := unrest(found):
        console.print(said, highlight=False, style="yellow")
    for one, why in left_out(found):
        console.print(f"{one}: {why}", highlight=False, markup=False)


def _cells(n: int, row: dict[str, Any]) -> list[str]:
    from longspan.bench.curves import named

    memory = row.get("memory_bytes")
    return [
        f"{n:,}",
        named(row),
        f"{row['seconds'] * 1e3:,.2f}",
        f"{row['spread']:.0%}",
        f"{row['of_dense']:.2f}",
        "-" if memory is None else f"{memory / 2**20:,.0f}",
    ]
