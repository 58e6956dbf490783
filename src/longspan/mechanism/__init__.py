"""Attentions that are more than a mask: one paper, one file.

Layers are drop-in modules, ``longspan.mechanism.X(d_model, heads, ...)(x, mask=None)``; where a
mechanism has no parameters of its own there is a function on q, k, v [B, H, N, D] too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan._lazy import lazy

_HOME = {
    "AdaptiveSpan": "adaptive_span",
    "BigBirdAttention": "bigbird",
    "BlockGate": "block_gate",
    "DualChunk": "_dual_chunk_plan",
    "DualChunkAttention": "dual_chunk",
    "Favor": "performer",
    "FeatureMap": "feature_maps",
    "Hedgehog": "feature_maps",
    "HierarchicalAttention": "hierarchical",
    "LSHAttention": "lsh",
    "Laplace": "feature_maps",
    "LinearAttention": "linear",
    "Linformer": "linformer",
    "LongformerAttention": "longformer",
    "MoBA": "moba",
    "NSA": "nsa",
    "Nystromformer": "nystromformer",
    "Performer": "performer",
    "PooledChunkAttention": "pooled",
    "RoutingAttention": "routing",
    "Synthesizer": "synthesizer",
    "TopK": "topk",
    "adaptive_span_attention": "adaptive_span",
    "dual_chunk_attention": "dual_chunk",
    "hierarchical_attention": "hierarchical",
    "linear_attention": "linear",
    "linformer_attention": "linformer",
    "lsh_attention": "_lsh_attention",
    "moba_attention": "moba",
    "nystrom_attention": "nystromformer",
    "pooled_chunk_attention": "pooled",
    "published_bigbird_attention": "bigbird",
    "redraw": "performer",
    "routing_attention": "_routing_attention",
    "topk_attention": "topk",
}

__all__ = [
    "NSA",
    "AdaptiveSpan",
    "BigBirdAttention",
    "BlockGate",
    "DualChunk",
    "DualChunkAttention",
    "Favor",
    "FeatureMap",
    "Hedgehog",
    "HierarchicalAttention",
    "LSHAttention",
    "Laplace",
    "LinearAttention",
    "Linformer",
    "LongformerAttention",
    "MoBA",
    "Nystromformer",
    "Performer",
    "PooledChunkAttention",
    "RoutingAttention",
    "Synthesizer",
    "TopK",
    "adaptive_span_attention",
    "dual_chunk_attention",
    "hierarchical_attention",
    "linear_attention",
    "linformer_attention",
    "lsh_attention",
    "moba_attention",
    "nystrom_attention",
    "pooled_chunk_attention",
    "published_bigbird_attention",
    "redraw",
    "routing_attention",
    "topk_attention",
]

if TYPE_CHECKING:
    from longspan.mechanism._dual_chunk_plan import DualChunk
    from longspan.mechanism._lsh_attention import lsh_attention
    from longspan.mechanism._routing_attention import routing_attention
    from longspan.mechanism.adaptive_span import AdaptiveSpan, adaptive_span_attention
    from longspan.mechanism.bigbird import BigBirdAttention, published_bigbird_attention
    from longspan.mechanism.block_gate import BlockGate
    from longspan.mechanism.dual_chunk import DualChunkAttention, dual_chunk_attention
    from longspan.mechanism.feature_maps import FeatureMap, Hedgehog, Laplace
    from longspan.mechanism.hierarchical import HierarchicalAttention, hierarchical_attention
    from longspan.mechanism.linear import LinearAttention, linear_attention
    from longspan.mechanism.linformer import Linformer, linformer_attention
    from longspan.mechanism.longformer import LongformerAttention
    from longspan.mechanism.lsh import LSHAttention
    from longspan.mechanism.moba import MoBA, moba_attention
    from longspan.mechanism.nsa import NSA
    from longspan.mechanism.nystromformer import Nystromformer, nystrom_attention
    from longspan.mechanism.performer import Favor, Performer, redraw
    from longspan.mechanism.pooled import PooledChunkAttention, pooled_chunk_attention
    from longspan.mechanism.routing import RoutingAttention
    from longspan.mechanism.synthesizer import Synthesizer
    from longspan.mechanism.topk import TopK, topk_attention
else:
    __getattr__, __dir__ = lazy(__name__, _HOME)
