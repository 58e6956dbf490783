"""Everything that can be wrong with a pretraining run, found before its next step.

Axes: L tokens of a sequence (the context + 1: every position predicts), n sequences of evaluation
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.errors import DataError
from longspan.hf.build import load_tokenizer, train_tokenizer
from longspan.train.data import Document, tokenize_documents
from longspan.train.prepare import text_hash
from longspan.train.pretrain_config import PretrainConfig
from longspan.train.pretrain_model import build, make_optimizer
from longspan.train.pretrain_report import History, read_report
from longspan.train.pretrain_state import (
    CHECKPOINT_FOLDER,
    check_out,
    load_state,
    restore,
    tokenizer_in,
)
from longspan.train.pretrain_text import PretrainText, eval_sequences
from longspan.train.resume import check_continues


@dataclass(frozen=True, kw_only=True)
class PretrainRun:
    """A run whose inputs were all found to be in order, before its next step."""

    settings: dict[str, Any]
    tokenizer: Any
    text: PretrainText
    validation_nL: Tensor | None
    heldout_nL: Tensor | None
    model: Any
    optimizer: torch.optim.AdamW
    step: int
    seconds: float
    history: History
    goals: list[tuple[int, int]]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def prepare_run(
    config: PretrainConfig,
    documents: Sequence[Document],
    out: Path,
    validation: Sequence[Document],
    heldout: Sequence[Document],
    *,
    resume: bool,
) -> PretrainRun:
    """Check everything, build the model or take up its checkpoint; nothing is written."""
    check_out(out, resume=resume)
    state = load_state(out) if resume else None
    report = read_report(out) if resume else None
    if state is not None:
        tokenizer = tokenizer_in(state)
    elif report is not None:
        tokenizer = load_tokenizer(out)
    else:
        tokenizer = train_tokenizer((document.text for document in documents), config.vocab)
    tokenizer.model_max_length = config.context
    text = PretrainText(config, tokenizer, documents)
    validation_T, heldout_T = (
        tokenize_documents(tokenizer, some) for some in (validation, heldout)
    )
    torch.manual_seed(config.seed)
    model = build(config, len(tokenizer)).to(torch.device(config.device))
    optimizer = make_optimizer(model, config)
    settings = {
        **_settings(asdict(config)),
        "training text": text.hash,
        "validation text": text_hash(validation_T),
        "held-out text": text_hash(heldout_T),
    }
    step, seconds, history, goals = 0, 0.0, [], [(0, config.steps)]
    if state is not None:
        check_continues(out, state["settings"], settings, steps="steps")
        restore(state, model, optimizer)
        step, seconds, history = state["step"], state["seconds"], state["history"]
        goals = state["goals"]
        if goals[-1][1] < config.steps:
            goals = [*goals, (step, config.steps)]
    elif report is not None:
        check_continues(out, _settings(report.config), _settings(asdict(config)), steps="steps")
        if report.steps < config.steps:
            raise DataError(
                f"The run in {out} is finished after {report.steps} steps and its folder "
                f"{CHECKPOINT_FOLDER} is gone, so that it cannot go on to {config.steps}. Start "
                "in a new folder."
            )
        step = report.steps
    return PretrainRun(
        settings=settings,
        tokenizer=tokenizer,
        text=text,
        validation_nL=eval_sequences(validation_T, config.context + 1),
        heldout_nL=eval_sequences(heldout_T, config.context + 1),
        model=model,
        optimizer=optimizer,
        step=step,
        seconds=seconds,
        history=history,
        goals=goals,
    )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    # Where checkpoints fall changes no number.
    return {name: value for name, value in config.items() if name != "save_every"}
