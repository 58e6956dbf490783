"""Attention of transformers' own sparse models, without their projections, to compare with.

Axes: B batch, H heads, N rows, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longspan.errors import Refusal


class _Given(nn.Module):
    """Stands in for a projection and returns what it was given."""

    value: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return self.value


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _give(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Have the projections of a layer return what is given; gives query rows [1, N, H D]."""
    given = {name: _Given() for name in ("query", "key", "value")}
    for name, one in given.items():
        setattr(layer, name, one)

    def give(*tensors: Tensor) -> Tensor:
        for one, x_BHND in zip(given.values(), tensors, strict=True):
            one.value = x_BHND.transpose(1, 2).flatten(2)
        return given["query"].value

    return give


def longformer_layer(reach: int, n: int, heads: int) -> Attend:
    """Longformer's self-attention (Beltagy et al. 2020) over ``reach`` keys on either side.

    Args:
        reach: keys on either side of a query.
        n: rows, a multiple of ``2 * reach``.
        heads: query heads, and key heads.

    Returns:
        Function of q, k and v [1, H, N, D].

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
    give = _give(layer)

    def attend(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
        width = q_BHND.shape[3]
        layer.head_dim, layer.embed_dim = width, heads * width
        hidden = give(q_BHND, k_BHND, v_BHND)
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


def bigbird_layer(block: int, drawn: NDArray[Any], n: int, width: int) -> Attend:
    """BigBird's block-sparse self-attention (Zaheer et al. 2020) with given random blocks.

    Args:
        block: tokens of a block.
        drawn: random blocks of each block but the first and the last, [H, n / block - 2, r]; in
            place of its own, which may repeat and are absent in evaluation.
        n: rows, whole blocks.
        width: of a head.

    Returns:
        Function of q, k and v [1, H, N, D].

    Raises:
        Refusal: if the rows do not fit.
    """
    from transformers.models.big_bird.configuration_big_bird import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import (
        BigBirdBlockSparseAttention,
        BigBirdModel,
    )

    if n % block or n < 5 * block:
        raise Refusal(f"takes at least five whole blocks of {block}, got {n} rows")
    heads, _, count = drawn.shape
    config = BigBirdConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_hidden_layers=1,
        block_size=block,
        num_random_blocks=count,
        max_position_embeddings=n,
    )
    layer = BigBirdBlockSparseAttention(config).eval()
    give = _give(layer)
    turn = itertools.cycle(drawn)
    # The second one serves the lengths of the paper, a head at a time.
    layer._bigbird_block_rand_mask_with_head = lambda *_, **__: list(drawn)
    layer._bigbird_block_rand_mask = lambda *_, **__: next(turn)

    def attend(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
        hidden = give(q_BHND, k_BHND, v_BHND)
        tokens = hidden.new_ones(hidden.shape[:2])
        blocks, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(
            tokens, block
        )
        out = layer(hidden, band, rows, columns, blocks, blocks)[0]
        return out.unflatten(2, (heads, width)).transpose(1, 2)

    return attend
