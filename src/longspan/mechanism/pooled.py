"""Pooled chunk attention: exact inside a chunk, summaries of the other chunks.

Of this library, for "dual chunk attention" as often described in words (the published mechanism
of that name is ``DualChunkAttention``). Chunks of C tokens, pooled keys and values K_c and V_c:

    intra_i = softmax(q_i k_j / sqrt(D)) v_j,   j in the chunk of i, j <= i if causal
    inter_i = softmax(q_i K_c / sqrt(D)) V_c,   c < i // C if causal, else c != i // C
    sum     o_i = intra_i + inter_i
    joint   one softmax over tokens and summaries; with ``count_bias`` a summary weighs as many
            tokens as it stands for, and keys that are equal inside each chunk give full attention

O(N C + N^2 / C) time, O(N^1.5) at C = sqrt(N); decoding keeps C + N / C keys and values. With
``sum``, constant values double from the first chunk to the second: prefer ``joint`` for new
models.

Relatives: LongT5's transient global attention (arXiv 2112.07916; joint, two-sided, a window
instead of chunks), Poolingformer (2105.04371; sum), NSA's compression branch (2502.11089). Several
public forms let a row see the summary of its own unfinished chunk, or pool queries: both show it
the future. Here a row sees chunks that ended before its own began. Keys are pooled before rotation
(pooling rotated keys wipes out high frequencies), and the summary is rotated to the middle of its
chunk.

Axes: B batch, H query heads, K key heads, N rows, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.mechanism._summaries import Summaries
from longspan.mechanism._summary_state import SummaryState
from longspan.mechanism.layer import (
    MechanismLayer,
    at_least_one,
    check_heads,
    check_state,
    cleared,
)
from longspan.nn.attention import check, frequencies
from longspan.ops import merge
from longspan.position import Frequencies

COMBINE = ("sum", "joint")


def pooled_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: int,
    *,
    causal: bool = True,
    combine: str = "sum",
    count_bias: bool = False,
    pool: Tensor | None = None,
    rope: float | Frequencies | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    state: SummaryState | None = None,
    return_state: bool = False,
    impl: str = "auto",
    of_outputs: bool = False,
) -> Any:
    """Attention to the own chunk and to summaries of the others.

    Args:
        q: queries [B, H, N, D], not rotated.
        k: keys [B, K, N, D], not rotated; K divides H.
        v: values [B, K, N, Dv].
        chunk: C.
        causal: only earlier tokens of the chunk, and chunks before it.
        combine: ``sum`` or ``joint``.
        count_bias: ``joint`` only: add the logarithm of a chunk's tokens to its logit.
        pool: [K, D], learned queries that weigh the tokens of a chunk; None: their mean.
        rope: base of a rotary embedding or frequencies from ``longspan.position``; None: none.
        mask: True at tokens, False at padding [B, N].
        scale: factor on the logits; default ``D ** -0.5``.
        state: continue after earlier rows (causal only).
        return_state: also return the state after these rows (causal only).
        impl: kernel of ``attend``.
        of_outputs: the hierarchical form, see ``hierarchical_attention``.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, and with ``return_state`` the state.

    Raises:
        InputError: if shapes or options do not fit.
    """
    check_heads(q, k, v, mask)
    _check(chunk, causal, combine, count_bias, state is not None or return_state)
    turns = frequencies(rope, q.shape[-1])
    how = Summaries(
        chunk=chunk,
        causal=causal,
        of_outputs=of_outputs,
        inv_freq=None if turns is None else torch.from_numpy(turns.inv_freq),
        factor=1.0 if turns is None else turns.attention_factor,
        pool=pool,
        scale=scale,
        impl=impl,
    )
    valid = None if mask is None else mask.to(torch.bool)
    out, after = _combined(how, q, k, v, valid, state, return_state, combine, count_bias)
    return (out, after) if return_state else out


class PooledChunkAttention(MechanismLayer):
    """Multi-head pooled chunk attention, x [B, N, d_model] to the same shape.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        chunk: C, 64 to 128.
        causal: row i sees tokens up to i.
        combine: ``sum`` or ``joint``.
        count_bias: ``joint`` only: a summary weighs as many tokens as it stands for.
        pool: ``mean``, or ``learned`` weights of the tokens of a chunk, which start as the mean.
        rope: base of a rotary embedding or frequencies from ``longspan.position``; None: none.
        impl: kernel of ``longspan.attend``.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``bias``, ``device``, ``dtype``.
    """

    of_outputs = False

    near_dense: ClassVar[Mapping[str, Any]] = {"combine": "joint", "count_bias": True}

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        chunk: int,
        causal: bool = True,
        combine: str = "sum",
        count_bias: bool = False,
        pool: str = "mean",
        rope: float | Frequencies | None = None,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        _check(chunk, causal, combine, count_bias, False)
        if pool not in ("mean", "learned"):
            raise InputError(f"pool must be mean or learned, got {pool!r}")
        self.chunk, self.causal, self.impl = chunk, causal, impl
        self.combine, self.count_bias = combine, count_bias
        # The base class would rotate keys before they are pooled.
        turns = frequencies(rope, self.head_dim)
        self.factor = 1.0 if turns is None else turns.attention_factor
        self._inv_freq = None if turns is None else torch.from_numpy(turns.inv_freq)
        self.pool = None
        if pool == "learned":
            self.pool = nn.Parameter(torch.zeros(self.kv_heads, self.head_dim, **self.place))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        state: SummaryState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attend.

        Args:
            x: tokens [B, N, d_model]; with a state, those after it.
            mask: True at tokens, False at padding [B, N].
            state: of the tokens before.
            return_state: also return the state after ``x``.

        Returns:
            [B, N, d_model], and with ``return_state`` the state.
        """
        check(x, self.d_model, mask)
        _check(self.chunk, self.causal, self.combine, False, state is not None or return_state)
        how = Summaries(
            chunk=self.chunk,
            causal=self.causal,
            of_outputs=self.of_outputs,
            inv_freq=self._inv_freq,
            factor=self.factor,
            pool=self.pool,
            impl=self.impl,
        )
        valid = None if mask is None else mask.to(torch.bool)
        (x,) = cleared(valid, x)
        # The base class rotates nothing, so it needs no places.
        q, k, v = self.project(x, x)
        rest = (self.combine, self.count_bias)
        out, after = _combined(how, q, k, v, valid, state, return_state, *rest)
        return (self.join(out), after) if return_state else self.join(out)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chunk={self.chunk}, combine={self.combine!r}"


def _combined(
    how: Summaries,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    state: SummaryState | None,
    keep: bool,
    combine: str,
    count_bias: bool,
) -> tuple[Tensor, SummaryState | None]:
    check_state(state, SummaryState, "open_key", *k.shape[:2])
    q, k, v = cleared(valid, q, k, v)
    local, far, after = how.attend(q, k, v, valid, state, keep)
    if combine == "joint":
        parts = [local]
        for (out, lse), tokens in far:
            if count_bias:
                lse = lse + torch.as_tensor(tokens, device=lse.device).to(lse).log()
            parts.append((out, lse))
        return merge(parts)[0], after
    return (local[0] + merge([part for part, _ in far])[0] if far else local[0]), after


def _check(chunk: int, causal: bool, combine: str, count_bias: bool, stateful: bool) -> None:
    at_least_one(chunk=chunk)
    if combine not in COMBINE:
        raise InputError(f"combine must be sum or joint, got {combine!r}")
    if count_bias and combine != "joint":
        raise InputError("count_bias shares one softmax out: it needs combine='joint'")
    if stateful and not causal:
        raise InputError("a state exists only for causal=True")
