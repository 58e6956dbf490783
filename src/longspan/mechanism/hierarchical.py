"""Hierarchical attention: local attention, chunks pooled from its outputs, attention to those.

Related to Hi-Transformer (Wu et al. 2021, arXiv 2106.01040) and HAT (Chalkidis et al. 2022,
arXiv 2210.05529), which are two-sided encoders of sentences. As one attention:

    local_i = softmax(q_i k_j / sqrt(D)) v_j     j in the chunk of i, j <= i if causal
    R_c     = mean of local_i over chunk c       K_c = mean of k_i over chunk c
    o_i     = local_i + softmax(q_i K_c / sqrt(D)) R_c     c < i // C if causal, else every c

O(N C + N^2 / C) time; decoding keeps C + N / C keys and values. It differs from
``PooledChunkAttention`` in what a summary holds: outputs, which have looked around in their chunk.

One level of summaries covers the past: the own chunk token by token, every chunk before it by one
summary. Summaries that double in length with their distance, as in H-Transformer-1D (2107.11906),
are another method.

Queries stay tokens. Where published designs let a pooled query look at earlier chunks and hand
the result to all tokens of its chunk, early tokens learn of later ones; MEGABYTE (2305.07185)
avoids that with a shift by one chunk. Here no summary of an unfinished chunk is ever seen.

Axes: B batch, H query heads, K key heads, N rows, D head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longspan.mechanism.pooled import PooledChunkAttention, pooled_chunk_attention


def hierarchical_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int, **rest: Any) -> Any:
    """Local attention, and attention to chunks pooled from its outputs.

    Args:
        q: queries [B, H, N, D], not rotated.
        k: keys [B, K, N, D], not rotated; K divides H.
        v: values [B, K, N, Dv].
        chunk: C.
        rest: as for ``pooled_chunk_attention``.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, and with ``return_state`` the state.
    """
    return pooled_chunk_attention(q, k, v, chunk, of_outputs=True, **rest)


class HierarchicalAttention(PooledChunkAttention):
    """Multi-head hierarchical attention, x [B, N, d_model] to the same shape.

    Arguments are those of ``PooledChunkAttention``.
    """

    of_outputs = True
