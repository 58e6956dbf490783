"""What a pretraining run did, as ``pretrain.json`` beside the weights holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longspan.eval.perplexity import exp

REPORT_NAME = "pretrain.json"

# (step, train, validation loss)
History = list[tuple[int, float, float | None]]


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
