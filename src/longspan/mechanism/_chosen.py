"""Attention of rows to whole blocks that they chose, on a GPU.

    out_i = softmax(scale q_i . k_j) v_j,   j in the blocks of row i

Rows of one tile choose different blocks, so tiles are made of rows that chose the same one: a list
of (row, choice) is sorted by block, and a program takes as many entries of a block as fill the
rows of a matrix product, all query heads of a key head among them. Nothing is copied into that
order. What a block gives to a row goes to the row's own place, where the parts of a row lie side
by side and are merged; only some rows at a time, so that parts never exist for all. Gradients of
queries go the same way. Those of keys are added up block by block: a program walks at most
``_PIECE`` queries that chose its block, and a block that more of them chose has several programs
whose sums are added in a fixed order. No atomics: the same input gives the same bits.

O(N t size D) time. Memory above inputs and outputs: lists of N t int32, parts of bounded size, in
the backward the gradients of keys and values in float32.

Axes: B batch, H query heads, K key heads, G = H / K, N query rows, M key rows, T blocks of keys, t
chosen ones, L = B K lists, P = N t entries, S slices of rows, D head width.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longspan.mechanism._chosen_lists import cut, sorted_entries
from longspan.ops.fused import can_fuse
from longspan.ops.once import once

# Numbers of the parts that exist at a time, half a GiB in bfloat16.
_PARTS = 1 << 28
# Queries that one program walks for the gradients of its keys.
_PIECE = 1 << 15
# Numbers that a program holds which only moves rows.
_NUMBERS = 2048
_WIDEST = 256
# Longer blocks are worth copies of the rows that chose them, for kernels made for long ranges.
_LONGEST = 256


@dataclass(frozen=True)
class Tile:
    """Sizes of a program: rows and columns of its products, warps, and steps loaded ahead."""

    tall: int
    broad: int
    warps: int
    stages: int


# By bytes of a number, and whether heads have more than 128 of them: forward and gradients of
# queries, then gradients of keys. Tiles of both operands stay below 160 KiB.
_TILES = {
    (2, False): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    (2, True): (Tile(64, 64, 4, 1), Tile(64, 64, 8, 1)),
    (4, False): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    (4, True): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def fits(q: Tensor, k: Tensor, v: Tensor, block: Tensor, size: int) -> bool:
    """Whether these tensors are on a GPU whose kernels take them; see ``over_chosen``."""
    if not can_fuse(q, k, v) or size > _LONGEST or max(q.shape[3], v.shape[3]) > _WIDEST:
        return False
    entries = block[0].numel() // k.shape[1]
    group = q.shape[1] // block.shape[1]
    return group <= min(tile.tall for tile in _tiles(q, v)) and entries < 1 << 31


def over_chosen(
    q: Tensor, k: Tensor, v: Tensor, block: Tensor, size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each row to its blocks.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, M, D].
        v: values [B, K, M, Dv].
        block: chosen blocks [B, H or K, N, t], each once in a row; those beyond M / size do not
            count, and the last may be short.
        size: tokens of a block.
        scale: factor on the logits.

    Returns:
        out [B, H, N, Dv] and lse [B, H, N]; 0 and -inf where a row chose nothing. Differentiable
        once.
    """
    # Query heads that choose apart are further rows of their key head.
    lists = k.shape[1]
    own_q = q.contiguous().view(q.shape[0], -1, q.shape[2] * (block.shape[1] // lists), q.shape[3])
    block = block.reshape(len(q), lists, own_q.shape[2], -1).to(torch.int32).contiguous()
    out, lse = _OverChosen.apply(own_q, k.contiguous(), v.contiguous(), block, size, scale)
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


class _OverChosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: Tensor, size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.call = call = _Call.of(q, k, v, block, size, scale)
        order, offset = call.lists(block)
        out, lse = call.forward(q, k, v, block, order, offset)
        ctx.save_for_backward(q, k, v, block, order, offset, out, lse)
        return out, lse

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        d_out, d_lse = (x.contiguous() for x in grads)
        return *ctx.call.backward(*ctx.saved_tensors, d_out, d_lse), None, None, None


@dataclass(frozen=True)
class _Call:
    """Sizes of a call, and its launches."""

    shape: tuple[int, int, int]
    slots: int
    keys: int
    size: int
    scale: float
    group: int
    widths: tuple[int, int]
    tiles: tuple[Tile, Tile]
    part_rows: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, block: Tensor, size: int, scale: float) -> _Call:
        batch, heads, rows, width = q.shape
        slots = block.shape[3]
        most = _PARTS // (batch * heads * slots * max(width, v.shape[3]))
        return cls(
            shape=(batch * k.shape[1], heads * batch, rows),
            slots=slots,
            keys=k.shape[2],
            size=size,
            scale=scale,
            group=heads // k.shape[1],
            widths=(width, v.shape[3]),
            tiles=_tiles(q, v),
            part_rows=min(rows, max(1, most)),
        )

    @property
    def blocks(self) -> int:
        return -(-self.keys // self.size)

    @property
    def parts(self) -> int:
        return -(-self.shape[2] // self.part_rows)

    def lists(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """See ``sorted_entries``."""
        return sorted_entries(block.flatten(0, 1), self.blocks, self.parts, self.part_rows)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Tensor, order: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        lists, planes, rows = self.shape
        out = q.new_empty(*q.shape[:3], self.widths[1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        part = q.new_empty(planes * self.part_rows * self.slots, self.widths[1])
        part_lse = part.new_empty(len(part), dtype=torch.float32)
        table, first = self._tiled(offset)
        move = self._moves(self.widths[1])
        kernels, tile = _kernels(), self.tiles[0]
        with torch.cuda.device_of(q):
            for index in range(self.parts):
                kernels.attend[(table.shape[2], lists)](
                    *(q, k, v, order, offset, table, first, part, part_lse),
                    *self._sizes(index),
                    self.scale * math.log2(math.e),
                    *self._constants(tile),
                    num_warps=tile.warps,
                    num_stages=tile.stages,
                )
                kernels.join[(-(-self.part_rows // move[-1]), planes)](
                    *(part, part_lse, block, out, lse, rows, self.slots, self.blocks),
                    *(index, self.part_rows, self.group),
                    *move,
                )
        return out, lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block: Tensor,
        order: Tensor,
        offset: Tensor,
        out: Tensor,
        lse: Tensor,
        d_out: Tensor,
        d_lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        delta = torch.empty_like(lse)
        move = self._moves(self.widths[1])
        with torch.cuda.device_of(q):
            _kernels().slopes[(-(-lse.numel() // move[-1]),)](
                out, d_out, d_lse, delta, lse.numel(), *move
            )
            given = (q, k, v, d_out, lse, delta, order, offset)
            dq = self._query_gradients(given, block)
            dk, dv = self._key_gradients(given)
        return dq, dk, dv

    def _query_gradients(self, given: tuple[Tensor, ...], block: Tensor) -> Tensor:
        q, offset = given[0], given[-1]
        lists, planes, rows = self.shape
        dq = torch.empty_like(q)
        part = q.new_empty(planes * self.part_rows * self.slots, self.widths[0])
        table, first = self._tiled(offset)
        move = self._moves(self.widths[0])
        kernels, tile = _kernels(), self.tiles[0]
        for index in range(self.parts):
            kernels.query_gradients[(table.shape[2], lists)](
                *(*given, table, first, part),
                *self._sizes(index),
                self.scale,
                *self._constants(tile),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            kernels.add_copies[(-(-self.part_rows // move[-1]), planes)](
                *(part, block, dq, rows, self.slots, self.blocks, index, self.part_rows),
                self.group,
                *move,
            )
        return dq

    def _key_gradients(self, given: tuple[Tensor, ...]) -> list[Tensor]:
        k, v, offset = given[1], given[2], given[-1]
        (lists, _, rows), tile = self.shape, self.tiles[1]
        longest = max(1, _PIECE // self.group)
        # [L, T]: entries of each block.
        count = offset[:, :: self.parts].diff(dim=1)
        table, first = cut(count, longest, rows * self.slots)
        pieces = table.shape[-1]
        sums = [
            x.new_empty(lists * pieces * self.size, x.shape[3], dtype=torch.float32)
            for x in (k, v)
        ]
        constants = self._constants(tile)
        kernels = _kernels()
        kernels.key_gradients[(pieces * -(-self.size // constants[-1]), lists)](
            *(*given, table, first, *sums, rows, self.keys, self.slots, self.blocks),
            *(self.parts, pieces, longest, self.scale, *constants, tile.stages),
            num_warps=tile.warps,
        )
        found = []
        for x, part in zip((k, v), sums, strict=True):
            move = self._moves(x.shape[3])
            grad = torch.empty_like(x)
            kernels.add_pieces[(-(-self.keys // move[-1]), lists)](
                part, first, grad, self.keys, self.blocks, pieces, self.size, *move
            )
            found.append(grad)
        return found

    def _tiled(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The block of each tile of entries [L, S, tiles], T for none; and the tiles before each
        block [L, S, T + 1]."""
        count = offset.diff(dim=1).unflatten(1, (self.blocks, self.parts)).mT.contiguous()
        return cut(count, self.tiles[0].tall // self.group, self.part_rows * self.slots)

    def _sizes(self, index: int) -> tuple[int, ...]:
        rows, parts = self.shape[2], self.parts
        return (rows, self.keys, self.slots, self.blocks, parts, index, self.part_rows)

    def _constants(self, tile: Tile) -> tuple[int, ...]:
        wide, v_wide = (_power(width, 16) for width in self.widths)
        broad = min(tile.broad, _power(self.size, 16))
        width, v_width = self.widths
        return (self.group, self.size, width, wide, v_width, v_wide, tile.tall, broad)

    def _moves(self, width: int) -> tuple[int, int, int]:
        wide = _power(width)
        return width, wide, max(1, _NUMBERS // wide)


def _tiles(q: Tensor, v: Tensor) -> tuple[Tile, Tile]:
    return _TILES[q.element_size(), max(q.shape[3], v.shape[3]) > 128]


def _power(number: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << (number - 1).bit_length())


def _kernels() -> ModuleType:
    return importlib.import_module("longspan.mechanism._chosen_triton")
