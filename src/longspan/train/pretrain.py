"""Train a tokenizer and a small Llama from scratch: cross-entropy, AdamW, warm-up and cosine.

A run is a pure function of its configuration and the text: batch ``i`` is addressed by (seed, i),
so a run that was interrupted continues from its last checkpoint to the same losses.

Axes: B sequences of a batch, L tokens of a sequence (the context + 1: every position predicts).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from longspan.hf.build import save_model
from longspan.train.checkpoint import write_json
from longspan.train.data import Document
from longspan.train.finite import check_step, check_weights
from longspan.train.interrupt import between_steps
from longspan.train.pretrain_config import PretrainConfig
from longspan.train.pretrain_model import add_dropout, mean_loss, round_weights, train_step
from longspan.train.pretrain_prepare import PretrainRun, prepare_run
from longspan.train.pretrain_report import REPORT_NAME, PretrainReport, finished_report
from longspan.train.pretrain_state import CHECKPOINT_FOLDER, check_out, save_state
from longspan.train.sole_writer import sole_writer


def pretrain(
    config: PretrainConfig,
    documents: Sequence[Document],
    out: Path | str,
    *,
    validation: Sequence[Document] = (),
    heldout: Sequence[Document] = (),
    resume: bool = False,
    on_step: Callable[[int, float, float | None], None] | None = None,
) -> PretrainReport:
    """Train and write the model folder, with ``pretrain.json`` beside the weights.

    Args:
        config: the run.
        documents: training text; the tokenizer is trained on it too.
        out: folder for the model; must be empty or new unless ``resume``. Its ``checkpoint`` is
            needed only to go on, and can be removed after the run.
        validation: text for the losses shown on the way.
        heldout: text for the one figure at the end.
        resume: continue from the checkpoint in ``out``. A finished run is left as it is and its
            report given, unless ``config`` asks for more steps: then it goes on, with the
            learning rates of a run of so many.
        on_step: called after every tenth step and the last one with (step, train loss, last
            validation loss).

    Ctrl-C or SIGTERM ends the run after the step that it is in, with a checkpoint to resume from.

    Raises:
        DataError: too little text, ``out`` not empty or not to be written, nothing to resume from,
            or a run of other settings or text. More steps are no other setting.
        RunError: the loss is no longer finite, the checkpoint is damaged, or another process
            trains into ``out``.
    """
    out = Path(out)
    run = prepare_run(config, documents, out, validation, heldout, resume=resume)
    with sole_writer(out):
        # Another process may have been there since.
        check_out(out, resume=resume)
        finished = finished_report(out, config.steps) if resume else None
        if finished is not None:
            return finished
        return _train(run, config, out, resume=resume, on_step=on_step)


def _train(
    run: PretrainRun,
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool,
    on_step: Callable[[int, float, float | None], None] | None,
) -> PretrainReport:
    model, optimizer, history = run.model, run.optimizer, run.history
    hooks = add_dropout(model, config.dropout)
    started = time.perf_counter() - run.seconds

    def keep(step: int) -> None:
        save_state(
            out,
            settings=run.settings,
            tokenizer=run.tokenizer,
            model=model,
            optimizer=optimizer,
            step=step,
            seconds=time.perf_counter() - started,
            history=history,
            goals=run.goals,
        )

    if not resume:
        keep(0)
    validation_loss = history[-1][2] if history else None
    with between_steps() as interrupted:
        for step in range(run.step, config.steps):
            done, last = step + 1, step + 1 == config.steps
            batch_BL = run.text.batch(step).to(model.device)
            loss, norm = train_step(model, optimizer, batch_BL, config.lr_at(step))
            measured = done % config.eval_every == 0 or last
            kept = done % config.save_every == 0 and not last
            shown = done % 10 == 0 or last
            # Asked once: what arrives later is for the next step.
            stop = interrupted()
            # Reading the loss waits for the GPU, so not after every step: what is not finite
            # stays so.
            if measured or kept or shown or stop:
                check_step(loss.item(), norm.item(), done, config.lr)
            if measured:
                validation_loss = mean_loss(model, run.validation_nL, config.batch)
                history.append((done, loss.item(), validation_loss))
            if on_step is not None and shown:
                on_step(done, loss.item(), validation_loss)
            if kept or stop:
                # A checkpoint takes the place of the one before.
                check_weights(model.parameters(), config.lr)
                keep(done)
            if stop:
                raise KeyboardInterrupt
        check_weights(model.parameters(), config.lr)
        # What is left can be done again. It stays: a larger number of steps goes on from here.
        keep(config.steps)

    for hook in hooks:
        hook.remove()
    # What is told of the weights is to be true of those that are saved.
    round_weights(model, torch.bfloat16)
    report = PretrainReport(
        config=asdict(config),
        parameters=run.parameters,
        train_tokens=run.text.tokens,
        tokens_seen=config.steps * config.batch * config.context,
        seconds=time.perf_counter() - started,
        train_loss=history[-1][1],
        validation_loss=validation_loss,
        heldout_loss=mean_loss(model, run.heldout_nL, config.batch),
        history=history,
        goals=run.goals,
    )
    _write(out, model.to(torch.bfloat16), run.tokenizer, report)
    return report


def _write(out: Path, model: Any, tokenizer: Any, report: PretrainReport) -> None:
    """Put a model in the place of the one before, if any, once all of it is on the disk."""
    beside = out / CHECKPOINT_FOLDER / "model"
    shutil.rmtree(beside, ignore_errors=True)
    save_model(model, tokenizer, beside)
    files = sorted(beside.iterdir())
    for file in files:
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())
    # From here to the end the folder does not say that it is finished.
    (out / REPORT_NAME).unlink(missing_ok=True)
    for file in files:
        file.replace(out / file.name)
    beside.rmdir()
    write_json(out / REPORT_NAME, report.to_json())


def plan(
    config: PretrainConfig,
    documents: Sequence[Document],
    out: Path | str,
    *,
    validation: Sequence[Document] = (),
    heldout: Sequence[Document] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """What ``pretrain`` would do, in numbers; its checks are made, nothing is written.

    Raises:
        LongspanError: what ``pretrain`` would refuse before its first step.
    """
    run = prepare_run(config, documents, Path(out), validation, heldout, resume=resume)
    return {
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
        "heldout_documents": len(heldout),
        "parameters": run.parameters,
        "train_tokens": run.text.tokens,
        "tokens_to_see": config.steps * config.batch * config.context,
        "steps_done": run.step,
        "out": str(out),
    }
