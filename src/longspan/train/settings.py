"""What an extension does, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.errors import InputError
from longspan.eval.suite import SuiteConfig
from longspan.hf.models import check_device
from longspan.position import LongFactors
from longspan.train.loop import LoopConfig


@dataclass(frozen=True, kw_only=True)
class ExtendSettings:
    """What an extension does; everything that its numbers depend on.

    Attributes:
        model: local folder of a causal language model.
        length: context to extend to, in tokens.
        pattern: text of the attention pattern to train with, or ``none`` for the model's own dense
            attention.
        rope: position scaling: none, linear, ntk, dynamic, yarn, llama3, longrope.
        rope_factors: for longrope, its two lists; None: those that the model has already.
        data: files or folders with training text.
        python_stdlib: train on this Python's standard library (modules of its own are held out).
        eval_data: held-out text; without it the last tenth of the training text is held out.
        recall_share: share of the sequences that is synthetic text in which values must be
            recalled.
        loop: how to train.
        batch: sequences per batch.
        rank: of the LoRA matrices.
        alpha: their scale; the update is multiplied by alpha / rank.
        embeddings_and_norms: also train embeddings and norms, as LongLoRA does.
        gradient_checkpointing: recompute each layer in the backward to save memory.
        suite: what to measure.
        eval_attention: measure with the model's own ``dense`` attention, or with the ``pattern``.
        compare_dense: train the same recipe with dense attention too, and report both.
        dtype: of the weights.
        device: ``cpu``, ``cuda``, ...
    """

    model: str
    length: int
    pattern: str
    loop: LoopConfig
    suite: SuiteConfig
    rope: str = "yarn"
    rope_factors: LongFactors | None = None
    data: tuple[str, ...] = ()
    python_stdlib: bool = False
    eval_data: tuple[str, ...] = ()
    recall_share: float = 0.0
    batch: int = 1
    rank: int = 8
    alpha: float = 16.0
    embeddings_and_norms: bool = True
    gradient_checkpointing: bool = False
    eval_attention: str = "dense"
    compare_dense: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.rank < 1 or not self.alpha > 0:
            raise InputError(
                f"batch and rank must be at least 1 and alpha positive, "
                f"got {self.batch}, {self.rank} and {self.alpha}."
            )
        if not 0 <= self.recall_share < 1:
            raise InputError(f"recall_share must be in [0, 1), got {self.recall_share}.")
        if self.eval_attention not in ("dense", "pattern"):
            raise InputError(
                f"eval_attention must be dense or pattern, got {self.eval_attention!r}."
            )
        check_device(self.device)
