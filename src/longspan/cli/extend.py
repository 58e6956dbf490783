"""``longspan extend``: make a model usable at a longer context."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.eval_options import RopeFactors
from longspan.eval.plain import to_json

if TYPE_CHECKING:
    from longspan.train.settings import ExtendSettings

_TRAIN, _MEASURE, _RUN = "Training", "Measuring", "Running"


def extend(
    model: Annotated[str, typer.Argument(help="Local folder of a causal language model.")],
    length: Annotated[int, typer.Option(help="Context to extend to, in tokens.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; new or empty.")],
    pattern: Annotated[
        str,
        typer.Option(
            help='Attention to train with, e.g. "scca.flow(1024)"; none: the model\'s own.'
        ),
    ] = "scca.flow(1024)",
    rope: Annotated[
        str,
        typer.Option(help="Position scaling: none, linear, ntk, dynamic, yarn, llama3, longrope."),
    ] = "yarn",
    rope_factors: RopeFactors = None,
    data: Annotated[
        list[str] | None, typer.Option(help="File or folder with training text; may be repeated.")
    ] = None,
    python_stdlib: Annotated[
        bool, typer.Option("--python-stdlib", help="Train on this Python's standard library.")
    ] = False,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(help="Held-out text; default: the last tenth of the training text."),
    ] = None,
    recall_share: Annotated[
        float,
        typer.Option(
            help="Share of synthetic text with values to recall.", rich_help_panel=_TRAIN
        ),
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", rich_help_panel=_TRAIN)] = 1000,
    batch: Annotated[int, typer.Option(help="Sequences per batch.", rich_help_panel=_TRAIN)] = 1,
    accumulate: Annotated[int, typer.Option(help="Batches per step.", rich_help_panel=_TRAIN)] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=_TRAIN)] = 2e-4,
    warmup: Annotated[int, typer.Option(help="Warm-up steps.", rich_help_panel=_TRAIN)] = 20,
    schedule: Annotated[
        str, typer.Option(help="After the warm-up: constant or cosine.", rich_help_panel=_TRAIN)
    ] = "constant",
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=_TRAIN)] = 0.0,
    clip: Annotated[
        float, typer.Option(help="Largest gradient norm.", rich_help_panel=_TRAIN)
    ] = 1.0,
    rank: Annotated[int, typer.Option(help="Rank of LoRA.", rich_help_panel=_TRAIN)] = 8,
    alpha: Annotated[float, typer.Option(help="Scale of LoRA.", rich_help_panel=_TRAIN)] = 16.0,
    embeddings_and_norms: Annotated[
        bool, typer.Option(help="Train embeddings and norms too.", rich_help_panel=_TRAIN)
    ] = True,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Less memory for more time.", rich_help_panel=_TRAIN)
    ] = False,
    compare_dense: Annotated[
        bool,
        typer.Option(
            "--compare-dense",
            help="Train the same recipe with dense attention too.",
            rich_help_panel=_TRAIN,
        ),
    ] = False,
    eval_lengths: Annotated[
        str | None,
        typer.Option(
            help="Context lengths, e.g. 512,4096; default: doubling up to --length.",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    eval_sequences: Annotated[
        int, typer.Option(help="Held-out windows of the longest length.", rich_help_panel=_MEASURE)
    ] = 8,
    eval_attention: Annotated[
        str, typer.Option(help="dense or pattern.", rich_help_panel=_MEASURE)
    ] = "dense",
    passkey_depths: Annotated[
        str, typer.Option(help="Where the key stands.", rich_help_panel=_MEASURE)
    ] = "0,0.25,0.5,0.75,1",
    passkey_trials: Annotated[
        int, typer.Option(help="Probes per length and depth; 0: none.", rich_help_panel=_MEASURE)
    ] = 4,
    passkey_style: Annotated[
        str, typer.Option(help="prose or code.", rich_help_panel=_MEASURE)
    ] = "prose",
    seed: Annotated[int, typer.Option(help="Seed.", rich_help_panel=_RUN)] = 0,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_RUN)
    ] = 100,
    dtype: Annotated[str, typer.Option(help="Of the weights.", rich_help_panel=_RUN)] = "float32",
    device: Annotated[
        str | None, typer.Option(help="Default: cuda if there is one.", rich_help_panel=_RUN)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out, or on from its end: more --steps.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write a merged model.", rich_help_panel=_RUN)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and count, do nothing.", rich_help_panel=_RUN)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Extend the context of a model by position scaling and LoRA training under a sparse pattern.

    Measures perplexity and passkey retrieval before and after, writes a PEFT adapter, report.json
    and report.html. A run that was interrupted, even killed, goes on with --resume; so does a
    finished one, where --steps are more.
    """
    from longspan.cli.values import numbers, pick_device, read_rope_factors, whole_numbers
    from longspan.eval.suite import SuiteConfig
    from longspan.train.extend import extend as run
    from longspan.train.loop import LoopConfig
    from longspan.train.prepare import prepare
    from longspan.train.settings import ExtendSettings

    settings = ExtendSettings(
        model=model,
        length=length,
        pattern=pattern,
        rope=rope,
        rope_factors=read_rope_factors(rope_factors),
        data=tuple(data or ()),
        python_stdlib=python_stdlib,
        eval_data=tuple(eval_data or ()),
        recall_share=recall_share,
        loop=LoopConfig(
            steps=steps,
            lr=lr,
            warmup=warmup,
            schedule=schedule,  # type: ignore[arg-type]
            accumulate=accumulate,
            clip=clip,
            weight_decay=weight_decay,
            save_every=save_every,
            seed=seed,
        ),
        batch=batch,
        rank=rank,
        alpha=alpha,
        embeddings_and_norms=embeddings_and_norms,
        gradient_checkpointing=gradient_checkpointing,
        suite=SuiteConfig(
            lengths=whole_numbers(eval_lengths) if eval_lengths else (),
            sequences=eval_sequences,
            depths=numbers(passkey_depths),
            trials=passkey_trials,
            style=passkey_style,
            seed=seed,
        ),
        eval_attention=eval_attention,
        compare_dense=compare_dense,
        dtype=dtype,
        device=pick_device(device),
    )
    if dry_run:
        show_plan(prepare(settings, out, resume=resume).summary(), as_json)
        return
    report = run_with_bars(run, settings, out, resume=resume, merge=merge)
    if as_json:
        typer.echo((out / "report.json").read_text(encoding="utf-8"), nl=False)
    else:
        show_report(report, out)


def run_with_bars(run: Any, settings: ExtendSettings, out: Path, **options: Any) -> dict[str, Any]:
    """Run an extension with progress on stderr."""
    from longspan.cli.progress import Bars

    with Bars() as bars:
        command = ["longspan", *sys.argv[1:]]
        return run(settings, out, progress=bars, command=command, **options)


def show_plan(summary: dict[str, Any], as_json: bool) -> None:
    """Print what a run would do."""
    if as_json:
        typer.echo(to_json(summary))
        return
    for name, value in summary.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        shown = f"{value:.3g}" if isinstance(value, float) else shown
        typer.echo(f"{name.replace('_', ' '):<24} {shown}")


def show_report(report: dict[str, Any], out: Path) -> None:
    """Print the result of an extension as a table."""
    from rich.console import Console
    from rich.table import Table

    states = [name for name in ("base", "scaled", "trained", "dense") if report.get(name)]
    titles = {
        "base": "before",
        "scaled": "positions scaled",
        "trained": "trained, " + brief(report["trained"]["pattern"]),
        "dense": "trained, dense",
    }
    table = Table(title="Perplexity on held-out text", title_justify="left")
    table.add_column("context", justify="right")
    for name in states:
        table.add_column(titles[name], justify="right")
    for row in range(len(report["base"]["perplexity"]["lengths"])):
        cells = [report[name]["perplexity"]["lengths"][row] for name in states]
        table.add_row(f"{cells[0]['length']:,}", *(f"{cell['perplexity']:,.2f}" for cell in cells))
    if report["base"]["passkey"]:
        table.add_section()
        for row, length in enumerate(report["base"]["passkey"]["lengths"]):
            means = [mean(report[name]["passkey"]["accuracy"][row]) for name in states]
            table.add_row(f"passkey {length:,}", *(f"{mean:.0%}" for mean in means))
    table.add_section()
    table.add_row(
        "training",
        *(f"{report[n]['seconds']:.0f} s" if "seconds" in report[n] else "-" for n in states),
    )
    console = Console()
    console.print(table)
    if report["trained"]["pattern"]:
        console.print(f"Pattern: {report['trained']['pattern']}", highlight=False, markup=False)
    console.print(f"Adapter: {out / 'adapter'}", highlight=False, soft_wrap=True)
    console.print(f"Report:  {out / 'report.html'}", highlight=False, soft_wrap=True)


def brief(pattern: str | None) -> str:
    """A pattern in a place where there is no room for a long one."""
    if pattern is None:
        return "dense"
    return pattern if len(pattern) <= 24 else "with the pattern"


def mean(values: list[float | None]) -> float:
    """Mean of what was measured."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
