"""``longspan eval kv``: what cache policies and sparse prefill lose, budget by budget."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.eval_options import Data, Model, PythonStdlib, Shared, shared
from longspan.eval.plain import to_json

if TYPE_CHECKING:
    from longspan.eval.kv_sweep import Sweep


@shared
def kv(
    model: Model,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            help='Names with commas, all, none, or a template such as "snapkv({c}, kernel=7)"; '
            "may be repeated. Default: all."
        ),
    ] = None,
    prefill: Annotated[
        list[str] | None,
        typer.Option(help="Sparse prefill methods, in the same way; default: none."),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Percents of the prompt that a key head keeps, with commas.")
    ] = "10,20,30,50,75,100",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    samples: Annotated[int, typer.Option(help="Texts, and questions of each task.")] = 4,
    new: Annotated[
        int, typer.Option(help="Tokens behind a text that are scored in one pass; 0: none.")
    ] = 128,
    steps: Annotated[
        int, typer.Option(help="Tokens behind a text that are scored one by one; 0: none.")
    ] = 32,
    tasks: Annotated[
        str, typer.Option(help="Tasks of longspan eval ruler with commas, all, or none.")
    ] = "passkey,niah.single",
    later: Annotated[
        bool, typer.Option(help="Also ask after the policy has decided what to keep.")
    ] = True,
    answer: Annotated[
        int | None, typer.Option(help="Most tokens of an answer; default: the task's.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts read together.")] = 4,
    seed: Annotated[int, typer.Option(help="Chooses what questions say.")] = 0,
    data: Data = None,
    python_stdlib: PythonStdlib = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for records, tables (kv.md) and picture (kv.svg): what its records hold "
            "is not measured again."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list, measure nothing.")
    ] = False,
    *,
    given: Shared,
) -> None:
    """Quality against budget: perplexity and retrieval under cache policies and sparse prefill.

    Each prompt is read once for all policies. Text for perplexity comes from --data or
    --python-stdlib.
    """
    from longspan.cli.values import numbers
    from longspan.eval import kv_report as report
    from longspan.eval.kv_forms import forms
    from longspan.eval.kv_measure import check_prompts, run
    from longspan.eval.kv_sweep import Sweep
    from longspan.eval.output import check_output_folder
    from longspan.eval.ruler import ALL
    from longspan.hf.models import check_folder, tokenizer_of
    from longspan.train.data import tokenize_documents
    from longspan.train.prepare import read_text, text_hash

    named = () if tasks == "none" else tuple(name.strip() for name in tasks.split(","))
    named = tuple(dict.fromkeys(named))
    sweep = Sweep(
        forms=(
            *(() if policies == ["none"] else forms(policies or ("all",))),
            *(() if prefill in (None, ["none"]) else forms(prefill, prefill=True)),
        ),
        budgets=tuple(sorted({share / 100 for share in numbers(budgets)})),
        length=length,
        new=new,
        steps=steps,
        tasks=ALL if named == ("all",) else named,
        later=later,
        samples=samples,
        batch=batch,
        answer=answer,
        seed=seed,
    )
    subject = given.subject(model, length + max(new, steps))
    check_folder(model)
    documents = read_text(data or (), python_stdlib, "heldout") if sweep.texts else []
    if out is not None:
        check_output_folder(out)
    if dry_run:
        subject.check()
        tokenizer = tokenizer_of(model)
        text = tokenize_documents(tokenizer, documents)
        check_prompts(tokenizer, text, sweep, given.limit)
        _list(sweep, given)
        return

    from longspan.cli.progress import Bars
    from longspan.eval.records import Records

    with subject.open() as (loss, tokenizer), Bars() as bars:
        text = tokenize_documents(tokenizer, documents)
        asked = {**subject.settings(), "text": text_hash(text), **sweep.settings()}
        records = run(
            loss.model,
            tokenizer,
            text,
            sweep,
            limit=given.limit,
            records=Records(out / report.FILE if out else None, asked),
            progress=bars,
        )
    figures = report.summary(sweep, records)
    title = f"What a smaller cache loses: {Path(model).name}"
    tables = report.markdown(sweep, figures, title, limit=given.limit)
    if out is not None:
        (out / "kv.md").write_text(tables, encoding="utf-8")
        (out / "kv.json").write_text(to_json(figures, indent=1) + "\n", encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            typer.echo("no kv.svg: it needs pip install 'longspan[viz]'", err=True)
        else:
            report.picture(sweep, figures, title, out / "kv.svg")
    if given.as_json:
        typer.echo(to_json({"settings": asked, "figures": figures}))
        return
    typer.echo(tables, nl=False)


def _list(sweep: Sweep, given: Shared) -> None:
    """What would be measured."""
    cells = sweep.cells()[: given.limit]
    chosen: list[dict[str, Any]] = [
        {
            "name": form.key,
            "at": {
                f"{share:.0%}": form.template
                if form.needs_gates
                else str(form.at(share, sweep.length))
                for share in sweep.budgets
                if form.fits(share, sweep.length)
            },
        }
        for form in sweep.forms
    ]
    if given.as_json:
        typer.echo(to_json({"forms": chosen, "measures": sweep.measures, "figures": len(cells)}))
        return
    for one in chosen:
        # The least budget that is enough; it is named where that is not the first.
        share, written = next(iter(one["at"].items()))
        least = "" if share == f"{sweep.budgets[0]:.0%}" else f" (from {share})"
        typer.echo(f"{one['name']}: {written}{least}")
    typer.echo(
        f"{len(chosen)} policies and methods, shown at {sweep.budgets[0]:.0%} of {sweep.length:,} "
        f"tokens; {', '.join(sweep.measures)}: {len(cells)} figures. Nothing was measured."
    )
