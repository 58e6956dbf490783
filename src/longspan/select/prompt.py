"""A prompt as estimators see it: rows by position, in whole blocks.

Selections are made of blocks of S positions, so queries and keys are laid out by position first:
padding behind the tokens, and room before the first query so that its block is whole. A row of the
batch then reads as the same row alone. Room holds zeros and is marked; where nothing has to move,
the layout is a view.

Axes: B batch, H query heads, K key heads, N queries (the last of M keys), D head width, S tokens
of a block, Q blocks of queries, T blocks of keys, R = Q S rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """Queries and keys of one layer.

    Attributes:
        q: queries [B, H, R, D]; 0 where none stands.
        k: keys [B, K, T S, D]; 0 behind the last token.
        at: position of each query row, int64 [B, R]; -1 where none stands.
        length: tokens of each row of the batch, int64 [B].
        first: block of the first query row, int64 [B].
        size: tokens of a block S.
        scale: factor on the logits.
        span: first position of a query and one past the last, if they are the same in all rows of
            the batch and nothing is padding; None if only the device knows.
        layer: number of the layer.
        layers: how many layers share a budget.
        norms: length of each token's embedding, float [B, T S], anything behind the last token;
            None if nobody said.
    """

    q: Tensor
    k: Tensor
    at: Tensor
    length: Tensor
    first: Tensor
    size: int
    scale: float
    span: tuple[int, int] | None = None
    layer: int = 0
    layers: int = 1
    norms: Tensor | None = None

    @property
    def own(self) -> Tensor:
        """Block of each block of queries, int64 [B, Q]."""
        rows = torch.arange(self.q.shape[2] // self.size, device=self.q.device)
        return self.first[:, None] + rows

    @property
    def blocks(self) -> int:
        """Blocks of keys T."""
        return self.k.shape[2] // self.size

    @property
    def tokens(self) -> int | None:
        """Tokens of every row of the batch; None if only the device knows."""
        return None if self.span is None else self.span[1]

    @property
    def real(self) -> Tensor:
        """Whether a key stands at each place, bool [B, T S]."""
        return torch.arange(self.k.shape[2], device=self.k.device) < self.length[:, None]

    @property
    def back(self) -> Tensor:
        """Blocks from each block of queries back to each block of keys, int64 [B, Q, T]."""
        return self.own[..., None] - torch.arange(self.blocks, device=self.q.device)

    @property
    def work(self) -> torch.dtype:
        """What sums are computed in: float32 at least."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def heads(self, part: slice) -> Prompt:
        """Some query heads with their key heads; ``part`` holds whole groups."""
        group = self.q.shape[1] // self.k.shape[1]
        keys = slice(part.start // group, part.stop // group)
        return replace(self, q=self.q[:, part], k=self.k[:, keys])

    def per_head(self, x: Tensor) -> Tensor:
        """What was computed of keys [B, K, ...] for each query head [B, H, ...]."""
        return x.repeat_interleave(self.q.shape[1] // x.shape[1], dim=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """Where each query stands among the blocks of a prompt.

    Attributes:
        prompt: the prompt.
        row: row of each query in it, int64 [B, N]; the row count where a query is padding; None if
            queries fill the rows from ``front`` on.
        front: rows before the first query; 0 with ``row``.
        queries: number of queries N.
    """

    prompt: Prompt
    row: Tensor | None
    front: int
    queries: int

    def take_back(self, x: Tensor, fill: float) -> Tensor:
        """Rows of the prompt [B, H, R, X] as queries [B, H, N, X], ``fill`` at padding."""
        if self.row is None:
            return x[:, :, self.front : self.front + self.queries]
        wide = pad(x, (0, 0, 0, 1), value=fill)
        index = self.row[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return wide.gather(2, index)


def lay(
    q: Tensor,
    k: Tensor,
    place: Tensor | None,
    size: int,
    scale: float,
    norms: Tensor | None = None,
    **layer: int,
) -> Layout:
    """Lay queries and keys out in blocks.

    Args:
        q: [B, H, N, D].
        k: [B, K, M, D], tokens first.
        place: position of each query, int64 [B, N], -1 at padding; rising by one from token to
            token. None: the queries are the last rows.
        size: tokens of a block.
        scale: factor on the logits.
        norms: of the embeddings of the keys [B, M].
        layer: ``layer`` and ``layers`` of the prompt.
    """
    batch, heads, n, width = q.shape
    device = q.device
    if place is None:
        m = k.shape[2]
        start, stop = m - n, m
        front = start % size
        rows = -(-(front + n) // size) * size
        spread = pad(q, (0, 0, front, rows - front - n)) if rows > n else q
        first = torch.full((batch,), start // size, device=device)
        begin, end = torch.full_like(first, start), torch.full_like(first, stop)
        row, span = None, (start, stop)
    else:
        token = place >= 0
        begin = place.masked_fill(~token, torch.iinfo(torch.int64).max).amin(1)
        end = place.amax(1) + 1
        begin, span = torch.minimum(begin, end), None
        first, front = begin.div(size, rounding_mode="floor"), 0
        blocks = int((-(-end // size) - first).max())
        rows = max(1, blocks) * size
        row = (place - first[:, None] * size).masked_fill(~token, rows)
        index = row[:, None, :, None].expand(-1, heads, -1, width)
        # Padding meets in one row too many, which is cut off.
        spread = q.new_zeros(batch, heads, rows + 1, width).scatter(2, index, q)[:, :, :rows]
    at = first[:, None] * size + torch.arange(rows, device=device)
    at = at.masked_fill((at < begin[:, None]) | (at >= end[:, None]), -1)
    prompt = Prompt(
        q=spread,
        k=whole(k, size),
        at=at,
        length=end,
        first=first,
        size=size,
        scale=scale,
        span=span,
        norms=None if norms is None else pad(norms, (0, -k.shape[2] % size)),
        **layer,
    )
    return Layout(prompt=prompt, row=row, front=front, queries=n)


def whole(x: Tensor, size: int) -> Tensor:
    """Rows [B, K, M, D] filled up with zeros to whole blocks."""
    missing = -x.shape[2] % size
    return pad(x, (0, 0, 0, missing)) if missing else x
