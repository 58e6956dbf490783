"""Attention of transformers' own sparse models, without their projections, to compare with.

Axes: B batch, H query heads, K key heads, N rows, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longspan.errors import Refusal


class _Given(nn.Module):
    """Stands in for a projection and returns what it was given."""

    value: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return self.value


def longformer_layer(
    reach: int, n: int, heads: int, key_heads: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Longformer's self-attention (Beltagy et al. 2020) over ``reach`` keys on either side.

    Args:
        reach: keys on either side of a query.
        n: rows, a multiple of ``2 * reach``.
        heads: query heads.
        key_heads: key heads; repeated, as the layer knows no groups.

    Returns:
        Function of q [1, H, N, D], k and v [1, K, N, D].

    Raises:
        Refusal: if the rows do not fit.
    """
    from transformers.models.longformer.configuration_longformer import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    if reach < 1 or n % (2 * reach):
        raise Refusal(f"takes multiples of twice the reach, {2 * reach}, got {n}")
    config = LongformerConfig(
        hidden_size=heads,
        num_attention_heads=heads,
        num_hidden_layers=1,
        attention_window=[2 * reach],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, layer_id=0)
    given = {name: _Given() for name in ("query", "key", "value")}
    for name, one in given.items():
        setattr(layer, name, one)

    def attend(q_BHND: Tensor, k_BKND: Tensor, v_BKND: Tensor) -> Tensor:
        width = q_BHND.shape[3]
        layer.head_dim, layer.embed_dim = width, heads * width
        group = heads // key_heads
        hidden = q_BHND.transpose(1, 2).flatten(2)
        given["query"].value = hidden
        for name, x in (("key", k_BKND), ("value", v_BKND)):
            given[name].value = x.repeat_interleave(group, 1).transpose(1, 2).flatten(2)
        mask = torch.zeros(hidden.shape[:2], device=hidden.device, dtype=hidden.dtype)
        nothing = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        (out, *_) = layer(
            hidden,
            attention_mask=mask,
            is_index_masked=nothing,
            is_index_global_attn=nothing,
            is_global_attn=False,
        )
        return out.unflatten(2, (heads, width)).transpose(1, 2)

    return attend
