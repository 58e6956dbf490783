"""``longspan pretrain``: train a small Llama and its tokenizer from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.eval.plain import to_json


def pretrain(
    out: Annotated[Path, typer.Option(help="Folder for the model; new or empty.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="File or folder with text; may be repeated.")
    ] = None,
    python_stdlib: Annotated[
        bool, typer.Option("--python-stdlib", help="Train on this Python's standard library.")
    ] = False,
    stdlib_tests: Annotated[
        bool, typer.Option("--stdlib-tests", help="With --python-stdlib: its test suite too.")
    ] = False,
    context: Annotated[int, typer.Option(help="Trained context, in tokens.")] = 512,
    hidden: Annotated[int, typer.Option(help="Hidden width.")] = 256,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 4,
    intermediate: Annotated[int, typer.Option(help="Width of the MLP.")] = 704,
    vocab: Annotated[int, typer.Option(help="Vocabulary of the byte-level BPE.")] = 2048,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 64,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Warm-up steps.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="AdamW weight decay.")] = 0.1,
    dropout: Annotated[float, typer.Option(help="Dropout while training.")] = 0.0,
    recall_share: Annotated[
        float, typer.Option(help="Share of synthetic recall text in each batch, 0 to 1.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in --out, or on from its end: more --steps."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and count; do not train.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a small Llama and a byte-level BPE tokenizer from scratch on plain text.

    Besides the model, --out keeps a folder named checkpoint, about six times as large. Only more
    --steps need it: it may be removed after the run, and is not to be uploaded.
    """
    from longspan.cli.progress import Bars
    from longspan.errors import DataError
    from longspan.train.data import python_sources, read_documents
    from longspan.train.pretrain import plan
    from longspan.train.pretrain import pretrain as run
    from longspan.train.pretrain_config import PretrainConfig
    from longspan.train.pretrain_report import finished_report
    from longspan.train.resume import say_finished

    if bool(data) == python_stdlib:
        raise DataError("choose the text: either --data PATH (repeatable) or --python-stdlib.")
    config = PretrainConfig(
        context=context,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        vocab=vocab,
        steps=steps,
        batch=batch,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        dropout=dropout,
        recall_share=recall_share,
        seed=seed,
        device=device,
    )
    validation, heldout = [], []
    if data:
        documents = read_documents(data)
    else:
        documents = python_sources("train", tests=stdlib_tests)
        validation, heldout = python_sources("validation"), python_sources("heldout")
    if dry_run:
        planned = plan(
            config, documents, out, validation=validation, heldout=heldout, resume=resume
        )
        typer.echo(to_json(planned, indent=None if as_json else 1))
        return

    finished = resume and finished_report(out, steps) is not None
    with Bars() as bars:

        def show(step: int, loss: float, validation_loss: float | None) -> None:
            seen = "" if validation_loss is None else f"  validation {validation_loss:.3f}"
            bars("pretrain", step, steps, f"loss {loss:.3f}{seen}")

        report = run(
            config,
            documents,
            out,
            validation=validation,
            heldout=heldout,
            resume=resume,
            on_step=show,
        )
        if finished:
            say_finished(bars, steps)
    if as_json:
        typer.echo(to_json(report.to_json()))
        return
    typer.echo(
        f"{report.parameters:,} parameters, {report.train_tokens:,} tokens of text, "
        f"{report.tokens_seen:,} tokens seen in {report.seconds:.0f} s"
    )
    typer.echo(f"training loss {report.train_loss:.3f} nats per token")
    if report.heldout_perplexity is not None:
        typer.echo(f"held-out perplexity at {context} tokens: {report.heldout_perplexity:.2f}")
    typer.echo(f"model written to {out}")
