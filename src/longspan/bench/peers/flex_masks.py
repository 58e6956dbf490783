"""Masks for FlexAttention, written by hand as its documentation would write them.

    mask_mod(batch, head, query, key) -> whether the pair is seen

As in every pattern of ours a causal query that sees nothing keeps itself. A mask that depends on
the head costs FlexAttention lists of tiles for each head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.pattern import (
    SDA,
    SSA,
    Causal,
    Chunk,
    Dilated,
    Neighborhood,
    Or,
    Pattern,
    ShiftedChunk,
    Sink,
    Strided,
    Window,
)
from longspan.pattern.scca import SCCAFixed, SCCAFlow
from longspan.pattern.sda import SDANeighborhood

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@singledispatch
def mask_of(pattern: Pattern, heads: int, n: int) -> tuple[MaskMod, bool]:
    """The mask of a pattern, and whether heads differ.

    Args:
        pattern: what is seen.
        heads: query heads.
        n: tokens.

    Raises:
        Refusal: no mask is written for this pattern.
    """
    del heads, n
    raise Refusal(f"no mask is written for {pattern}")


def _must(holds: bool, pattern: Pattern) -> None:
    if not holds:
        raise Refusal(f"no mask is written for {pattern}")


@mask_of.register
def _(pattern: Causal, heads: int, n: int) -> tuple[MaskMod, bool]:
    return lambda b, h, i, j: j <= i, False


@mask_of.register
def _(pattern: Window, heads: int, n: int) -> tuple[MaskMod, bool]:
    if pattern.causal:
        return lambda b, h, i, j: (j <= i) & (i - j < pattern.size), False
    return lambda b, h, i, j: (i - j).abs() <= pattern.size // 2, False


@mask_of.register
def _(pattern: Sink, heads: int, n: int) -> tuple[MaskMod, bool]:
    return lambda b, h, i, j: (j <= i) & (j < pattern.size), False


@mask_of.register
def _(pattern: Chunk, heads: int, n: int) -> tuple[MaskMod, bool]:
    _must(pattern.causal and pattern.offset == 0, pattern)
    return lambda b, h, i, j: (j <= i) & (i // pattern.size == j // pattern.size), False


@mask_of.register
def _(pattern: ShiftedChunk, heads: int, n: int) -> tuple[MaskMod, bool]:
    _must(pattern.causal, pattern)
    size = pattern.size

    def shifted(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shift = torch.where(h >= heads // 2, size // 2, 0)
        return (j <= i) & ((i + size - shift) // size == (j + size - shift) // size)

    return shifted, True


@mask_of.register
def _(pattern: SCCAFixed, heads: int, n: int) -> tuple[MaskMod, bool]:
    _must(pattern.causal, pattern)
    size = pattern.chunk
    back = size // 2 if pattern.shift is None else pattern.shift

    def shifted(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shift = torch.where(h >= heads - heads // 2, back, 0)
        return (j <= i) & ((j + shift) // size == i // size)

    return shifted, True


@mask_of.register
def _(pattern: SCCAFlow, heads: int, n: int) -> tuple[MaskMod, bool]:
    _must(pattern.causal and pattern.wrap == "past", pattern)
    size = pattern.chunk

    def flowing(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j // size == i // size - h % (i // size + 1))

    return flowing, True


@mask_of.register
def _(pattern: Strided, heads: int, n: int) -> tuple[MaskMod, bool]:
    _must(pattern.causal and pattern.per_head, pattern)
    step = pattern.step

    def strided(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((j % step == h % step) | ((i == j) & (i < h % step)))

    return strided, True


@mask_of.register
def _(pattern: SSA, heads: int, n: int) -> tuple[MaskMod, bool]:
    _must(pattern.anchors == tuple(range(len(pattern.anchors))), pattern)
    size, step, first = pattern.size, pattern.step, len(pattern.anchors)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j < size) | (j % step == h % step) | (j < first))

    return seen, True


@mask_of.register
def _(pattern: Dilated, heads: int, n: int) -> tuple[MaskMod, bool]:
    step, size = pattern.step, pattern.size
    if isinstance(step, tuple) or not pattern.causal:
        raise Refusal(f"no mask is written for {pattern}")
    return lambda b, h, i, j: (j <= i) & (i - j < step * size) & ((i - j) % step == 0), False


@mask_of.register
def _(pattern: SDA, heads: int, n: int) -> tuple[MaskMod, bool]:
    _must(pattern.causal, pattern)
    size, step = pattern.segment, pattern.step

    def dilated(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        met = (i // size == j // size) & (j % size % step == h % step)
        return (j <= i) & (met | ((i == j) & (i % size < h % step)))

    return dilated, True


@mask_of.register
def _(pattern: SDANeighborhood, heads: int, n: int) -> tuple[MaskMod, bool]:
    step, reach = pattern.step, pattern.step * pattern.size

    def dilated(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        back = i - j - h % step
        met = (back >= 0) & (back < reach) & (back % step == 0)
        return met | ((i == j) & (i < h % step))

    return dilated, True


@mask_of.register
def _(pattern: Neighborhood, heads: int, n: int) -> tuple[MaskMod, bool]:
    _must(not pattern.causal and pattern.dilation == pattern.stride == 1, pattern)
    size = min(pattern.size, n)

    def nearest(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        first = (i - size // 2).clamp(0, n - size)
        return (first <= j) & (j < first + size)

    return nearest, False


@mask_of.register
def _(pattern: Or, heads: int, n: int) -> tuple[MaskMod, bool]:
    # A window holds the query itself: that a part alone would keep it changes nothing.
    _must(any(isinstance(part, Window) for part in pattern.parts), pattern)
    parts = [mask_of(part, heads, n) for part in pattern.parts]

    def either(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = parts[0][0](b, h, i, j)
        for mask, _ in parts[1:]:
            seen = seen | mask(b, h, i, j)
        return seen

    return either, any(apart for _, apart in parts)
