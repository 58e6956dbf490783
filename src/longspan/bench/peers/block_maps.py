"""Whole blocks of keys for blocks of queries: the form of block-sparse kernels.

Axes: H query heads, G maps (each for H / G heads in a row), Q blocks of queries, T blocks of
keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.planning import Plan
from longspan.planning.passes import Pass


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Which blocks are computed, wholly.

    Attributes:
        seen_GQT: bool; head h reads map ``h // (heads // G)``.
        size: tokens of a block.
        heads: query heads H.
    """

    seen_GQT: Tensor
    size: int
    heads: int

    @property
    def seen_HQT(self) -> Tensor:
        """The map of every head."""
        return self.seen_GQT.repeat_interleave(self.heads // len(self.seen_GQT), 0)

    @property
    def pairs(self) -> int:
        """Query-key pairs over all heads."""
        each = self.heads // len(self.seen_GQT)
        return int(self.seen_GQT.sum(dtype=torch.int64)) * each * self.size**2

    def to(self, device: torch.device | str) -> BlockMap:
        """The same on another device."""
        return BlockMap(self.seen_GQT.to(device), self.size, self.heads)

    def coarser(self, size: int) -> tuple[Tensor, Tensor]:
        """Larger blocks that it touches in part, and wholly: bool [G, Q', T'] each."""
        step = size // self.size
        count = self.seen_GQT.unflatten(2, (-1, step)).unflatten(1, (-1, step)).sum((2, 4))
        return (count > 0) & (count < step**2), count == step**2


def block_map(laid: Plan, sizes: Sequence[int] = (128, 64)) -> BlockMap:
    """A plan as a map of blocks.

    Args:
        laid: the plan.
        sizes: block sizes that may be, the best first.

    Raises:
        Refusal: if the plan is no set of whole blocks of any of the sizes.
    """
    for size in sizes:
        if all(_whole(part, laid, size) for part in laid.passes):
            seen = np.any([_seen(part, laid, size) for part in laid.passes], axis=0)
            return BlockMap(torch.from_numpy(seen), size, laid.heads)
    raise Refusal(f"takes whole blocks of {' or '.join(map(str, sizes))} tokens only")


def _whole(part: Pass, laid: Plan, size: int) -> bool:
    if part.key_order is not None or part.query_order is not None or laid.batch > 1:
        return False
    if laid.n % size or laid.keys % size:
        return False
    lo, hi = (x.reshape(*x.shape[:2], -1, size, x.shape[3]) for x in (part.lo, part.hi))
    alike = (lo == lo[:, :, :, :1]).all() and (hi == hi[:, :, :, :1]).all()
    return bool(alike and not (lo % size).any() and not (hi % size).any())


def _seen(part: Pass, laid: Plan, size: int) -> np.ndarray:
    lo, hi = (x[0, :, ::size, :, None] // size for x in (part.lo, part.hi))
    block = np.arange(laid.keys // size)
    inside = np.asarray(((lo <= block) & (block < hi)).any(axis=2))
    return inside[list(part.head_class)]
