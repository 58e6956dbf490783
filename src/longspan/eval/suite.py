"""What says whether a longer context is usable: perplexity and passkey retrieval, resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.eval.losses import TokenLoss
from longspan.eval.passkey import check_passkey, passkey, probe
from longspan.eval.perplexity import evenly, perplexity
from longspan.eval.progress import Progress, prefixed, silent
from longspan.eval.records import Records
from longspan.eval.seed import check_seed


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What to measure.

    Attributes:
        lengths: context lengths in tokens, for perplexity and passkey; none: whoever runs the
            suite chooses.
        sequences: windows of the longest length, spread evenly over the held-out text; shorter
            lengths score the same text.
        depths: places of the passkey, 0 (start) to 1 (end).
        trials: passkey probes per length and depth; 0 leaves the passkey out.
        style: wording of the passkey, ``prose`` or ``code``.
        seed: chooses keys and filler.
    """

    lengths: tuple[int, ...] = ()
    sequences: int = 8
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 4
    style: str = "prose"
    seed: int = 0

    def __post_init__(self) -> None:
        if any(length < 2 for length in self.lengths):
            raise InputError(f"Evaluation lengths must be 2 tokens or more, got {self.lengths}.")
        if self.sequences < 1 or self.trials < 0:
            raise InputError(
                f"Evaluation needs at least one sequence and no negative number of trials, "
                f"got {self.sequences} and {self.trials}."
            )
        check_seed(self.seed)
        if self.trials:
            check_passkey(self.depths, self.trials, self.style)

    def check_passkey(self, tokenizer: Any) -> None:
        """Raise DataError now if the shortest length cannot hold a passkey probe."""
        if self.trials:
            probe(
                tokenizer, min(self.lengths), self.depths[0], 0, style=self.style, seed=self.seed
            )


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    text: Sequence[Tensor],
    config: SuiteConfig,
    *,
    folder: Path,
    name: str,
    identity: Mapping[str, Any],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure one state of a model; what its record files in ``folder`` already hold is not
    measured again.

    Args:
        model: the model, its attention and position scaling set as they are to be measured.
        tokenizer: its tokenizer.
        text: int64 token ids of held-out documents.
        config: what to measure.
        folder: where the records lie.
        name: of this state of the model.
        identity: all that the state depends on, compared when records are continued.
        progress: called after each piece of work.

    Returns:
        ``{"perplexity": ..., "passkey": ... or None}`` as ``perplexity`` and ``passkey`` give
        them.
    """
    model.eval()
    loss = TokenLoss(model)
    settings = {**asdict(config), **identity, "name": name}
    windows = spread(text, max(config.lengths), config.sequences)

    measured: dict[str, Any] = {
        "perplexity": perplexity(
            loss,
            windows,
            config.lengths,
            records=Records(folder / f"{name}.perplexity.jsonl", settings),
            progress=prefixed(name, progress),
        ),
        "passkey": None,
    }
    if config.trials:
        measured["passkey"] = passkey(
            loss,
            tokenizer,
            config.lengths,
            config.depths,
            trials=config.trials,
            style=config.style,
            seed=config.seed,
            records=Records(folder / f"{name}.passkey.jsonl", settings),
            progress=prefixed(name, progress),
        )
    return measured


def spread(text: Sequence[Tensor], length: int, count: int) -> list[Tensor]:
    """At most ``count`` pieces of ``length`` tokens each, evenly over all the text.

    No piece crosses from one document into another, unless too few documents are long enough;
    then the text is cut as if it were one document.

    Args:
        text: int64 token ids of documents.
        length: tokens of a piece.
        count: pieces wanted; fewer where the text is too short.
    """
    pieces = _cut(text, length)
    if len(pieces) < count:
        pieces = _cut([torch.cat(list(text))], length)
    return evenly(pieces, count)


def _cut(text: Sequence[Tensor], length: int) -> list[Tensor]:
    return [
        document[start : start + length]
        for document in text
        for start in range(0, len(document) - length + 1, length)
    ]
