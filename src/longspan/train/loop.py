"""A short training loop: AdamW, warm-up, gradient clipping, checkpoints, and the same losses after
a kill.

Everything that a step depends on is either a function of its number (the batch, the learning rate)
or in the checkpoint (parameters, optimizer, random generators), so a resumed run repeats the
losses of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from longspan.errors import InputError, RunError
from longspan.eval.losses import TokenLoss
from longspan.eval.progress import Progress, silent
from longspan.eval.records import read_lines
from longspan.eval.seed import check_seed
from longspan.train.checkpoint import Checkpoints, write_text
from longspan.train.finite import LARGEST_RATE, check_step
from longspan.train.full_precision import FullPrecision
from longspan.train.interrupt import between_steps
from longspan.train.schedule import Schedule, learning_rate


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train.

    Attributes:
        steps: optimizer steps.
        lr: learning rate after the warm-up.
        warmup: steps over which it grows linearly.
        schedule: what follows the warm-up: ``constant``, or ``cosine`` to a tenth after the last
            step.
        accumulate: batches per step.
        clip: largest norm of the gradient.
        weight_decay: of AdamW.
        save_every: steps between checkpoints; one is also written at the end.
        seed: of the generators behind dropout.
    """

    steps: int
    lr: float
    warmup: int = 20
    schedule: Schedule = "constant"
    accumulate: int = 1
    clip: float = 1.0
    weight_decay: float = 0.0
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        # Written so that nan is refused too; a clip of inf clips nothing.
        if not 0 < self.lr <= LARGEST_RATE or not self.clip > 0:
            raise InputError(
                f"lr and clip must be positive and lr at most 1e30, got {self.lr} and {self.clip}."
            )
        if self.warmup < 0 or not 0 <= self.weight_decay < math.inf:
            raise InputError(
                "warmup and weight_decay cannot be negative, and weight_decay is finite, "
                f"got {self.warmup} and {self.weight_decay}."
            )
        check_seed(self.seed)
        if self.schedule not in get_args(Schedule):
            raise InputError(f"Unknown schedule {self.schedule!r}: choose constant or cosine.")

    def lr_at(self, step: int) -> float:
        """Learning rate of step number ``step``, counted from 0."""
        return learning_rate(
            step, lr=self.lr, warmup=self.warmup, steps=self.steps, schedule=self.schedule
        )


def train(
    loss: TokenLoss,
    batch_at: Callable[[int], Tensor],
    config: LoopConfig,
    *,
    checkpoints: Checkpoints,
    log: Path,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Train the parameters that ask for gradients, from the newest checkpoint if there is one.

    Args:
        loss: the model, wrapped to give token losses.
        batch_at: batch number -> int64 ids [B, N]; it must depend on the number alone.
        config: how to train.
        checkpoints: where to continue from and save to.
        log: .jsonl file with one line per step; lines after the checkpoint are written again.
        progress: called after each step.

    Ctrl-C or SIGTERM ends the run after the step that it is in, with a checkpoint to resume from.

    Returns:
        One record per step: ``step`` (from 1), ``loss`` (nats per token), ``lr``, ``grad_norm``,
            ``tokens``, ``seconds``.

    Raises:
        RunError: a checkpoint could not be written, the loss is no longer finite, or the log lacks
            steps that the checkpoint has.
    """
    model = loss.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    precise = FullPrecision(trained)
    optimizer = torch.optim.AdamW(
        precise.copies.values(), lr=config.lr, weight_decay=config.weight_decay
    )
    torch.manual_seed(config.seed)
    start = _restore(checkpoints, precise, optimizer)
    records = [r for r in read_lines(log) if r["step"] <= start] if log.exists() else []
    if [r["step"] for r in records] != list(range(1, start + 1)):
        raise RunError(
            f"{log} lacks some of the {start} steps of the checkpoint in {checkpoints.folder}, so "
            "that their losses are lost. Put the file back, or remove that folder to train from "
            "the first step again."
        )
    log.parent.mkdir(parents=True, exist_ok=True)
    # Not emptied first: a run that is killed here still has its losses.
    write_text(log, "".join(json.dumps(r) + "\n" for r in records))

    model.train()
    with between_steps() as interrupted:
        for step in range(start, config.steps):
            record = _step(loss, batch_at, step, precise, optimizer, config)
            check_step(record["loss"], record["grad_norm"], step + 1, config.lr)
            records.append(record)
            # Asked once: what arrives later is for the next step.
            stop = interrupted()
            saving = stop or (step + 1) % config.save_every == 0 or step + 1 == config.steps
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                if saving:
                    # Without its steps in the log a checkpoint is refused.
                    file.flush()
                    os.fsync(file.fileno())
            if saving:
                checkpoints.save(step + 1, _state(precise, optimizer))
            speed = record["tokens"] / record["seconds"]
            progress(
                "training",
                step + 1,
                config.steps,
                f"loss {record['loss']:.3f}, {speed:,.0f} tokens/s",
            )
            if stop:
                raise KeyboardInterrupt
    model.eval()
    return records


def _step(
    loss: TokenLoss,
    batch_at: Callable[[int], Tensor],
    step: int,
    precise: FullPrecision,
    optimizer: torch.optim.AdamW,
    config: LoopConfig,
) -> dict[str, Any]:
    begin = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step)
    total, tokens = 0.0, 0
    for part in range(config.accumulate):
        ids_BN = batch_at(step * config.accumulate + part).to(loss.device)
        mean = loss(ids_BN).mean() / config.accumulate
        mean.backward()
        precise.add_gradients()
        total += mean.item()
        tokens += ids_BN.numel()
    norm = nn.utils.clip_grad_norm_(precise.copies.values(), config.clip).item()
    optimizer.step()
    precise.write()
    optimizer.zero_grad(set_to_none=True)
    return {
        "step": step + 1,
        "loss": total,
        "lr": config.lr_at(step),
        "grad_norm": norm,
        "tokens": tokens,
        "seconds": time.perf_counter() - begin,
    }


def _state(precise: FullPrecision, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    return {
        "parameters": {name: p.detach() for name, p in precise.copies.items()},
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(
    checkpoints: Checkpoints, precise: FullPrecision, optimizer: torch.optim.AdamW
) -> int:
    found = checkpoints.load()
    if found is None:
        return 0
    step, state = found
    if state["parameters"].keys() != precise.copies.keys():
        raise RunError(
            f"The checkpoint of step {step} in {checkpoints.folder} belongs to other trained "
            "parameters. "
            "Resume with the settings that the run was started with."
        )
    with torch.no_grad():
        for name, parameter in precise.copies.items():
            parameter.copy_(state["parameters"][name])
    precise.write()
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return step
