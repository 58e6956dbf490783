"""Train a tokenizer and a small Llama from scratch: cross-entropy, AdamW, warm-up and cosine.

A run is a pure function of its configuration and the text: batch ``i`` is addressed by (seed, i),
so a run that was interrupted continues from its last checkpoint to the same losses.

Axes: B sequences of a batch, L tokens of a sequence (the context + 1: every position predicts),
V vocabulary, n sequences of evaluation text.
"""

from __future__ import annotations

import json
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

from longspan.errors import DataError, InputError
from longspan.eval.output import check_output_folder
from longspan.hf.build import build_llama, load_tokenizer, save_model, train_tokenizer
from longspan.hf.models import check_device
from longspan.hf.quiet import saving
from longspan.train.checkpoint import write_atomically
from longspan.train.data import (
    Document,
    Sampler,
    recall_documents,
    tokenize_documents,
    windows,
)

CHECKPOINT_FOLDER = "checkpoint"
REPORT_NAME = "pretrain.json"


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
        if not self.lr > 0 or not self.weight_decay >= 0:
            raise InputError(
                "lr must be positive and weight_decay not negative, "
                f"got {self.lr} and {self.weight_decay}."
            )
        for name in ("recall_share", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        check_device(self.device)


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
    history: list[tuple[int, float, float | None]]

    @property
    def heldout_perplexity(self) -> float | None:
        """Perplexity on the held-out text in separate windows of the trained context."""
        return None if self.heldout_loss is None else math.exp(self.heldout_loss)

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

    Raises:
        DataError: too little text, ``out`` not empty or not to be written, or nothing to resume
            from.
    """
    out = Path(out)
    checkpoint = out / CHECKPOINT_FOLDER
    _check_out(out, checkpoint, resume=resume)

    tokenizer = (
        load_tokenizer(checkpoint)
        if resume
        else train_tokenizer((document.text for document in documents), config.vocab)
    )
    tokenizer.model_max_length = config.context
    text = _Text(config, tokenizer, documents)
    validation_nL, heldout_nL = (
        _eval_sequences(tokenizer, some, config.context + 1) for some in (validation, heldout)
    )
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    model = _build(config, len(tokenizer)).to(device)
    hooks = _add_dropout(model, config.dropout)
    optimizer = _optimizer(model, config)
    first, seconds, history = 0, 0.0, []
    if resume:
        first, seconds, history = _restore(checkpoint, config, model, optimizer)

    started = time.perf_counter() - seconds
    validation_loss = history[-1][2] if history else None
    for step in range(first, config.steps):
        loss = _step(model, optimizer, text.batch(step).to(device), learning_rate(config, step))
        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            validation_loss = _mean_loss(model, validation_nL, config.batch)
            history.append((done, loss.item(), validation_loss))
        # Reading the loss waits for the GPU, so not after every step.
        if on_step is not None and (done % 10 == 0 or done == config.steps):
            on_step(done, loss.item(), validation_loss)
        if done % config.save_every == 0 and done < config.steps:
            seconds = time.perf_counter() - started
            state = _state(config, model, optimizer, done, seconds, history)
            _save_checkpoint(checkpoint, tokenizer, state)

    report = PretrainReport(
        config=asdict(config),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_tokens=text.tokens,
        tokens_seen=config.steps * config.batch * config.context,
        seconds=time.perf_counter() - started,
        train_loss=history[-1][1],
        validation_loss=validation_loss,
        heldout_loss=_mean_loss(model, heldout_nL, config.batch),
        history=history,
    )
    for hook in hooks:
        hook.remove()
    save_model(model.to(torch.bfloat16), tokenizer, out)
    (out / REPORT_NAME).write_text(json.dumps(report.to_json(), indent=1) + "\n")
    shutil.rmtree(checkpoint, ignore_errors=True)
    return report


class _Text:
    """Training batches by number: real text, and synthetic recall text beside it."""

    def __init__(
        self, config: PretrainConfig, tokenizer: Any, documents: Sequence[Document]
    ) -> None:
        self._recalled = round(config.recall_share * config.batch)
        self._real = config.batch - self._recalled

        def sampler(some: Sequence[Document]) -> Sampler:
            tokens = tokenize_documents(tokenizer, some)
            return Sampler(tokens, config.context + 1, seed=config.seed)

        self._text, self._recall = sampler(documents), None
        if self._recalled:
            self._recall = sampler(recall_documents(config.seed, config.recall_count))

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


def _step(model: Any, optimizer: torch.optim.AdamW, batch_BL: Tensor, lr: float) -> Tensor:
    """One optimizer step; its loss, which nobody has waited for."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = sequence_loss(model, batch_BL)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up to ``config.lr``, then a cosine to a tenth of it at the last step."""
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


def _eval_sequences(tokenizer: Any, documents: Sequence[Document], length: int) -> Tensor | None:
    return (
        windows(tokenize_documents(tokenizer, documents), length, seed=None) if documents else None
    )


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


def _rng_state(device: torch.device) -> Tensor:
    # Dropout draws from the generator of the device it runs on.
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state)


def _check_out(out: Path, checkpoint: Path, *, resume: bool) -> None:
    check_output_folder(out)
    if resume:
        if (out / REPORT_NAME).is_file():
            raise DataError(f"the run in {out} is finished: there is nothing to resume.")
        if not (checkpoint / "state.pt").is_file():
            raise DataError(
                f"nothing to resume: {checkpoint} holds no checkpoint. Start without resume."
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"output {out} exists and is not an empty folder. Choose another or resume."
        )


def _state(
    config: PretrainConfig,
    model: Any,
    optimizer: torch.optim.AdamW,
    step: int,
    seconds: float,
    history: list[tuple[int, float, float | None]],
) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": _rng_state(torch.device(config.device)),
        "step": step,
        "seconds": seconds,
        "history": history,
    }


def _restore(
    checkpoint: Path, config: PretrainConfig, model: Any, optimizer: torch.optim.AdamW
) -> tuple[int, float, list[tuple[int, float, float | None]]]:
    """Go on from a checkpoint; its step, the seconds it took, and its history."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    if state["config"] != asdict(config):
        changed = [
            name for name, value in asdict(config).items() if state["config"].get(name) != value
        ]
        raise DataError(
            f"{checkpoint} belongs to a run with other values of: {', '.join(changed)}."
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _set_rng_state(torch.device(config.device), state["rng"])
    return state["step"], state["seconds"], state["history"]


def _save_checkpoint(checkpoint: Path, tokenizer: Any, state: dict[str, Any]) -> None:
    checkpoint.mkdir(parents=True, exist_ok=True)
    with saving():
        tokenizer.save_pretrained(checkpoint)
    write_atomically(checkpoint / "state.pt", lambda file: torch.save(state, file))
