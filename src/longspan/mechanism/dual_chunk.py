"""Dual Chunk Attention: every key, at distances that a model was trained for.

Paper: Training-Free Long-Context Scaling of Large Language Models (An et al. 2024, arXiv
2402.17463; ChunkLlama, Qwen2.5-1M). Chunks of s tokens, local window w, c = s + w. A key stands
at j mod s for ever; a query in three places, by how many chunks its key lies back:

    intra       0 back     i mod s
    successive  1 back     min(s + i mod s, c - 1)
    inter       2 or more  c - 1

and one softmax over all j <= i. Distances stay within [0, c - 1] and are exact inside a chunk and
up to w back; for N <= s it is plain RoPE attention. Nothing is skipped: O(N^2 D) time as in dense
attention, O(N) memory: three passes, each with its rotation of the queries, merged by
log-sum-exp. (``PooledChunkAttention`` is the other mechanism that goes by this name.)

The authors' code names the sizes otherwise, see ``DualChunk.from_code``. On top of both: GQA
without copies, padding and packed documents (positions count inside a segment), gradients through
the merge. Temperature: both code bases use the length of the whole sequence for every row, so
that decoding differs from prefill; here each query uses its own length, unless one is fixed.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.mechanism._dual_chunk_plan import (
    DualChunk,
    DualChunkPlan,
    lay_out,
    plain_plan,
    tokens,
)
from longspan.mechanism._past import PastLayer
from longspan.mechanism.layer import cleared
from longspan.nn.attention import frequencies
from longspan.nn.rotary import rotate
from longspan.ops import attend, merge
from longspan.position import Frequencies


def attend_in_passes(
    queries: Callable[[int], Tensor],
    k: Tensor,
    v: Tensor,
    laid: DualChunkPlan,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """The passes of a plan, merged.

    Args:
        queries: gives the queries [B, H, N, D] rotated for the pass of a number.
        k: keys [B, K, M, D], each rotated to its position modulo the chunk.
        v: values [B, K, M, Dv].
        laid: from ``lay_out``.
        scale: factor on the logits; default ``D ** -0.5``.
        impl: kernel of ``attend``.
    """
    parts = []
    for index, (one, _) in enumerate(laid.passes):
        q = queries(index)
        if laid.factor is not None:
            q = q * laid.table("factor", q.device).to(q.dtype)[:, None, :, None]
        parts.append(attend(q, k, v, one, scale=scale, return_lse=True, impl=impl))
    return merge(parts)[0]


def dual_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: DualChunk,
    *,
    rope: float | Frequencies = 10000.0,
    scale: float | None = None,
    impl: str = "auto",
    **rows: Any,
) -> Tensor:
    """Dual Chunk Attention of queries and keys that are *not* rotated yet.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, M, D]; K divides H. With N < M the queries are the last rows.
        v: values [B, K, M, Dv].
        config: sizes.
        rope: base of the rotary embedding, or frequencies from ``longspan.position``.
        scale: factor on the logits; default ``D ** -0.5``.
        impl: kernel of ``attend``.
        rows: ``positions``, ``segments``, ``key_positions``, ``key_segments`` as for ``attend``,
            in numpy or lists.

    Returns:
        [B, H, N, Dv] in the dtype of ``q``.

    Raises:
        LongspanError: a child that says what does not fit.
    """
    turns = _turns(rope, q.shape[-1])
    inv_freq, factor = torch.from_numpy(turns.inv_freq), turns.attention_factor
    lay = lay_out if rows else plain_plan
    laid = lay(config, q.shape[2], q.shape[1], keys=k.shape[2], **rows)
    if rows:
        of_q, of_k = (torch.from_numpy(x) for x in tokens(q.shape[2], k.shape[2], **rows))
        (q,), (k, v) = cleared(of_q.to(q.device), q), cleared(of_k.to(k.device), k, v)

    def queries(index: int) -> Tensor:
        return rotate(q, laid.table(index, q.device), inv_freq, factor)

    k = rotate(k, laid.table("key_place", k.device), inv_freq, factor)
    return attend_in_passes(queries, k, v, laid, scale=scale, impl=impl)


class DualChunkAttention(PastLayer):
    """Multi-head Dual Chunk Attention, x [B, N, d_model] to the same shape; causal only.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        chunk: s.
        local: w.
        temperature: as ``DualChunk``.
        trained: as ``DualChunk``.
        length: as ``DualChunk``.
        rope: base of the rotary embedding, or frequencies from ``longspan.position``.
        impl: kernel of ``longspan.attend``.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``bias``, ``device``, ``dtype``.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        chunk: int,
        local: int,
        temperature: str = "none",
        trained: int | None = None,
        length: int | None = None,
        rope: float | Frequencies = 10000.0,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        # The base class would rotate queries and keys to where they stand.
        self.frequencies = _turns(rope, self.head_dim)
        # Not a buffer: model.bfloat16() would round the frequencies to eight bits.
        self._inv_freq = torch.from_numpy(self.frequencies.inv_freq)
        self.impl = impl
        self.config = DualChunk(
            chunk=chunk, local=local, temperature=temperature, trained=trained, length=length
        )

    def ask(self, x: Tensor, place: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        # The base class rotates nothing, so it needs no places. Keys are rotated once, for ever.
        q, k, v = self.project(x, place)
        return (q,), (self._turn(k, place % self.config.chunk), v)

    def answer(
        self,
        asked: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        place: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        (q,), (k, v) = asked, kept
        if valid is None and not torch.compiler.is_compiling():
            # A plan is kept for the next call of the same length.
            laid = plain_plan(self.config, q.shape[2], self.heads, keys=k.shape[2])

            def queries(index: int) -> Tensor:
                return self._turn(q, laid.table(index, q.device))

            return attend_in_passes(queries, k, v, laid, impl=self.impl)
        key_place = torch.arange(k.shape[2], device=k.device)
        segments = key_segments = None
        if valid is not None:
            # Tokens stand in front of the padding.
            key_segments = (key_place < valid.sum(dim=-1, keepdim=True)).to(torch.int64) - 1
            segments, place = place.clamp_max(0), place.clamp_min(0)
        if self.config.rate:
            # Whole numbers over whole numbers would be float32, also for float64.
            exact = place.to(torch.promote_types(q.dtype, torch.float32))
            heat = (1 + self.config.rate * self.config.growth(exact).log()) ** 2
            q = q * heat.to(q.dtype)[:, None, :, None]
        parts = [
            attend(
                self._turn(q, target),
                k,
                v,
                pattern,
                positions=at,
                segments=segments,
                key_positions=key_place + back * self.config.chunk,
                key_segments=key_segments,
                return_lse=True,
                impl=self.impl,
            )
            for back, (pattern, at, target) in enumerate(self.config.passes(place))
        ]
        return merge(parts)[0]

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        return rotate(x, place, self._inv_freq, self.frequencies.attention_factor)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


def _turns(rope: float | Frequencies, head_dim: int) -> Frequencies:
    found = frequencies(rope, head_dim)
    if found is None:
        raise InputError("Dual Chunk Attention moves positions: rope must be given, got None")
    return found
