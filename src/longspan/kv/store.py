"""What a cache layer holds: rows of different length, stored end to end, so that freed is freed.

Every batch row and key head keeps its own number of tokens. All of them lie in one flat buffer,

    start[b, g] = sum of the rooms before,   length[b, g] <= room[b, g]

with the tokens of a head in the order in which they came. A few places of room are left so that
most appends write in place instead of copying everything, as concatenation does at every token.
Where all rooms are equal the buffer is a plain [B, G, C, D] view, without a copy; otherwise a
rectangle is gathered when it is needed, one layer at a time.

Ada-KV (Feng et al. 2024, arXiv 2407.11550) flattens heads likewise, for one batch row; here batch
rows too, so padding is never stored.

Axes: B batch, G key heads, C places of the longest head, N new rows, T places of the buffer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

SPARE = 16


class Store:
    """Named buffers of equal layout; see the module text.

    Attributes:
        length: int64 [B, G] on the CPU, tokens of each head.
        room: int64 [B, G] on the CPU, places of each head.
        longest: tokens of the longest head.
        even: whether every head of every row holds the same number of tokens.
        buffers: by name, [T, ...].
    """

    def __init__(self, batch: int, heads: int, like: dict[str, Tensor]) -> None:
        """Empty, for rows of the shapes, dtypes and device of ``like`` (name: [..., width])."""
        empty = torch.zeros(batch, heads, dtype=torch.int64, device="cpu")
        self._describe(empty, empty)
        self.buffers = {
            name: row.new_zeros(0, *row.shape[-1:]) if row.dim() else row.new_zeros(0)
            for name, row in like.items()
        }

    def copy(self, without: Sequence[str] = ()) -> Store:
        """The same rows in buffers of their own, but for those named."""
        new = copy.copy(self)
        new.buffers = {
            name: buffer.clone() for name, buffer in self.buffers.items() if name not in without
        }
        return new

    @property
    def bytes(self) -> int:
        """Bytes allocated, room included."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers.values())

    def valid(self) -> Tensor:
        """Which places of ``padded`` hold a token, bool [B, G, C] on the buffer's device."""
        return (torch.arange(self.longest, device="cpu") < self.length[..., None]).to(self._device)

    def padded(self, name: str) -> Tensor:
        """A buffer as a rectangle [B, G, C, ...]; places without a token hold anything finite."""
        buffer = self.buffers[name]
        if self._places is not None:
            shape = (*self.length.shape, self._places, *buffer.shape[1:])
            return buffer.view(shape)[:, :, : self.longest]
        places = torch.arange(self.longest, device=self._device)
        return self.gather(name, places.expand(*self.length.shape, -1))

    def gather(self, name: str, places: Tensor) -> Tensor:
        """Places [B, G, S] of a buffer, [B, G, S, ...]; cut to the room of each head."""
        room, start = self.room.to(places.device), self._start.to(places.device)
        flat = start[..., None] + torch.minimum(places, (room - 1).clamp(min=0)[..., None])
        buffer = self.buffers[name]
        return buffer[flat.flatten().clamp(max=max(0, len(buffer) - 1))].view(
            *places.shape, *buffer.shape[1:]
        )

    def append(self, rows: dict[str, Tensor], real: Tensor | None = None) -> None:
        """Add new rows behind the old ones.

        Args:
            rows: [B, G, N, ...] for every buffer.
            real: bool [B, N] on the CPU; rows where it is false are left out. None: all are real.
        """
        new = next(iter(rows.values())).shape[2]
        batch, heads = self.length.shape
        count = (
            torch.full((batch, 1), new, device="cpu")
            if real is None
            else real.sum(1, keepdim=True)
        )
        if bool((self.length + count > self.room).any()):
            self._lay_out(self.length + count + SPARE)
        if real is None and self.even and self._places is not None:
            begin = self.longest
            for name, row in rows.items():
                self._rectangle(name)[:, :, begin : begin + new] = row.detach()
        else:
            order = (
                torch.arange(new, device="cpu").expand(batch, -1)
                if real is None
                else real.cumsum(1) - 1
            )
            place = (self._start + self.length)[..., None] + order[:, None]
            taken = (
                torch.ones(batch, new, dtype=torch.bool, device="cpu") if real is None else real
            )
            taken = taken[:, None].expand(batch, heads, new)
            target = place[taken].to(self._device)
            chosen = taken.to(self._device)
            for name, row in rows.items():
                self._writable(name)[target] = row.detach()[chosen]
        self._describe(self.length + count, self.room)

    def add(self, name: str, amount: Tensor) -> None:
        """Add numbers [B, G, C] to those of a buffer, where there is a token."""
        if self.even and self._places is not None:
            self._rectangle(name)[:, :, : self.longest] += amount
            return
        tokens = self._every(self._start, self.length)
        self._writable(name)[tokens] += amount[self.valid()].to(self.buffers[name].dtype)

    def keep(self, mask: Tensor) -> bool:
        """Keep only some tokens, in their order.

        Args:
            mask: bool [B, G, C], false where there is no token.

        Returns:
            Whether any went.
        """
        length = mask.sum(-1).cpu()
        if bool((length == self.length).all()):
            return False
        least, most = int(length.min()), int(length.max())
        if least == most and self._places is not None and self._places <= most + SPARE:
            self._close_up(mask, most)
        else:
            self._shrink(mask, length)
        return True

    def _close_up(self, mask: Tensor, count: int) -> None:
        """Keep ``count`` tokens of every head within the room that there is.

        What each step of a full cache does: a few rows move, and nothing is allocated for long.
        """
        places = mask.nonzero()[:, -1].view(*self.length.shape, count)
        if count:
            moved = {name: self.gather(name, places) for name in self.buffers}
            for name, rows in moved.items():
                self._rectangle(name)[:, :, :count] = rows
        self._describe(torch.full_like(self.length, count), self.room)

    def _shrink(self, mask: Tensor, length: Tensor) -> None:
        room = length + SPARE
        device = self._device
        start, goal = self._start.to(device), _starts(room).to(device)
        places = torch.arange(mask.shape[-1], device=device)
        source = (start[..., None] + places)[mask]
        target = (goal[..., None] + mask.cumsum(-1) - 1)[mask]
        self._move(source, target, int(room.sum()))
        self._describe(length, room)

    def select(self, rows: Tensor) -> None:
        """Take batch rows by index [B'], repeated or left out: beams, repeats, early ends."""
        rows = rows.cpu()
        length, room = self.length[rows], self.room[rows]
        source = self._every(self._start[rows], length)
        self._move(source, self._every(_starts(room), length), int(room.sum()))
        self._describe(length, room)

    def _describe(self, length: Tensor, room: Tensor) -> None:
        """Take over a layout, and note what is asked of it at every step."""
        self.length, self.room = length, room
        self.longest = int(length.max())
        self.even = self.longest == int(length.min())
        places = int(room.max())
        self._places = places if places == int(room.min()) else None
        self._start = _starts(room)

    def _writable(self, name: str) -> Tensor:
        """A buffer that may be changed: one made in inference mode cannot be outside of it."""
        buffer = self.buffers[name]
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            buffer = self.buffers[name] = buffer.clone()
        return buffer

    def _rectangle(self, name: str) -> Tensor:
        """A buffer as [B, G, P, ...] with its spare places; only where all rooms are equal."""
        buffer = self._writable(name)
        assert self._places is not None
        return buffer.view(*self.length.shape, self._places, *buffer.shape[1:])

    @property
    def _device(self) -> torch.device:
        return next(iter(self.buffers.values())).device

    def _lay_out(self, room: Tensor) -> None:
        source = self._every(self._start, self.length)
        self._move(source, self._every(_starts(room), self.length), int(room.sum()))
        self._describe(self.length, room)

    def _every(self, start: Tensor, length: Tensor) -> Tensor:
        """Index of every token of rows [B, G] that begin at ``start``."""
        length = length.flatten()
        first = length.cumsum(0) - length
        shift = torch.repeat_interleave(start.flatten() - first, length)
        return (torch.arange(int(length.sum()), device="cpu") + shift).to(self._device)

    def _move(self, source: Tensor, target: Tensor, places: int) -> None:
        for name, buffer in self.buffers.items():
            # Zeros: a place without a token takes part in products with weight 0, and 0 * NaN is
            # NaN.
            moved = buffer.new_zeros(places, *buffer.shape[1:])
            moved[target] = buffer[source]
            self.buffers[name] = moved


def _starts(room: Tensor) -> Tensor:
    flat = room.flatten()
    return (flat.cumsum(0) - flat).view(room.shape)
