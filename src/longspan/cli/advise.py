"""``longspan advise``: what should I use for a length, heads and a budget, on this machine?"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.eval.plain import to_json

_SIZES, _WISHES, _RUN = "Sizes", "Budget and needs", "Running"


def advise(
    n: Annotated[str, typer.Option("--n", help="Tokens, e.g. 8192 or 4096,16384.")],
    heads: Annotated[int, typer.Option(help="Query heads.", rich_help_panel=_SIZES)] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key heads; default: as many.", rich_help_panel=_SIZES)
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head.", rich_help_panel=_SIZES)] = 64,
    layers: Annotated[int, typer.Option(help="Layers of the model.", rich_help_panel=_SIZES)] = 32,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; default: float32, on cuda bfloat16.",
            rich_help_panel=_SIZES,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Default: cuda if there is one.", rich_help_panel=_SIZES)
    ] = None,
    causal: Annotated[
        bool,
        typer.Option(
            "--causal/--bidirectional",
            help="Language models, or encoders.",
            rich_help_panel=_SIZES,
        ),
    ] = True,
    train: Annotated[
        bool,
        typer.Option("--train", help="Time forward + backward.", rich_help_panel=_SIZES),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Keys per query, mean over queries and heads; default: a quarter of dense "
            "attention's.",
            rich_help_panel=_WISHES,
        ),
    ] = None,
    time_share: Annotated[
        float | None,
        typer.Option(help="Of dense attention's time, e.g. 0.25.", rich_help_panel=_WISHES),
    ] = None,
    memory_mib: Annotated[
        float | None,
        typer.Option(help="MiB at the peak of one call.", rich_help_panel=_WISHES),
    ] = None,
    cache_mib: Annotated[
        float | None,
        typer.Option(
            help="MiB of keys and values that decoding keeps, all layers.",
            rich_help_panel=_WISHES,
        ),
    ] = None,
    must_see: Annotated[
        str | None,
        typer.Option(
            help="all: every token reaches all that it may; previous: some head sees each "
            "token's predecessor; or both with a comma.",
            rich_help_panel=_WISHES,
        ),
    ] = None,
    within: Annotated[
        int | None,
        typer.Option(
            help="Layers for --must-see all; default: --layers.", rich_help_panel=_WISHES
        ),
    ] = None,
    drop_in: Annotated[
        bool,
        typer.Option(
            "--drop-in",
            help="Only what a pretrained model may take without fine-tuning: every head sees "
            "each token's predecessor and the first token.",
            rich_help_panel=_WISHES,
        ),
    ] = False,
    prefer: Annotated[
        str,
        typer.Option(
            help="Among candidates that nothing beats: sight or time.", rich_help_panel=_WISHES
        ),
    ] = "sight",
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            help="A pattern of yours, may be repeated; the word generated adds those that the "
            "budget gives.",
            rich_help_panel=_WISHES,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count.", rich_help_panel=_RUN)] = 5,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too.", rich_help_panel=_RUN)
    ] = True,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Two rounds, no memory.", rich_help_panel=_RUN),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for advice.jsonl: what it holds is not measured again.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw time against sight: a .png, .svg or .pdf.", rich_help_panel=_RUN),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Make candidates and count, time nothing.", rich_help_panel=_RUN
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the advice as JSON.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Say which pattern to use: candidates that fit a budget, measured here, ranked, explained.

    Every candidate equals an oracle before it is timed, and all are timed in turns with dense
    attention. Ranking looks at time and at what is seen; quality on text it does not know.
    """
    from longspan.bench.advise import Advise
    from longspan.bench.advise import advise as find
    from longspan.bench.advise.words import must_see as words
    from longspan.bench.advise.words import rule
    from longspan.bench.setting import Setting
    from longspan.cli.progress import Bars
    from longspan.cli.values import pick_device, whole_numbers
    from longspan.errors import InputError
    from longspan.eval.records import Records

    sizes = tuple(sorted(set(whole_numbers(n))))
    needs = words(must_see) if must_see is not None else {}
    if within is not None and not needs.get("all"):
        raise InputError("--within says for how many layers --must-see all is meant: give both")
    where = pick_device(device)
    asked = Advise(
        lengths=sizes,
        setting=Setting(
            n=max(sizes),
            heads=heads,
            key_heads=heads if kv_heads is None else kv_heads,
            width=head_dim,
            dtype=dtype or ("float32" if where == "cpu" else "bfloat16"),
            device=where,
            causal=causal,
        ),
        layers=layers,
        train=train,
        budget=_budget(budget, time_share, memory_mib, cache_mib),
        within=(layers if within is None else within) if needs.get("all") else None,
        previous=needs.get("previous", False),
        drop_in=drop_in,
        prefer=prefer,
        candidates=tuple(candidates or ("generated",)),
        rounds=2 if quick else rounds,
        memory=memory and (not quick or memory_mib is not None),
    )
    _check_picture(picture, dry_run)
    settings = asked.settings()
    records = Records(out / "advice.jsonl" if out and not dry_run else None, settings)
    with Bars() as bars:
        found = find(asked, records, bars, dry_run=dry_run)
    if picture is not None:
        from longspan.bench.advise.picture import picture as draw

        draw(found, picture)
    if as_json:
        said = {"settings": settings, "rule": rule(prefer), "advice": found}
        typer.echo(to_json(said))
        return
    for one in found:
        _show(one, asked)
    if picture is not None:
        typer.echo(f"wrote {picture}")


def _budget(*amounts: float | None) -> Any:
    from longspan.bench.advise import Budget
    from longspan.errors import InputError

    kinds = ("keys", "time", "memory", "cache")
    given = [(kind, one) for kind, one in zip(kinds, amounts, strict=True) if one is not None]
    if len(given) > 1:
        raise InputError(
            "expected one budget, got several of --budget, --time-share, --memory-mib and "
            "--cache-mib; give one"
        )
    return Budget(kind=given[0][0], amount=given[0][1]) if given else None


def _check_picture(path: Path | None, dry_run: bool) -> None:
    import importlib.util

    from longspan.errors import InputError, Refusal
    from longspan.eval.output import check_output_file

    if path is None:
        return
    if dry_run:
        raise InputError("--picture draws times, and --dry-run measures none: give one of them")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--picture takes a name that ends in .png, .svg or .pdf; got {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise Refusal("--picture needs matplotlib: pip install 'longspan[viz]'")
    check_output_file(path)


def _show(found: dict[str, Any], asked: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from longspan.bench.advise.tables import columns, legend
    from longspan.bench.advise.words import rule
    from longspan.bench.curves import unrest

    console = Console()

    def say(text: str, style: str = "", indent: int = 0) -> None:
        console.print(Padding(Text(text, style=style), (0, 0, 0, indent)))

    shown = columns(found)
    way = "forward + backward" if asked.train else "forward"
    title = f"{found['n']:,} tokens, {found['budget']['text']}"
    table = Table(
        title=f"{title}; {way}" if found["timed"] else title,
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        padding=0,
        show_edge=False,
    )
    for column in shown:
        side = "left" if column.left else "right"
        table.add_column(
            column.title,
            justify=side,
            overflow="fold",
            min_width=19 if column.title == "pattern" else None,
        )
    beside = [] if any(e["family"] == "dense" for e in found["ranked"]) else [found["dense"]]
    for entry, following in zip_longest(found["ranked"], found["ranked"][1:]):
        last = following is None or following["front"] > entry["front"]
        table.add_row(*(Text(column.cell(entry)) for column in shown), end_section=last)
    for entry in beside:
        table.add_row(*(Text(column.cell(entry)) for column in shown), style="dim")
    console.print(table)
    say(legend(found, asked.layers, asked.setting.causal), "dim")
    if said := unrest([{"rows": [one for one in found["ranked"] if one["spread"] is not None]}]):
        say(said, "yellow")
    say("")
    for entry in found["ranked"]:
        say(f"{entry['rank']}. {entry['pattern']}", "bold")
        say(entry["why"], indent=3)
        say(f"Does not see: {_lower(entry['cannot_see'])}", indent=3)
        if entry["good_for"]:
            say(f"Good for: {_lower(entry['good_for'])}", indent=3)
    reasons: dict[str, list[str]] = {}
    for one in found["left_out"]:
        reasons.setdefault(one["why"], []).append(one["pattern"] or one["family"])
    for reason, names in reasons.items():
        say(f"Left out: {', '.join(names)}: {reason}.", "dim")
    say("")
    say(rule(asked.prefer), "dim")
    say(OTHERS, "dim")
    say("")
    first = found["recommended"]
    if found["note"]:
        say(found["note"], "bold yellow")
    if first is None:
        return
    say(f"Use {first['pattern']}", "bold green")
    for line in first["use"]:
        say(f"{line['what']}:", indent=3)
        typer.echo(f"      {line['line']}")


OTHERS = (
    "Attentions that choose keys by content are not timed on random numbers: longspan compare "
    "mechanisms, and longspan eval ruler --prefill, measure those."
)


def _lower(text: str) -> str:
    """A sentence after a colon."""
    return text[:1].lower() + text[1:]
