"""Published patterns as compositions of atoms; each prints and parses as what it is made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longspan.errors import PatternError
from longspan.pattern.algebra import Pattern, flag, whole, wholes
from longspan.pattern.blocks import BandBlocks, EdgeBlocks
from longspan.pattern.chunk import Chunk
from longspan.pattern.global_tokens import Global
from longspan.pattern.local import Causal, Window
from longspan.pattern.random_keys import RandomBlocks
from longspan.pattern.strided import Diagonals, Dilated
from longspan.pattern.summaries import Summaries
from longspan.pattern.vary import PerHead, PerLayer


def longformer(
    window: int = 512,
    tokens: Sequence[int] = (),
    *,
    dilation: int | Sequence[int] = 1,
    causal: bool = False,
) -> Pattern:
    """Longformer (Beltagy et al. 2020, arXiv 2004.05150): window and global tokens, O(N w).

    Args:
        window: keys of the window in all, as Hugging Face's ``attention_window``; w / 2 to each
            side, or ``window`` to the past with ``causal``.
        tokens: positions of global tokens.
        dilation: gaps of the window; a list gives one to each equal run of heads.
        causal: nobody sees later tokens, global ones included.
    """
    step = tuple(dilation) if isinstance(dilation, Sequence | np.ndarray) else dilation
    local = Window(window, causal) if step == 1 else Dilated(window, step, causal)
    listed = wholes("longformer", "tokens", tokens, 0, may_be_empty=True)
    return local | Global(*listed, causal=causal) if listed else local


def bigbird(
    block: int = 64, random: int = 3, *, edges: int = 1, seed: int = 0, causal: bool = False
) -> Pattern:
    """BigBird (Zaheer et al. 2020, arXiv 2007.14062): near, global and random blocks, O(N b).

    Three neighbouring blocks, the first and the last block global, and random blocks apart from
    those. Random blocks are the same in training and evaluation. The causal form keeps the past
    half of each part; its global block is the first.

    Args:
        block: tokens in a block.
        random: random blocks for each query block.
        edges: global blocks at each end.
        seed: chooses the random blocks.
        causal: see above.
    """
    flag("bigbird", "causal", causal)
    parts = BandBlocks(block, ahead=0 if causal else 1)
    parts = parts | EdgeBlocks(block, first=edges, last=0 if causal else edges)
    if random:
        parts = parts | RandomBlocks(block, random, seed, apart=2, skip=edges, causal=causal)
    return parts & Causal() if causal else parts


def etc(radius: int = 84, tokens: int = 16) -> Pattern:
    """ETC (Ainslie et al. 2020, arXiv 2004.08483): global tokens first, long input behind, O(N w).

    Args:
        radius: long tokens see this many to each side.
        tokens: global tokens at the start; they see all and all see them.
    """
    radius, tokens = whole("etc", "radius", radius, 0), whole("etc", "tokens", tokens, 1)
    return Window(2 * radius + 1, causal=False) | Global(*range(tokens))


def sparse_transformer(
    stride: int = 128, *, kind: str = "strided", summary: int = 8, heads: str = "union"
) -> Pattern:
    """Sparse Transformer (Child et al. 2019, arXiv 1904.10509), O(N sqrt N) for stride sqrt N.

    ``strided``: the last ``stride`` tokens, and every ``stride``-th one back from the query.
    ``fixed``: the query's own block of ``stride`` tokens, and the last ``summary`` tokens of every
    block. The paper's window holds one token more than its code's; this is the code's.

    Args:
        stride: l.
        kind: ``"strided"`` or ``"fixed"``.
        summary: c, for ``fixed``.
        heads: ``"union"`` of both parts in each head, or ``"split"``: one part in the first half
            of the heads, the other in the second.

    Raises:
        PatternError: for any other word.
    """
    if kind not in ("strided", "fixed") or heads not in ("union", "split"):
        raise PatternError(
            'sparse_transformer: kind must be "strided" or "fixed" and heads "union" or "split", '
            f"got {kind!r} and {heads!r}"
        )
    if kind == "strided":
        near, far = Window(stride), Diagonals(stride)
    else:
        near, far = Chunk(stride), Summaries(stride, summary)
    return near | far if heads == "union" else PerHead(near, far)


def swin(window: int) -> Pattern:
    """Swin in one dimension (Liu et al. 2021, arXiv 2103.14030): shifted windows, O(N w).

    Even layers attend inside windows of ``window`` tokens, odd layers inside windows moved by half
    of that; the cut-off windows at both ends stand alone.
    """
    return PerLayer(Chunk(window, causal=False), Chunk(window, offset=window // 2, causal=False))
