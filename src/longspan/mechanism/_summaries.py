"""Attention to the own chunk, and to summaries of other chunks: what pooled forms share.

A summary stands for a whole chunk. Causal rows see the summaries of chunks that ended before their
own began, c < i // C, so no row meets a token twice or from the future. Positions count tokens
inside a sequence, so chunks hold C tokens whatever the padding; only the last is shorter.

Axes: B batch, H query heads, K key heads, N rows, L rows since the first open chunk began, T
chunks of C rows among them, S summaries, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.mechanism._range_op import over_ranges
from longspan.mechanism._summarise import summarise
from longspan.mechanism._summary_state import SummaryState, join_masks, state_after
from longspan.mechanism.layer import positions
from longspan.nn.rotary import rotate
from longspan.ops import attend

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Told:
    """Summaries.

    Attributes:
        key: [B, K or H, S, D], rotated.
        value: [B, K or H, S, Dv].
        number: of their chunks [S] or [B, S].
        real: False where there is none [B, S]; None if there are all.
        count: tokens of the new ones where there is padding [B, T].
        short: tokens that the last one lacks where there is none.
    """

    key: Tensor
    value: Tensor
    number: Tensor
    real: Tensor | None
    count: Tensor | None
    short: int


@dataclass(frozen=True, kw_only=True)
class Summaries:
    """How chunks are summarised and seen.

    Attributes:
        chunk: C.
        causal: only earlier chunks, and earlier tokens of the own chunk.
        of_outputs: values of summaries are means of local outputs instead of values; two-sided
            rows then see the summary of their own chunk too.
        inv_freq: of a rotary embedding, radians per position [D/2]; summaries are rotated to the
            middle of their chunk. None for no rotation.
        factor: multiplies cosine and sine.
        pool: learned queries [K, D] that weigh the tokens of a chunk; None: their mean.
        scale: factor on the logits.
        impl: kernel of ``attend``.
    """

    chunk: int
    causal: bool
    of_outputs: bool = False
    inv_freq: Tensor | None = None
    factor: float = 1.0
    pool: Tensor | None = None
    scale: float | None = None
    impl: str = "auto"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        state: SummaryState | None,
        keep: bool,
    ) -> tuple[Part, list[tuple[Part, float | Tensor]], SummaryState | None]:
        """Local attention, attention to summaries, and what the next tokens need.

        Args:
            q: queries [B, H, N, D].
            k: keys [B, K, N, D].
            v: values [B, K, N, Dv].
            valid: False at padding [B, N].
            state: of the tokens before.
            keep: whether a state is wanted.

        Returns:
            (out, lse) of the own chunk; (out, lse) and the number of tokens behind each summary
            [B, 1, 1] or as one number, for groups of summaries of equal size; the state.
        """
        n, size, closed = q.shape[2], self.chunk, 0 if state is None else state.closed
        pooled = v
        if state is not None:
            k, v = torch.cat([state.open_key, k], dim=2), torch.cat([state.open_value, v], dim=2)
            valid = join_masks(state.open_valid, valid, len(k), (k.shape[2] - n, n), k.device)
        new = slice(k.shape[2] - n, None)
        place = positions(k[:, 0], valid, closed * size)
        segments = None if valid is None else valid.to(torch.int64) - 1
        own = None if segments is None else segments[:, new]
        turned = self._turn(q, place[..., new])
        local = attend(
            turned,
            self._turn(k, place),
            v,
            f"chunk({size})" if self.causal else f"chunk({size}, causal=false)",
            segments=own,
            key_segments=segments,
            scale=self.scale,
            return_lse=True,
            impl=self.impl,
        )
        pooled = local[0] if self.of_outputs else pooled
        pooled = pooled if state is None else torch.cat([state.open_pooled, pooled], dim=2)
        told = self._told(k, pooled, valid, state)
        known = state is None or valid is None
        far: list[tuple[Part, float | Tensor]] = []
        if told.key.shape[2] and self.causal and known:
            far.append((self._before(turned, told, place[..., new], own), size))
        elif told.key.shape[2]:
            far = self._far(turned, told, place[..., new], own)
        after = None
        if keep:
            rows, made = (k, v, pooled), (told.key, told.value)
            after = state_after(size, rows, valid, made, told.real, closed)
        return local, far, after

    def _told(
        self, k: Tensor, pooled: Tensor, valid: Tensor | None, state: SummaryState | None
    ) -> _Told:
        """Summaries of all chunks, those of the state included."""
        size, closed = self.chunk, 0 if state is None else state.closed
        keys, values, count = summarise(k, pooled, valid, size, self.pool)
        number = torch.arange(keys.shape[2], device=k.device)
        number = number + (closed[:, None] if isinstance(closed, Tensor) else closed)
        keys = self._turn(keys, number * size + (size - 1) // 2)
        real = None if count is None else count >= (size if self.causal else 1)
        short = 0 if valid is not None else -k.shape[2] % size
        if self.causal and short:
            keys, values, number = keys[:, :, :-1], values[:, :, :-1], number[..., :-1]
        if state is not None:
            before = torch.arange(state.key.shape[2], device=k.device)
            number = torch.cat([before.expand(*number.shape[:-1], -1), number], dim=-1)
            real = join_masks(state.valid, real, len(k), (len(before), keys.shape[2]), k.device)
            keys = torch.cat([state.key, keys], dim=2)
            values = torch.cat([state.value, values], dim=2)
        return _Told(keys, values, number, real, count, short)

    def _before(self, turned: Tensor, told: _Told, place: Tensor, own: Tensor | None) -> Part:
        """Causal rows over summaries, all of them full: the first i // C, known without a plan."""
        stop = place.expand(1 if own is None else len(turned), -1) // self.chunk
        stop = stop if own is None else stop.masked_fill(own < 0, 0)
        ends = stop[:, None, :, None]
        scale = turned.shape[-1] ** -0.5 if self.scale is None else self.scale
        none = torch.zeros_like(ends)
        return over_ranges(turned, told.key, told.value, none, ends, scale, self.impl)

    def _far(
        self, turned: Tensor, told: _Told, place: Tensor, own: Tensor | None
    ) -> list[tuple[Part, float | Tensor]]:
        """Each group of summaries of equal size, and the tokens behind each of them."""
        size = self.chunk
        # A causal row at i sees summary c where (c + 1) C <= i.
        pattern = "causal()" if self.causal else "dense()"
        if not (self.causal or self.of_outputs):
            pattern = f"dense() - chunk({size}, causal=false)"
        found: list[tuple[Part, float | Tensor]] = []
        for seen, tokens in self._groups(told):
            asking = own
            if own is None and seen is not None:
                shape = (1, turned.shape[2])
                asking = torch.zeros(shape, dtype=torch.int64, device=turned.device)
            part = attend(
                turned,
                told.key,
                told.value,
                pattern,
                positions=place,
                segments=asking,
                key_positions=(told.number + 1) * size if self.causal else told.number * size,
                key_segments=None if seen is None else seen.to(torch.int64) - 1,
                scale=self.scale,
                return_lse=True,
                impl=self.impl,
            )
            found.append((part, tokens))
        return found

    def _groups(self, told: _Told) -> list[tuple[Tensor | None, float | Tensor]]:
        """Which summaries stand for how many tokens: all for C, but the last of two-sided rows."""
        size, count = self.chunk, told.count
        if self.causal or (count is None and not told.short):
            return [(told.real, size)]
        if count is None:
            full = (told.number < told.number.shape[-1] - 1)[None]
            return [(full, size), (~full, size - told.short)]
        last = count.masked_fill(count == size, 0).sum(dim=-1).clamp_min(1)
        return [(count == size, size), ((count > 0) & (count < size), last[:, None, None])]

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        return x if self.inv_freq is None else rotate(x, place, self.inv_freq, self.factor)
