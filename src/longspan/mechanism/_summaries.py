"""Attention to the own chunk, and to summaries of other chunks: what pooled forms share.

A summary stands for a whole chunk. Causal rows see the summaries of chunks that ended before their
own began, c < i // C, so no row meets a token twice or from the future. Positions count tokens
inside a sequence, so chunks hold C tokens whatever the padding; only the last is shorter.

Decoding keeps the tokens of the open chunk and one summary per closed one.

Axes: B batch, H query heads, K key heads, N rows, L rows since the first open chunk began, T
chunks of C rows among them, S summaries, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.mechanism._range_op import over_ranges
from longspan.mechanism.layer import Count, positions, rows_at, to_front
from longspan.nn.rotary import rotate
from longspan.ops import attend

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class SummaryState:
    """What decoding keeps: at most C - 1 tokens, and one key and value per closed chunk.

    Attributes:
        open_key: keys of the open chunk, not rotated [B, K, L, D].
        open_value: their values.
        open_pooled: what their summary will be made of.
        open_valid: False at padding [B, L]; None if there is none.
        key: summaries [B, K or H, S, D], rotated.
        value: summaries.
        valid: False where there is no summary [B, S]; None if there are all.
        closed: chunks closed so far, per batch row where padding makes them differ.
    """

    open_key: Tensor
    open_value: Tensor
    open_pooled: Tensor
    open_valid: Tensor | None
    key: Tensor
    value: Tensor
    valid: Tensor | None
    closed: Count


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
        base = closed * size
        place = positions(k[:, 0], valid, base)
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
        keys, values, count = self._summarise(k, pooled, valid)
        total = -(-k.shape[2] // size)
        number = torch.arange(total, device=k.device)
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
        groups: list[tuple[Tensor | None, float | Tensor]] = [(real, size)]
        if not self.causal and (count is not None or short):
            if count is None:
                full = (number < total - 1)[None]
                groups = [(full, size), (~full, size - short)]
            else:
                last = count.masked_fill(count == size, 0).sum(dim=-1).clamp_min(1)
                groups = [
                    (count == size, size),
                    ((count > 0) & (count < size), last[:, None, None]),
                ]
        far: list[tuple[Part, float | Tensor]] = []
        if self.causal and (valid is None or state is None) and keys.shape[2]:
            # What a row sees is known without a plan: the first i // C summaries, all full.
            stop = place[..., new].expand(1 if valid is None else len(k), -1) // size
            stop = stop if own is None else stop.masked_fill(own < 0, 0)
            ends = stop[:, None, :, None]
            scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
            part = over_ranges(
                turned, keys, values, torch.zeros_like(ends), ends, scale, self.impl
            )
            far.append((part, size))
            groups = []
        for seen, tokens in groups if keys.shape[2] else []:
            asking = own
            if own is None and seen is not None:
                asking = torch.zeros(1, n, dtype=torch.int64, device=k.device)
            # A causal row at i sees summary c where (c + 1) C <= i.
            pattern = "causal()" if self.causal else "dense()"
            if not (self.causal or self.of_outputs):
                pattern = f"dense() - chunk({size}, causal=false)"
            part = attend(
                turned,
                keys,
                values,
                pattern,
                positions=place[..., new],
                segments=asking,
                key_positions=(number + 1) * size if self.causal else number * size,
                key_segments=None if seen is None else seen.to(torch.int64) - 1,
                scale=self.scale,
                return_lse=True,
                impl=self.impl,
            )
            far.append((part, tokens))
        after = self._after(k, v, pooled, valid, keys, values, real, closed) if keep else None
        return local, far, after

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        return x if self.inv_freq is None else rotate(x, place, self.inv_freq, self.factor)

    def _summarise(
        self, k: Tensor, pooled: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of every chunk, and its tokens [B, T] where there is padding."""
        size, rows = self.chunk, k.shape[2]
        if valid is None:
            inside = torch.ones(1, rows, dtype=torch.bool, device=k.device)
        else:
            order, _ = to_front(valid)
            k, pooled = (
                rows_at(x.masked_fill(~valid[:, None, :, None], 0.0), order) for x in (k, pooled)
            )
            inside = valid.gather(1, order)
        tail = -rows % size
        k_BKTCD, p_BHTCD = (pad(x, (0, 0, 0, tail)).unflatten(2, (-1, size)) for x in (k, pooled))
        inside_BTC = pad(inside, (0, tail)).unflatten(1, (-1, size))
        count = inside_BTC.sum(dim=-1)
        if self.pool is None:
            # The division would be in float32 whatever the dtype of the keys.
            share = inside_BTC.to(k.dtype) / count.clamp_min(1)[..., None]
            weight = share[:, None]
        else:
            logit = torch.einsum("bktcd,kd->bktc", k_BKTCD, self.pool.to(k.dtype))
            logit = logit * k.shape[-1] ** -0.5
            # A chunk without any token is weighed unmasked, and never seen.
            hidden = ~inside_BTC & inside_BTC.any(dim=-1, keepdim=True)
            weight = logit.masked_fill(hidden[:, None], -math.inf).softmax(dim=-1)
        keys = (weight[..., None, :] @ k_BKTCD)[..., 0, :]
        if p_BHTCD.shape[1] != k.shape[1]:
            repeat = p_BHTCD.shape[1] // k.shape[1]
            keys = keys.repeat_interleave(repeat, dim=1)
            weight = weight if weight.shape[1] == 1 else weight.repeat_interleave(repeat, dim=1)
        values = (weight[..., None, :] @ p_BHTCD)[..., 0, :]
        return keys, values, None if valid is None else count

    def _after(
        self,
        k: Tensor,
        v: Tensor,
        pooled: Tensor,
        valid: Tensor | None,
        keys: Tensor,
        values: Tensor,
        real: Tensor | None,
        closed: Count,
    ) -> SummaryState:
        size = self.chunk
        if valid is None:
            done = k.shape[2] // size
            return SummaryState(
                open_key=k[:, :, done * size :],
                open_value=v[:, :, done * size :],
                open_pooled=pooled[:, :, done * size :],
                open_valid=None,
                key=keys,
                value=values,
                valid=None,
                closed=closed + done,
            )
        assert real is not None
        tokens = valid.sum(dim=-1)
        done = tokens // size
        order, _ = to_front(valid)
        width = int((tokens - done * size).max())
        open_row = done[:, None] * size + torch.arange(width, device=k.device)
        open_row = order.gather(1, open_row.clamp_max(order.shape[1] - 1))
        open_valid = torch.arange(width, device=k.device) < (tokens - done * size)[:, None]
        order, _ = to_front(real)
        order = order[:, : int(real.sum(dim=-1).max())]
        return SummaryState(
            open_key=rows_at(k, open_row),
            open_value=rows_at(v, open_row),
            open_pooled=rows_at(pooled, open_row),
            open_valid=open_valid,
            key=rows_at(keys, order),
            value=rows_at(values, order),
            valid=real.gather(1, order),
            closed=closed + done,
        )


def join_masks(
    old: Tensor | None,
    new: Tensor | None,
    batch: int,
    rows: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """Two masks side by side; None stands for all True."""
    if old is None and new is None:
        return None
    whole = [
        torch.ones(batch, count, dtype=torch.bool, device=device) if mask is None else mask
        for mask, count in zip((old, new), rows, strict=True)
    ]
    return torch.cat(whole, dim=1)
