"""What decides a pretraining run besides its text, as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longspan.errors import InputError
from longspan.eval.seed import check_seed
from longspan.hf.models import check_device
from longspan.train.finite import LARGEST_RATE
from longspan.train.schedule import learning_rate


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

    def lr_at(self, step: int) -> float:
        """Learning rate of step number ``step``, counted from 0."""
        return learning_rate(
            step, lr=self.lr, warmup=self.warmup, steps=self.steps, schedule="cosine"
        )
