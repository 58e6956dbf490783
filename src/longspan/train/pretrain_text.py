"""The text of a pretraining run: training batches by number, and sequences to measure on.

Axes: B sequences of a batch, L tokens of a sequence (the context + 1: every position predicts),
n sequences of evaluation text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.train.data import (
    Document,
    Sampler,
    recall_documents,
    tokenize_documents,
    windows,
)
from longspan.train.prepare import text_hash
from longspan.train.pretrain_config import PretrainConfig


class PretrainText:
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


def eval_sequences(documents_T: Sequence[Tensor], length: int) -> Tensor | None:
    """Evaluation text side by side, int64 [n, length]; None where there is none."""
    return windows(documents_T, length, seed=None) if documents_T else None
