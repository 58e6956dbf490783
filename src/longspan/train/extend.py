"""Extend the context of a model: measure, scale positions, train LoRA under a pattern, measure
again, report.

The run is a sequence of stages, each of which leaves its result in the output folder (see
``extend_folder``) and is skipped when it is found there: so ``resume`` continues wherever the run
was interrupted. A finished run is left as it is; with more steps it goes on, and what comes after
its last step is done again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from longspan import hf
from longspan.errors import RunError
from longspan.eval.environment import environment
from longspan.eval.losses import TokenLoss
from longspan.eval.progress import Progress, prefixed, silent
from longspan.eval.suite import evaluate
from longspan.hf import lora
from longspan.hf.recompute import recompute_layers
from longspan.hf.rope import set_rope
from longspan.pattern import Pattern
from longspan.train.card import write_card
from longspan.train.checkpoint import Checkpoints, write_json
from longspan.train.extend_folder import (
    ADAPTER,
    ARMS,
    EVAL,
    MERGED,
    SETTINGS_NAME,
    STEPS,
    check_output,
    finished_report,
    forget_end,
    started_with,
    write_report,
)
from longspan.train.loop import train
from longspan.train.prepare import Job, prepare
from longspan.train.resume import say_finished
from longspan.train.settings import ExtendSettings
from longspan.train.sole_writer import sole_writer


def extend(
    settings: ExtendSettings,
    out: Path | str,
    *,
    resume: bool = False,
    merge: bool = False,
    progress: Progress = silent,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the whole extension and write its results to ``out``.

    Args:
        settings: what to do.
        out: output folder; new or empty unless ``resume``.
        resume: continue the run in ``out``; more steps than it was started with are taken.
        merge: also write the model with the adapter merged into its weights, as it is anyway where
            the run in ``out`` has written one before. The numbers of the report are of the adapter
            that is saved; in half precision merged weights are rounded once more.
        progress: called after each piece of work.
        command: the command line, for the report.

    Returns:
        The report, as in report.json.

    Raises:
        LongspanError: before any work for bad input; RunError when the work cannot go on.
    """
    job = prepare(settings, Path(out), resume=resume)
    try:
        with sole_writer(job.out):
            # Another process may have been there since.
            check_output(job.out, resume=resume)
            if resume:
                merge = merge or (job.out / MERGED).is_dir()
                finished = finished_report(job.out, settings, merge=merge)
                if finished is not None:
                    say_finished(progress, settings.loop.steps)
                    return finished
            return _run(job, merge=merge, progress=progress, command=command)
    except OSError as error:
        raise RunError(
            f"{job.out} could not be written: {error.strerror or error}. What was finished is "
            "kept; "
            "free some space and run the same command with --resume."
        ) from error


def _run(job: Job, *, merge: bool, progress: Progress, command: Sequence[str]) -> dict[str, Any]:
    settings, out = job.settings, job.out
    old = started_with(out)
    if old is not None and old[STEPS] < settings.loop.steps:
        forget_end(out)
    write_json(out / SETTINGS_NAME, job.fingerprint())
    report: dict[str, Any] = {
        "command": shlex.join(command),
        "settings": asdict(settings),
        "job": job.summary(),
        "environment": environment(),
        "base": _measure(job, job.model, "base", progress),
    }
    set_rope(job.model, settings.rope, settings.length, factors=settings.rope_factors)
    with _attention(job.model, job.pattern if settings.eval_attention == "pattern" else None):
        report["scaled"] = _measure(job, job.model, "scaled", progress)

    report["trained"], adapted = _arm(job, job.model, job.pattern, "trained", progress)
    lora.save_adapter(adapted, out / ADAPTER)
    write_card(out / ADAPTER, settings, job.model.config)
    report["dense"], report["merged"] = None, False
    # What was measured is not lost if what follows cannot be done.
    write_report(report, out)
    if merge:
        # Else the tokenizer would go on cutting text at the old length where asked to truncate.
        limit = max(job.tokenizer.model_max_length, settings.length)
        job.tokenizer.model_max_length = limit
        lora.merge_and_save(adapted, job.tokenizer, out / MERGED)
        report["merged"] = True
        write_report(report, out)
    del adapted

    if settings.compare_dense:
        model, _ = hf.load_model(settings.model, dtype=settings.dtype, device=settings.device)
        set_rope(model, settings.rope, settings.length, factors=settings.rope_factors)
        report["dense"], _ = _arm(job, model, None, "dense", progress)
        write_report(report, out)
    return report


def _arm(
    job: Job, model: Any, pattern: Pattern | None, name: str, progress: Progress
) -> tuple[dict[str, Any], Any]:
    """Train LoRA on a model under a pattern (None: its own attention) and measure the result."""
    settings = job.settings
    # The adapter's random start must be the same when the run is resumed, and in both arms.
    torch.manual_seed(settings.loop.seed)
    adapted = lora.add_lora(
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        embeddings_and_norms=settings.embeddings_and_norms,
    )
    if settings.gradient_checkpointing:
        recompute_layers(model)
    if settings.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with _attention(model, pattern):
        begin = time.perf_counter()
        steps = train(
            TokenLoss(adapted),
            job.batches(),
            settings.loop,
            checkpoints=Checkpoints(job.out / name),
            log=job.out / f"{name}.train.jsonl",
            progress=prefixed(name, progress),
        )
        wall = time.perf_counter() - begin
    if settings.gradient_checkpointing:
        recompute_layers(model, on=False)
    seconds = sum(step["seconds"] for step in steps)
    measured_with = pattern if settings.eval_attention == "pattern" else None
    with _attention(model, measured_with):
        measured = _measure(job, adapted, name, progress)
    return {
        "pattern": None if pattern is None else str(pattern),
        "trained_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "losses": [step["loss"] for step in steps],
        "seconds": seconds,
        # What this process spent, with checkpoints; less than ``seconds`` after a resume.
        "wall_seconds": wall,
        "tokens_per_second": sum(step["tokens"] for step in steps) / seconds,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated()
        if settings.device.startswith("cuda")
        else None,
        **measured,
    }, adapted


def _measure(job: Job, model: Any, name: str, progress: Progress) -> dict[str, Any]:
    identity = job.fingerprint()
    if name not in ARMS:
        # Before the training, so the same before a longer one.
        del identity[STEPS]
    return evaluate(
        model,
        job.tokenizer,
        job.heldout_text,
        job.settings.suite,
        folder=job.out / EVAL,
        name=name,
        identity=identity,
        progress=progress,
    )


def _attention(model: Any, pattern: Pattern | None) -> AbstractContextManager[Any]:
    """A block in which the model attends by a pattern; None leaves the model's own attention."""
    return nullcontext() if pattern is None else hf.apply(model, pattern)
