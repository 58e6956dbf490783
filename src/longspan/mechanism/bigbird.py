"""BigBird: neighbouring, global and random blocks of tokens.

Paper: Big Bird (Zaheer et al. 2020, arXiv 2007.14062), the block-sparse form with internal global
blocks. With blocks of b tokens, a row of block a sees

    blocks a - 1, a, a + 1; the first and the last; r random ones        and blocks first and last
                                                                         see everything

in one softmax. O(N b (5 + r) D) time. There is no causal form: the last block is seen by all rows,
and moves with the length.

How ours differs from the class in transformers, whose evaluation draws no random blocks but
counts the first block 1 + r times, and whose training may draw a block twice: random blocks are
drawn once by seed, each pair counts once, and training equals evaluation. Padding is absent (there
it shifts the last block), and any length is allowed. ``published=True`` computes what transformers
does.

Axes: B batch, H query heads, K key heads, N rows, D head width, T blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.mechanism.layer import MechanismLayer, check_heads, cleared, positions
from longspan.nn.attention import check
from longspan.ops import attend, merge
from longspan.pattern import Blocks, PerHead, bigbird

# [heads, blocks - 2, r]: random blocks of every block but the first and the last.
RandomMap = Sequence[Sequence[Sequence[int]]]


def published_bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    random_blocks: RandomMap,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """BigBird as transformers computes it, random blocks counted as often as they are listed.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, N, D]; K divides H.
        v: values [B, K, N, Dv].
        block: tokens of a block; divides N, which has at least five blocks.
        random_blocks: [H, N / block - 2, r] random blocks of each middle block; transformers
            takes zeros in evaluation.
        mask: True at tokens, False at padding [B, N]; blocks count padding.
        scale: factor on the logits; default ``D ** -0.5``.
        impl: kernel of ``attend``.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``; 0 at padding.

    Raises:
        InputError: if lengths do not fit.
    """
    check_heads(q, k, v, mask)
    heads, rows = q.shape[1:3]
    blocks = rows // block
    if rows % block or blocks < 5:
        raise InputError(
            f"the published form needs at least {5 * block} rows and a multiple of {block}, got "
            f"{rows}"
        )
    middle = range(1, blocks - 1)
    if len(random_blocks) != heads or any(len(own) != len(middle) for own in random_blocks):
        raise InputError(f"random_blocks must be [{heads}, {len(middle)}, random] block numbers")
    every = list(range(blocks))
    near = [sorted({0, blocks - 1, b - 1, b, b + 1}) for b in middle]
    patterns: list[Any] = [Blocks([every, *near, every], block)]  # pyright: ignore[reportArgumentType]
    # One pass for each draw: passes may meet a key again, and then it counts again.
    for draw in range(len(random_blocks[0][0])):
        maps = [[[], *([int(row[draw])] for row in own), []] for own in random_blocks]
        patterns.append(PerHead(*(Blocks(own, block) for own in maps)))  # pyright: ignore[reportArgumentType]
    place = torch.arange(rows, device=q.device)
    segments = None if mask is None else mask.to(torch.int64) - 1
    q, k, v = cleared(None if mask is None else mask.to(torch.bool), q, k, v)
    parts = [
        attend(
            q,
            k,
            v,
            pattern,
            positions=place,
            segments=segments,
            key_positions=place,
            key_segments=segments,
            scale=scale,
            return_lse=True,
            impl=impl,
        )
        for pattern in patterns
    ]
    return merge(parts)[0]


class BigBirdAttention(MechanismLayer):
    """Multi-head BigBird attention, x [B, N, d_model] to the same shape; two-sided only.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        block: tokens of a block b.
        random: random blocks r of each block.
        seed: chooses the random blocks.
        published: as transformers computes it: ``random_blocks`` of ``forward`` counted as
            often as they are listed, or the first block ``random`` times more, and blocks that
            count padding.
        causal: only False is possible.
        impl: kernel of ``longspan.attend``.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``rope``, ``bias``,
            ``project_output``, ``device``, ``dtype``.

    Raises:
        Refusal: for ``causal=True``.
    """

    no_causal_form = "every row sees the last block"

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        block: int = 64,
        random: int = 3,
        seed: int = 0,
        published: bool = False,
        causal: bool = False,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        if causal:
            self.refuse_causal()
        self.pattern = str(bigbird(block, random, seed=seed))
        self.block, self.random, self.published, self.impl = block, random, published, impl

    @classmethod
    def from_hf(cls, layer: Any, *, published: bool = False) -> BigBirdAttention:
        """Copy a ``BigBirdBlockSparseAttention`` of transformers: same weights.

        Args:
            layer: the module.
            published: also its outputs, with the first block counted 1 + r times in evaluation.
        """
        own = cls(
            layer.query.in_features,
            layer.num_attention_heads,
            head_dim=layer.attention_head_size,
            block=layer.block_size,
            random=layer.num_random_blocks,
            seed=layer.seed or 0,
            published=published,
            bias=layer.query.bias is not None,
            project_output=False,
            device=layer.query.weight.device,
            dtype=layer.query.weight.dtype,
        )
        own.load_state_dict(layer.state_dict())
        return own

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        random_blocks: RandomMap | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: tokens [B, N, d_model].
            mask: True at tokens, False at padding [B, N].
            random_blocks: [H, blocks - 2, r], only with ``published``.

        Returns:
            [B, N, d_model]. At padding the attention is 0.

        Raises:
            InputError: if shapes do not fit.
        """
        if random_blocks is not None and not self.published:
            raise InputError("random_blocks are drawn by seed; others need published=True")
        check(x, self.d_model, mask)
        valid = None if mask is None else mask.to(torch.bool)
        (x,) = cleared(valid, x)
        q, k, v = self.project(x, positions(x, valid))
        if not self.published:
            segments = None if valid is None else valid.to(torch.int64) - 1
            return self.join(attend(q, k, v, self.pattern, segments=segments, impl=self.impl))
        if random_blocks is None:
            middle = max(0, x.shape[1] // self.block - 2)
            random_blocks = [[[0] * self.random] * middle] * self.heads
        out = published_bigbird_attention(
            q, k, v, block=self.block, random_blocks=random_blocks, mask=valid, impl=self.impl
        )
        return self.join(out)

    def extra_repr(self) -> str:
        words = f"{super().extra_repr()}, pattern={self.pattern}"
        return f"{words}, published=True" if self.published else words
