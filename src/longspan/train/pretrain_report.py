"""What a pretraining run did, as ``pretrain.json`` beside the weights holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from longspan.errors import DataError
from longspan.eval.perplexity import exp

REPORT_NAME = "pretrain.json"

# (step, train, validation loss)
History = list[tuple[int, float, float | None]]


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """What a run did; losses in nats per token.

    Attributes:
        config: of the run.
        parameters: weights of the model.
        train_tokens: tokens of the training text.
        tokens_seen: tokens trained on.
        seconds: that the run took, with its measurements and checkpoints.
        train_loss: of the last batch, under the float32 weights that were trained.
        validation_loss: under the same weights after the last step; None without such text.
        heldout_loss: of the weights that were written, which are those rounded to bfloat16; None
            without such text.
        history: (step, train loss, validation loss) on the way.
        goals: (steps done before, steps in all) of each number of steps that was asked for: the
            cosine of the learning rate belongs to one of them.
    """

    config: dict[str, Any]
    parameters: int
    train_tokens: int
    tokens_seen: int
    seconds: float
    train_loss: float
    validation_loss: float | None
    heldout_loss: float | None
    history: History
    goals: list[tuple[int, int]]

    @property
    def steps(self) -> int:
        """Steps after which the run was finished."""
        return self.config["steps"]

    @property
    def heldout_perplexity(self) -> float | None:
        """Perplexity on the held-out text in separate windows of the trained context."""
        return None if self.heldout_loss is None else exp(self.heldout_loss)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "heldout_perplexity": self.heldout_perplexity}


def read_report(out: Path) -> PretrainReport | None:
    """The report of the run that was finished in ``out``; None if none was.

    Raises:
        DataError: the file is no such report.
    """
    path = out / REPORT_NAME
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        values = {field.name: held[field.name] for field in fields(PretrainReport)}
        for name in ("history", "goals"):
            values[name] = [tuple(row) for row in values[name]]
        report = PretrainReport(**values)
        if type(report.steps) is not int:
            raise ValueError(f"steps {report.steps!r}")
        return report
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is no report of this version of longspan pretrain ({type(error).__name__}: "
            f"{error}), so the run cannot be resumed. Start in a new folder."
        ) from error


def finished_report(out: Path, steps: int) -> PretrainReport | None:
    """The report in ``out`` if nothing is left to do there for so many steps."""
    report = read_report(out)
    return report if report is not None and report.steps == steps else None
