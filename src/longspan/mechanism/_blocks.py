"""Blocks of keys that content selects for each query: what MoBA, NSA and gates share.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, T blocks of keys, t selected
ones, D head width.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.mechanism import _chosen
from longspan.mechanism._copies import Copies
from longspan.mechanism._range_op import over_ranges
from longspan.ops import merge
from longspan.ops.fused import can_fuse
from longspan.ops.inputs import autocast

# Scores that exist at a time: bounds the memory of a selection.
_SCORES = 1 << 25
# Fewer rows fit into one tile, and are not worth sorting.
_FEW_ROWS = 64
# Scores that a warp of a GPU holds, and the most blocks whose scores a program holds.
_NUMBERS, _WIDEST = 1024, 1 << 14
# Kernels whose name asks for plain PyTorch.
_PLAIN = ("tiled", "reference")


def slices(rows: int, per_row: int, most: int | None = None) -> list[slice]:
    """Cut query rows, ``most`` at a time, so that a bounded number of scores exists at once."""
    step = max(1, min(_SCORES // max(1, per_row), rows if most is None else most))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class Lay:
    """Finer blocks b step - left to (b + 1) step - 1 overlap block b of ``blocks``."""

    step: int
    left: int
    blocks: int

    def sums(self, score: Tensor) -> Tensor:
        """Scores of finer blocks [..., S], summed over those that overlap a block [..., T].

        From the first to the last: blocks that overlap the same ones, but for zeros, have equal
        sums to the last bit.
        """
        wide = pad(score, (self.left, self.blocks * self.step - score.shape[-1]))
        turns = range(self.step + self.left)
        return reduce(torch.add, (wide[..., c :: self.step][..., : self.blocks] for c in turns))


def best_blocks(
    score: Tensor, stop: Tensor, count: int, first: int = 0, lay: Lay | None = None
) -> Tensor:
    """The blocks of the best scores among blocks ``first`` to ``stop`` of each row; of equal ones
    the earliest.

    Args:
        score: [B, K, N, T], or [B, K, N, S] of finer blocks.
        stop: one past the last block of each row [1 or B, N].
        count: most blocks per row.
        first: first block.
        lay: where finer blocks lie; None if the scores are of the blocks themselves.

    Returns:
        Blocks [B, K, N, t]; T where there are no more.
    """
    blocks = score.shape[-1] if lay is None else lay.blocks
    if can_fuse(score) and blocks <= _WIDEST:
        return _best_fused(score, stop, min(count, blocks), first, lay or Lay(1, 0, blocks))
    score = score if lay is None else lay.sums(score)
    number = torch.arange(blocks, device=score.device)
    barred = (number >= stop[..., None]) | (number < first)
    value, block = _best(score.masked_fill(barred[:, None], -torch.inf), min(count, blocks))
    return block.masked_fill(value.isneginf(), blocks)


def _best(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best scores of each row and their places; of equal ones the earliest.

    Which of equal ones ``topk`` takes depends on what comes later, and so would the past.
    """
    if torch.compiler.is_compiling():
        value, place = torch.sort(score, dim=-1, descending=True, stable=True)
        return value[..., :count], place[..., :count]
    value, place = score.topk(min(count + 1, score.shape[-1]), dim=-1)
    if 0 < count < score.shape[-1]:
        last, next_ = value[..., count - 1], value[..., count]
        tied = (last == next_) & ~last.isneginf()
        if bool(tied.any()):
            found = torch.sort(score[tied], dim=-1, descending=True, stable=True)
            value[tied], place[tied] = (x[:, : count + 1] for x in found)
    return value[..., :count], place[..., :count]


def _best_fused(score: Tensor, stop: Tensor, count: int, first: int, lay: Lay) -> Tensor:
    """``best_blocks`` on a GPU, where sorting takes longer than attention."""
    kernels: ModuleType = importlib.import_module("longspan.mechanism._best_triton")
    batch, heads, rows, numbers = score.shape
    out = torch.empty(batch, heads, rows, count, device=score.device, dtype=torch.int64)
    wide = max(32, 1 << (lay.blocks - 1).bit_length())
    with torch.cuda.device_of(score):
        kernels.best_of_rows[(rows, batch * heads)](
            *(score.contiguous(), stop.to(torch.int32).contiguous(), out),
            *(rows, numbers, lay.blocks, rows if len(stop) > 1 else 0, heads, count),
            *(first, lay.step, lay.left, wide),
            num_warps=max(1, wide // _NUMBERS),
        )
    return out


def over_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near: Sequence[tuple[Tensor, Tensor]],
    block: Tensor,
    size: int,
    scale: float,
    impl: str,
) -> Tensor:
    """Attention of each row to ranges of its own and to whole blocks that it chose.

    Rows of one tile choose different blocks, and a kernel would visit all of them for each. So a
    row is copied for every block it chose, copies are sorted by block, and each sees one range
    that its neighbours see too; what the copies give is merged by log-sum-exp. A GPU does the same
    without copies (``_chosen``).

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, M, D] in the order of positions.
        v: values [B, K, M, Dv].
        near: first key and one past the last, for all heads [1 or B, N]; apart from the blocks.
        block: chosen blocks [B, H or K, N, t], all of whose keys exist; those beyond M / size do
            not count.
        size: tokens of a block.
        scale: factor on the logits.
        impl: kernel name of the ranges, or ``auto``; ``tiled`` and ``reference`` take the blocks
            as ranges too.

    Returns:
        out [B, H, N, Dv]; 0 where a row sees nothing.
    """
    lo, hi = (torch.stack(ends, dim=-1)[:, None] for ends in zip(*near, strict=True))
    choices = block.shape[-1]
    if not choices:
        return over_ranges(q, k, v, lo, hi, scale, impl)[0]
    blocks = -(-k.shape[2] // size)
    counts = block < blocks
    if q.shape[2] < _FEW_ROWS:
        far = (block * size, (block + 1) * size * counts)
        lo, hi = (
            torch.cat([x.expand(*block.shape[:3], -1), y], dim=-1)
            for x, y in zip((lo, hi), far, strict=True)
        )
        return over_ranges(q, k, v, lo, hi, scale, impl)[0]
    own = over_ranges(q, k, v, lo, hi, scale, impl)
    q, k, v = autocast(q, k, v)
    if impl not in _PLAIN and _chosen.fits(q, k, v, block, size):
        return merge([own, _chosen.over_chosen(q, k, v, block, size, scale)])[0]
    copies, chosen = Copies.sorted(block.clamp_max(blocks).flatten(2), blocks, choices)
    begin = chosen * size
    end = (begin + size).masked_fill(begin >= k.shape[2], 0)
    out, lse = over_ranges(copies.spread(q), k, v, begin[..., None], end[..., None], scale, impl)
    return merge([own, *copies.collect(out, lse)])[0]
