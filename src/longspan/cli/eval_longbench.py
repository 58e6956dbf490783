"""``longspan eval longbench``: LongBench's questions from files, answered by generation."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from longspan.cli.eval_options import KV, DenseBelow, Model, Prefill, Shared, shared, table
from longspan.eval.plain import to_json


@shared
def longbench(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(help="LongBench's .jsonl file, or a folder with some; may be repeated."),
    ],
    datasets: Annotated[
        str | None, typer.Option(help="Only these, with commas, e.g. qasper,trec; default: all.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a prompt; the middle of longer ones is left out. Default: the "
            "model's context less an answer."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="First so many examples of each dataset, for a quick look.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Prompt with {context} and {input}; default: LongBench's own."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="qa_f1, rouge_l, classification, retrieval, count or code_sim; default: "
            "LongBench's own."
        ),
    ] = None,
    answer: Annotated[
        int | None, typer.Option(help="Most tokens of an answer; default: LongBench's own.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Put prompts into the chat template, but few-shot and code ones."
        ),
    ] = False,
    prefill: Prefill = None,
    dense_below: DenseBelow = None,
    kv: KV = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, list and count tokens, ask nothing.")
    ] = False,
    *,
    given: Shared,
) -> None:
    """LongBench's questions from files of its format, answered by generation. Nothing is
    downloaded.
    """
    from longspan.errors import InputError
    from longspan.eval.answers import reading
    from longspan.eval.longbench import data_hash, form_of, read_files
    from longspan.eval.longbench_run import WORDS, check_data, rooms, survey
    from longspan.eval.longbench_run import longbench as measure
    from longspan.eval.perplexity import check_limit
    from longspan.eval.records import Records, fingerprint
    from longspan.hf.generate import check_chat
    from longspan.hf.models import config_of, tokenizer_of
    from longspan.hf.rope import rope_parameters
    from longspan.pattern import parse

    check_limit(limit)
    read = reading(prefill, dense_below, kv, given.pattern)
    if length is None and (given.rope is not None or given.adapter is not None):
        raise InputError("With --rope or --adapter the model's context changes: give --length.")
    asked = read_files(data)
    if datasets is not None:
        wanted = [name.strip() for name in datasets.split(",")]
        missing = [name for name in wanted if name not in asked]
        if missing:
            raise InputError(
                f"The files hold no dataset {', '.join(missing)}; they hold {', '.join(asked)}."
            )
        asked = {name: asked[name] for name in sorted({*wanted})}
    # Of all that could be asked: a quick look is part of the whole.
    hashed = data_hash(asked)
    asked = {name: some[:limit] for name, some in asked.items()}
    forms = {
        name: form_of(name, template=template, metric=metric, tokens=answer) for name in asked
    }
    check_data(asked, forms)
    context = getattr(config_of(model).get_text_config(), "max_position_embeddings", None)
    room = rooms(forms, length, context)
    needed = max(room[name] + form.tokens for name, form in forms.items())
    subject = given.subject(model, needed)
    told = read.settings()
    if given.pattern is not None:
        parse(given.pattern)
    if given.rope is not None:
        rope_parameters(config_of(model), given.rope, needed, factors=subject.rope_factors)
    if chat:
        check_chat(tokenizer_of(model))
    if dry_run:
        subject.check()
        found = survey(tokenizer_of(model), asked, forms, room)
        if given.as_json:
            typer.echo(to_json({"datasets": found, **told}))
            return
        _list(found)
        typer.echo(
            f"Prefill {read.prefill or 'dense'}, cache {read.kv or 'everything()'}. Nothing was "
            "asked."
        )
        return
    if context is not None and needed > context and given.rope is None and given.adapter is None:
        typer.echo(
            f"longspan: prompts and answers of {needed:,} tokens are more than the {context:,} "
            "positions that the model says it knows.",
            err=True,
        )

    from longspan.cli.progress import Bars

    settings = {
        **subject.settings(),
        "data": hashed,
        "datasets": list(asked),
        "prompt_length": length,
        "template": template,
        "metric": metric,
        "answer": answer,
        "prompts": fingerprint({name: form.prompt for name, form in forms.items()}),
        "chat": chat,
        **told,
    }
    with (
        subject.open() as (loss, tokenizer),
        read.open(loss.model) as make_cache,
        Bars() as bars,
    ):
        result = measure(
            loss.model,
            tokenizer,
            asked,
            forms,
            room,
            chat=chat,
            make_cache=make_cache,
            records=Records(given.out, settings),
            progress=bars,
        )
    if given.as_json:
        typer.echo(to_json({**settings, **result}))
        return
    rows = [
        (
            name,
            one["metric"],
            f"{one['examples']:,}",
            f"{one['cut']:,}",
            f"{100 * one['score']:.2f}",
            *(f"{100 * one['by_words'][x]:.2f}" if x in one["by_words"] else "-" for x in WORDS),
        )
        for name, one in result["datasets"].items()
    ]
    rows.append(("mean", "", "", "", f"{100 * result['mean']:.2f}", *[""] * len(WORDS)))
    table(
        "LongBench, scores of 100", ("dataset", "metric", "examples", "cut", "score", *WORDS), rows
    )


def _list(found: dict[str, dict[str, Any]]) -> None:
    columns = ("dataset", "metric", "examples", "prompt tokens", "room", "cut", "answer")
    rows = [
        (
            name,
            one["metric"],
            f"{one['examples']:,}",
            f"{one['tokens']['least']:,} to {one['tokens']['most']:,}",
            f"{one['room']:,}",
            f"{one['cut']:,}",
            f"{one['answer']:,}",
        )
        for name, one in found.items()
    ]
    table("LongBench, what would be asked", columns, rows)
