"""``longspan eval``: perplexity, passkeys, RULER, LongBench, and what cache policies lose."""

from __future__ import annotations

from typing import Annotated

import typer

from longspan.cli.eval_kv import kv as kv_command
from longspan.cli.eval_longbench import longbench as longbench_command
from longspan.cli.eval_options import (
    KV,
    Data,
    DenseBelow,
    Lengths,
    Model,
    Prefill,
    PythonStdlib,
    Shared,
    shared,
    table,
)
from longspan.eval.plain import to_json

app = typer.Typer(help="Measure a model at long contexts.", no_args_is_help=True)


@app.command()
@shared
def ppl(
    model: Model,
    lengths: Lengths,
    data: Data = None,
    python_stdlib: PythonStdlib = False,
    protocol: Annotated[
        str,
        typer.Option(help="blocks (side by side), sliding (LongLoRA's) or new-tokens (YaRN's)."),
    ] = "blocks",
    stride: Annotated[int, typer.Option(help="Tokens by which windows move.")] = 256,
    kv: KV = None,
    chunk: Annotated[
        int, typer.Option(help="With --kv: tokens that go through the cache at a time.")
    ] = 1,
    prompt: Annotated[
        int, typer.Option(help="With --kv: first tokens read at once and not scored.")
    ] = 0,
    *,
    given: Shared,
) -> None:
    """Perplexity by context length and by position; with --kv token by token through a cache."""
    from longspan.cli.progress import Bars
    from longspan.cli.values import whole_numbers
    from longspan.errors import InputError
    from longspan.eval.perplexity import check_protocol, perplexity
    from longspan.eval.records import Records
    from longspan.eval.stepwise import by_length
    from longspan.kv import cache
    from longspan.kv import parse as read_policy
    from longspan.train.data import tokenize_documents
    from longspan.train.prepare import read_text, text_hash

    sizes = whole_numbers(lengths)
    check_protocol(protocol, stride)
    policy = None if kv is None else read_policy(kv)
    if policy is not None and protocol != "blocks":
        raise InputError("With --kv windows lie side by side: leave --protocol out.")
    if policy is None and (chunk, prompt) != (1, 0):
        raise InputError("--chunk and --prompt belong to --kv: nothing is read in pieces else.")
    if policy is not None and (chunk < 1 or not 0 <= prompt < min(sizes) - 1):
        raise InputError(
            "--chunk must be at least 1, and --prompt at least 0 and two tokens shorter than the "
            f"shortest length {min(sizes)}; got {chunk} and {prompt}."
        )
    documents = read_text(data or (), python_stdlib, "heldout")
    subject = given.subject(model, max(sizes))
    with subject.open() as (loss, tokenizer), Bars() as bars:
        text = tokenize_documents(tokenizer, documents)
        asked = {
            **subject.settings(),
            "text": text_hash(text),
            "protocol": protocol,
            "stride": stride,
        }
        if policy is not None:
            asked |= {"kv": str(policy), "chunk": chunk, "prompt": prompt}
            rows = by_length(
                loss.model,
                text,
                sizes,
                lambda: cache(loss.model, policy),
                chunk=chunk,
                prompt=prompt,
                limit=given.limit,
                records=Records(given.out, asked),
                progress=bars,
            )
            result = {"lengths": rows}
        else:
            result = perplexity(
                loss,
                text,
                sizes,
                protocol=protocol,
                stride=stride,
                bos=tokenizer.bos_token_id,
                limit=given.limit,
                # The curve belongs to the longest length, so records of other lengths would not
                # fit it.
                records=Records(given.out, {**asked, "longest": max(sizes)}),
                progress=bars,
            )
    if given.as_json:
        typer.echo(to_json({**asked, **result}))
        return
    how = f"protocol {protocol}" if policy is None else f"through {policy}"
    table(
        f"Perplexity, {how}",
        ("context", "perplexity", "nats per token", "windows", "tokens"),
        [
            (
                f"{row['length']:,}",
                f"{row['perplexity']:,.3f}",
                f"{row['nll']:.4f}",
                f"{row['windows']:,}",
                f"{row['tokens']:,}",
            )
            for row in result["lengths"]
        ],
    )


@app.command()
@shared
def passkey(
    model: Model,
    lengths: Lengths,
    depths: Annotated[
        str, typer.Option(help="Where the key stands, 0 (start) to 1 (end).")
    ] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(help="Probes per length and depth.")] = 5,
    style: Annotated[str, typer.Option(help="Wording: prose or code.")] = "prose",
    seed: Annotated[int, typer.Option(help="Chooses keys and filler.")] = 0,
    *,
    given: Shared,
) -> None:
    """Passkey retrieval by context length and depth."""
    from longspan.cli.progress import Bars
    from longspan.cli.values import numbers, whole_numbers
    from longspan.eval.passkey import check_passkey
    from longspan.eval.passkey import passkey as measure
    from longspan.eval.records import Records
    from longspan.eval.seed import check_seed

    sizes = tuple(dict.fromkeys(whole_numbers(lengths)))
    places = tuple(dict.fromkeys(numbers(depths)))
    check_passkey(places, trials, style)
    check_seed(seed)
    subject = given.subject(model, max(sizes))
    asked = {**subject.settings(), "style": style, "seed": seed}
    with subject.open() as (loss, tokenizer), Bars() as bars:
        result = measure(
            loss,
            tokenizer,
            sizes,
            places,
            trials=trials,
            style=style,
            seed=seed,
            limit=given.limit,
            records=Records(given.out, asked),
            progress=bars,
        )
    if given.as_json:
        typer.echo(to_json({**asked, **result}))
        return
    rows = [
        (f"{length:,}", *("-" if cell is None else f"{cell:.0%}" for cell in row))
        for length, row in zip(result["lengths"], result["accuracy"], strict=True)
    ]
    columns = ("context", *(f"depth {depth:g}" for depth in places))
    planned = len(sizes) * len(places) * trials
    table(f"Passkey retrieval, {_asked(trials, 'probe', planned, given.limit)}", columns, rows)


@app.command()
@shared
def ruler(
    model: Model,
    lengths: Lengths,
    tasks: Annotated[
        str, typer.Option(help="Tasks with commas, e.g. niah.single,vt; or all.")
    ] = "all",
    samples: Annotated[int, typer.Option(help="Questions per task and length.")] = 10,
    seed: Annotated[int, typer.Option(help="Chooses what the questions say.")] = 0,
    prefill: Prefill = None,
    dense_below: DenseBelow = None,
    kv: KV = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list, ask nothing.")
    ] = False,
    *,
    given: Shared,
) -> None:
    """RULER's tasks that need no download, and key-value retrieval, answered by generation."""
    from longspan.cli.progress import Bars
    from longspan.cli.values import whole_numbers
    from longspan.eval.answers import reading
    from longspan.eval.records import Records
    from longspan.eval.ruler import ALL, check_tasks
    from longspan.eval.ruler_run import check_rooms, questions
    from longspan.eval.ruler_run import ruler as measure
    from longspan.eval.seed import check_seed
    from longspan.hf.models import tokenizer_of

    sizes = tuple(dict.fromkeys(whole_numbers(lengths)))
    names = ALL if tasks == "all" else tuple(name.strip() for name in tasks.split(","))
    names = tuple(dict.fromkeys(names))
    check_tasks(names, samples)
    check_seed(seed)
    read = reading(prefill, dense_below, kv, given.pattern)
    subject = given.subject(model, max(sizes))
    if dry_run:
        subject.check()
        planned = questions(names, sizes, samples, given.limit)
        check_rooms(tokenizer_of(model), planned)
        plan = {
            "tasks": list(names),
            "lengths": list(sizes),
            "questions": len(planned),
            "prefill": read.settings()["prefill"],
            "kv": read.settings()["kv"],
        }
        told = f"{', '.join(names)} at {', '.join(f'{n:,}' for n in sizes)} tokens: "
        told += f"{plan['questions']:,} questions, prefill {read.prefill or 'dense'}, cache "
        told += f"{read.kv or 'everything()'}. Nothing was asked."
        typer.echo(to_json(plan) if given.as_json else told)
        return
    asked = {**subject.settings(), "seed": seed, **read.settings()}
    with (
        subject.open() as (loss, tokenizer),
        read.open(loss.model) as make_cache,
        Bars() as bars,
    ):
        result = measure(
            loss.model,
            tokenizer,
            names,
            sizes,
            samples=samples,
            seed=seed,
            limit=given.limit,
            make_cache=make_cache,
            records=Records(given.out, asked),
            progress=bars,
        )
    if given.as_json:
        typer.echo(to_json({**asked, **result}))
        return
    rows = [
        (task, *(_share(found.get(str(n))) for n in sizes))
        for task, found in result["tasks"].items()
    ]
    rows.append(("mean", *(_share(result["mean"].get(str(n))) for n in sizes)))
    worst = (result["worst"].get(str(n)) for n in sizes)
    rows.append(("worst", *("-" if one is None else one["task"] for one in worst)))
    columns = ("task", *(f"{n:,}" for n in sizes))
    planned = len(questions(names, sizes, samples))
    table(f"RULER, {_asked(samples, 'question', planned, given.limit)}", columns, rows)


app.command("longbench")(longbench_command)
app.command("kv")(kv_command)


def _asked(each: int, what: str, planned: int, limit: int | None) -> str:
    """What the figures of a table are of, in words."""
    if limit is None or limit >= planned:
        return f"{each:,} {what}{'s' * (each != 1)} each"
    return f"the first {limit:,} of {planned:,} {what}s (--limit)"


def _share(score: float | None) -> str:
    return "-" if score is None else f"{score:.0%}"
