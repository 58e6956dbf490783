"""Train a tokenizer and a small Llama from scratch: cross-entropy, AdamW, warm-up and cosine.

A run is a pure function of its configuration and the text: batch ``i`` is addressed by (seed, i),
so a run that was interrupted continues from its last checkpoint to the same losses.

Axes: B sequences of a batch, L tokens of a sequence (the context + 1: every position predicts),
V vocabulary, n sequences of evaluation text.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.errors import InputError
from longspan.eval.perplexity import exp
from longspan.eval.seed import check_seed
from longspan.hf.build import build_llama, save_model, train_tokenizer
from longspan.hf.models import check_device
from longspan.train.checkpoint import write_json
from longspan.train.data import (
    Document,
    Sampler,
    recall_documents,
    tokenize_documents,
    windows,
)
from longspan.train.finite import LARGEST_RATE, check_step, check_weights
from longspan.train.interrupt import between_steps
from longspan.train.prepare import text_hash
from longspan.train.pretrain_state import (
    CHECKPOINT_FOLDER,
    REPORT_NAME,
    History,
    check_out,
    load_state,
    restore,
    save_state,
    tokenizer_in,
)
from longspan.train.sole_writer import sole_writer


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that decides a run besides its text."""

    context: int = 512
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 704
    vocab: int = 2048
    rope_theta: float = 10_000.0
    steps: int = 1000
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    # On what each attention and MLP block adds; for training only, the saved model has none.
    dropout: float = 0.0
    # Share of each batch that is synthetic recall text (train/recall.py).
    recall_share: float = 0.0
    recall_count: int = 20_000
    seed: int = 0
    eval_every: int = 250
    save_every: int = 250
    device: str = "cpu"

    def __post_init__(self) -> None:
        sizes = ("context", "hidden", "layers", "heads", "kv_heads", "intermediate")
        for name in (*sizes, "steps", "batch", "warmup", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.lr <= LARGEST_RATE or not 0 <= self.weight_decay < math.inf:
            raise InputError(
                "lr must be positive and at most 1e30, weight_decay not negative and finite, "
                f"got {self.lr} and {self.weight_decay}."
            )
        for name in ("recall_share", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.recalled == self.batch:
            raise InputError(
                f"recall_share {self.recall_share} of a batch of {self.batch} leaves no sequence "
                "of real text: give a smaller share or a larger batch."
            )
        check_seed(self.seed)
        check_device(self.device)

    @property
    def recalled(self) -> int:
        """Sequences of each batch that are synthetic recall text."""
        return round(self.recall_share * self.batch)


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """What a run did: losses in nats per token, history of (step, train, validation loss)."""

    config: dict[str, Any]
    parameters: int
    train_tokens: int
    tokens_seen: int
    seconds: float
    train_loss: float
    validation_loss: float | None
    heldout_loss: float | None
    history: History

    @property
    def heldout_perplexity(self) -> float | None:
        """Perplexity on the held-out text in separate windows of the trained context."""
        return None if self.heldout_loss is None else exp(self.heldout_loss)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "heldout_perplexity": self.heldout_perplexity}


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
        out: folder for the model; must be empty or new unless ``resume``.
        validation: text for the losses shown on the way.
        heldout: text for the one figure at the end.
        resume: continue from the checkpoint in ``out``.
        on_step: called after every tenth step and the last one with (step, train loss, last
            validation loss).

    Ctrl-C or SIGTERM ends the run after the step that it is in, with a checkpoint to resume from.

    Raises:
        DataError: too little text, ``out`` not empty or not to be written, nothing to resume from,
            or a run of other settings or text.
        RunError: the loss is no longer finite, the checkpoint is damaged, or another process
            trains into ``out``.
    """
    out = Path(out)
    run = _prepare(config, documents, out, validation, heldout, resume=resume)
    with sole_writer(out):
        # Another process may have been there since.
        check_out(out, resume=resume)
        return _train(run, config, out, resume=resume, on_step=on_step)


def _train(
    run: _Run,
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool,
    on_step: Callable[[int, float, float | None], None] | None,
) -> PretrainReport:
    model, optimizer, history = run.model, run.optimizer, run.history
    hooks = _add_dropout(model, config.dropout)
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
        )

    if not resume:
        keep(0)
    validation_loss = history[-1][2] if history else None
    with between_steps() as interrupted:
        for step in range(run.step, config.steps):
            done, last = step + 1, step + 1 == config.steps
            batch_BL = run.text.batch(step).to(model.device)
            loss, norm = _step(model, optimizer, batch_BL, learning_rate(config, step))
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
                validation_loss = _mean_loss(model, run.validation_nL, config.batch)
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
        # While the last losses were measured.
        if interrupted():
            keep(config.steps)

    report = PretrainReport(
        config=asdict(config),
        parameters=run.parameters,
        train_tokens=run.text.tokens,
        tokens_seen=config.steps * config.batch * config.context,
        seconds=time.perf_counter() - started,
        train_loss=history[-1][1],
        validation_loss=validation_loss,
        heldout_loss=_mean_loss(model, run.heldout_nL, config.batch),
        history=history,
    )
    for hook in hooks:
        hook.remove()
    save_model(model.to(torch.bfloat16), run.tokenizer, out)
    # Once there, it says that the run is finished.
    write_json(out / REPORT_NAME, report.to_json())
    shutil.rmtree(out / CHECKPOINT_FOLDER, ignore_errors=True)
    return report


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
    run = _prepare(config, documents, Path(out), validation, heldout, resume=resume)
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


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run whose inputs were all found to be in order, before its next step."""

    settings: dict[str, Any]
    tokenizer: Any
    text: _Text
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


def _prepare(
    config: PretrainConfig,
    documents: Sequence[Document],
    out: Path,
    validation: Sequence[Document],
    heldout: Sequence[Document],
    *,
    resume: bool,
) -> _Run:
    """Check everything, build the model or take up its checkpoint; nothing is written."""
    check_out(out, resume=resume)
    state = load_state(out) if resume else None
    tokenizer = (
        train_tokenizer((document.text for document in documents), config.vocab)
        if state is None
        else tokenizer_in(state)
    )
    tokenizer.model_max_length = config.context
    text = _Text(config, tokenizer, documents)
    validation_T, heldout_T = (
        tokenize_documents(tokenizer, some) for some in (validation, heldout)
    )
    torch.manual_seed(config.seed)
    model = _build(config, len(tokenizer)).to(torch.device(config.device))
    optimizer = _optimizer(model, config)
    settings = {
        **asdict(config),
        "training text": text.hash,
        "validation text": text_hash(validation_T),
        "held-out text": text_hash(heldout_T),
    }
    if state is not None:
        restore(out, state, settings, model, optimizer)
    return _Run(
        settings=settings,
        tokenizer=tokenizer,
        text=text,
        validation_nL=_eval_sequences(validation_T, config.context + 1),
        heldout_nL=_eval_sequences(heldout_T, config.context + 1),
        model=model,
        optimizer=optimizer,
        step=0 if state is None else state["step"],
        seconds=0.0 if state is None else state["seconds"],
        history=[] if state is None else state["history"],
    )


class _Text:
    """Training batches by number: real text, and synthetic recall text beside it."""

    def __init__(
        self, config: PretrainConfig, tokenizer: Any, documents: Sequence[Document]
    ) -> None:
        self._recalled = config.recalled
        self._real = config.batch - self._recalled

        def sampler(tokens: Sequence[Tensor]) -> Sampler:
            return Sampler(tokens, config.context + 1, seed=config.seed)

        tokens = tokenize_documents(tokenizer, documents)
        self.hash = text_hash(tokens)
        self._text, self._recall = sampler(tokens), None
        if self._recalled:
            recall = recall_documents(config.seed, config.recall_count)
            self._recall = sampler(tokenize_documents(tokenizer, recall))

    @property
    def tokens(self) -> int:
        """Tokens of the real text."""
        return self._text.tokens

    def batch(self, step: int) -> Tensor:
        """Batch ``step`` >= 0: int64 [B, L]."""
        batch_BL = self._text.batch(step * self._real, self._real)
        if self._recall is None:
            return batch_BL
        recalled_BL = self._recall.batch(step * self._recalled, self._recalled)
        return torch.cat([batch_BL, recalled_BL])


def _build(config: PretrainConfig, vocabulary: int) -> Any:
    return build_llama(
        vocab_size=vocabulary,
        hidden=config.hidden,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        intermediate=config.intermediate,
        context=config.context,
        rope_theta=config.rope_theta,
    )


def _step(
    model: Any, optimizer: torch.optim.AdamW, batch_BL: Tensor, lr: float
) -> tuple[Tensor, Tensor]:
    """One optimizer step; its loss and gradient norm, which nobody has waited for."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = sequence_loss(model, batch_BL)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up to ``config.lr``, then a cosine that reaches a tenth after the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def sequence_loss(model: Any, batch_BL: Tensor) -> Tensor:
    """Mean next-token cross-entropy of int64 [B, L] in nats; bfloat16 autocast on CUDA."""
    cuda = batch_BL.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
        logits_BLV = model(input_ids=batch_BL[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BLV.float().flatten(0, 1), batch_BL[:, 1:].flatten())


def _eval_sequences(documents_T: Sequence[Tensor], length: int) -> Tensor | None:
    return windows(documents_T, length, seed=None) if documents_T else None


@torch.no_grad()
def _mean_loss(model: Any, sequences_nL: Tensor | None, batch: int) -> float | None:
    if sequences_nL is None:
        return None
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    for part_BL in sequences_nL.split(batch):
        total += sequence_loss(model, part_BL.to(device)).item() * len(part_BL)
    model.train()
    return total / len(sequences_nL)


def _add_dropout(model: Any, share: float) -> list[Any]:
    if not share:
        return []
    added = [
        module for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj"))
    ]
    return [
        module.register_forward_hook(
            lambda module, _, output: F.dropout(output, share, training=module.training)
        )
        for module in added
    ]


def _optimizer(model: Any, config: PretrainConfig) -> torch.optim.AdamW:
    # Norm weights are scales around one: decaying them towards zero only fights the next layer.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": scales, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.95),
    )
