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

from longspan.hf.build import train_tokenizer
from longspan.train.data import Document, tokenize_documents
from longspan.train.prepare import text_hash
from longspan.train.pretrain_config import PretrainConfig
from longspan.train.pretrain_model import build, make_optimizer
from longspan.train.pretrain_report import History
from longspan.train.pretrain_state import check_out, load_state, restore, tokenizer_in
from longspan.train.pretrain_text import PretrainText, eval_sequences


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
    tokenizer = (
        train_tokenizer((document.text for document in documents), config.vocab)
        if state is None
        else tokenizer_in(state)
    )
    tokenizer.model_max_length = config.context
    text = PretrainText(config, tokenizer, documents)
    validation_T, heldout_T = (
        tokenize_documents(tokenizer, some) for some in (validation, heldout)
    )
    torch.manual_seed(config.seed)
    model = build(config, len(tokenizer)).to(torch.device(config.device))
    optimizer = make_optimizer(model, config)
    settings = {
        **asdict(config),
        "training text": text.hash,
        "validation text": text_hash(validation_T),
        "held-out text": text_hash(heldout_T),
    }
    if state is not None:
        restore(out, state, settings, model, optimizer)
    return PretrainRun(
        settings=settings,
        tokenizer=tokenizer,
        text=text,
        validation_nL=eval_sequences(validation_T, config.context + 1),
        heldout_nL=eval_sequences(heldout_T, config.context + 1),
        model=model,
        optimizer=optimizer,
        step=0 if state is None else state["step"],
        seconds=0.0 if state is None else state["seconds"],
        history=[] if state is None else state["history"],
    )
