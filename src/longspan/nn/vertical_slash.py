"""A one-head layer over a window and global tokens: a diagonal band and a few full columns.

    y_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j
    over  |i - j| <= window_size // 2   or  j in G  or  i in G

O(N (w + |G|) d) instead of O(N^2 d). No output projection, as in ``LocalAttention``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from longspan.errors import InputError
from longspan.nn.local import OneHead
from longspan.pattern import Global, Pattern, Window


class VerticalSlashAttention(OneHead):
    """Attention of one head to the tokens near by and to global tokens, which see all.

    Args:
        d_model: width of the tokens.
        window_size: tokens with ``|i - j| <= window_size // 2`` see each other.
        global_tokens: positions of the global tokens, or how many at the start are global.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        window_size: int,
        global_tokens: int | Sequence[int] = 1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if isinstance(global_tokens, int):
            if global_tokens < 0:
                raise InputError(f"global_tokens must not be negative, got {global_tokens}")
            global_tokens = range(global_tokens)
        if not isinstance(global_tokens, Iterable):
            raise InputError(
                f"global_tokens must be positions, or how many there are, got {global_tokens!r}"
            )
        places = tuple(global_tokens)
        pattern: Pattern = Window(window_size, causal=False)
        if places:
            pattern = pattern | Global(*places)
        super().__init__(d_model, pattern, device=device, dtype=dtype)
        self.window_size, self.global_tokens = window_size, places
