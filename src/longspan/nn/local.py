"""A one-head layer over a two-sided window, to drop in for its masked O(N^2) form.

    y_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j        over |i - j| <= window_size // 2

No output projection, so a state dict of the plain form (``query``, ``key``, ``value``, each with
bias) loads and gives the same output, at O(N w d) instead of O(N^2 d).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.nn.attention import check, cleared, join
from longspan.ops import attend
from longspan.pattern import Pattern, Window


class OneHead(nn.Module):
    """One head over a pattern, without output projection, x [B, N, d_model] to the same shape."""

    def __init__(self, d_model: int, pattern: Pattern, **place: Any) -> None:
        super().__init__()
        if not isinstance(d_model, int) or d_model < 1:
            raise InputError(f"d_model must be a whole number of at least 1, got {d_model!r}")
        self.d_model, self.pattern = d_model, pattern
        self.query = nn.Linear(d_model, d_model, **place)
        self.key = nn.Linear(d_model, d_model, **place)
        self.value = nn.Linear(d_model, d_model, **place)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens [B, N, d_model].
            mask: True (or 1) at tokens and False (or 0) at padding, [B, N].

        Returns:
            [B, N, d_model]; 0 at padding.
        """
        check(x, self.d_model, mask)
        segments = join(x, mask, None)
        (x,) = cleared(None if mask is None else mask.to(torch.bool), x)
        q, k, v = (project(x)[:, None] for project in (self.query, self.key, self.value))
        return attend(q, k, v, self.pattern, segments=segments)[:, 0]

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}"


class LocalAttention(OneHead):
    """Attention of one head to the tokens within half a window on both sides, and to itself.

    Args:
        d_model: width of the tokens.
        window_size: tokens with ``|i - j| <= window_size // 2`` see each other.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self, d_model: int, window_size: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(d_model, Window(window_size, causal=False), device=device, dtype=dtype)
        self.window_size = window_size
