"""Training batches by number: real text, and synthetic text in which values must be recalled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.train.data import Sampler, tokenize_documents
from longspan.train.recall import recall_documents
from longspan.train.settings import ExtendSettings


class Batches:
    """Batch number -> int64 [batch, length]; depends on the number and the settings alone."""

    def __init__(self, s: ExtendSettings, text: Sequence[Tensor], tokenizer: Any) -> None:
        self._size, self._share = s.batch, s.recall_share
        self._text = Sampler(text, s.length, seed=s.loop.seed)
        self._recall = None
        if s.recall_share:
            # Documents up to about a context long, so that values are recalled over the whole of
            # it.
            count = max(64, round(s.loop.steps * s.loop.accumulate * s.batch * s.recall_share))
            documents = recall_documents(s.loop.seed, count, max_chars=2 * s.length)
            tokens = tokenize_documents(tokenizer, documents)
            self._recall = Sampler(tokens, s.length, seed=s.loop.seed)

    def __call__(self, number: int) -> Tensor:
        """Batch ``number`` >= 0."""
        return torch.stack([self._row(number * self._size + i) for i in range(self._size)])

    def _row(self, index: int) -> Tensor:
        recalled = int(index * self._share)
        if self._recall is not None and int((index + 1) * self._share) > recalled:
            return self._recall.sequence(recalled)
        return self._text.sequence(index - recalled)
