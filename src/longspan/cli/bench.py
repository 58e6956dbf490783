"""``longspan bench``: how fast patterns run here, against dense attention and other libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def bench(
    patterns: Annotated[
        list[str] | None, typer.Argument(help='Patterns, e.g. "window(512)"; default: three.')
    ] = None,
    lengths: Annotated[str, typer.Option(help="Rows, e.g. 4096,16384.")] = "4096,16384",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    key_heads: Annotated[int | None, typer.Option(help="Key heads; default: as many.")] = None,
    width: Annotated[int, typer.Option(help="Width of a head.")] = 64,
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
    from longspan.bench.report import FILE
    from longspan.bench.run import Bench, patterns_or_default, run
    from longspan.bench.setting import WAYS, Setting
    from longspan.cli.progress import Bars
    from longspan.cli.values import pick_device, whole_numbers
    from longspan.eval.records import Records

    sizes = whole_numbers(lengths)
    asked = Bench(
        patterns=patterns_or_default(patterns or ()),
        lengths=sizes,
        setting=Setting(
            n=max(sizes),
            heads=heads,
            key_heads=key_heads or heads,
            width=width,
            dtype=dtype,
            device=pick_device(device),
        ),
        impls=tuple(impl.split(",")),
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
        typer.echo(json.dumps({"settings": settings, "records": found}))
    else:
        _tables(found)


def _tables(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Useful pairs per second, of dense causal attention", title_justify="left")
    for column in ("pattern", "rows", "way", "what", "ms", "spread", "of dense", "MiB"):
        left = column in ("pattern", "way", "what")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    others: dict[tuple[str, str], None] = {}
    for record in found:
        for row in record["rows"]:
            if row.get("wrong"):
                others[row["name"], f"wrong on {record['pattern']}: {row['wrong']}"] = None
            for kind in ("absent", "refused", "failed"):
                if kind in row:
                    others[row["name"], row[kind]] = None
            if "seconds" not in row:
                continue
            memory = row.get("memory_bytes")
            kernels = "+".join(dict.fromkeys(row.get("kernels", ())))
            table.add_row(
                record["pattern"],
                f"{record['n']:,}",
                record["way"],
                f"{row['name']} ({kernels})" if kernels else row["name"],
                f"{row['seconds'] * 1e3:,.2f}",
                f"{row['spread']:.0%}",
                f"{row['of_dense']:.2f}",
                "-" if memory is None else f"{memory / 2**20:,.0f}",
            )
    console.print(table)
    for name, why in others:
        console.print(f"{name}: {why}", highlight=False, markup=False)
