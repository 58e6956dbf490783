"""Move the keys and values that ranks ask for, and their gradients back.

    forward    k[send] -> others,  used = k[kept] and what comes
    backward   d used[get] -> their owners,  dk = sum of d used[kept] and of what comes

One all-to-all of uneven parts each way, with keys and values side by side; a rank from which
nothing is asked is sent nothing. Gradients of a key that several ranks see add up in float32
(float64 for float64), always in the order of the ranks.

Axes: B batch, K key heads, P rows of this rank, U rows that it uses, D and Dv widths.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.parallel.needs import Index, Route

_kept: WeakKeyDictionary[Route, dict[tuple[object, ...], _Lines]] = WeakKeyDictionary()


class _Lines:
    """A route as tensors on a device, for a number of batch rows."""

    def __init__(self, route: Route, batch: int, device: torch.device) -> None:
        def flat(index: Index, rows: int) -> Tensor:
            """Batch rows that are alike ask for the same rows."""
            step = route.key_heads * rows
            every = np.arange(batch // route.batch)[:, None] * step * route.batch + index
            return torch.from_numpy(every.ravel()).to(device)

        self.kept = flat(route.kept[0], route.own), flat(route.kept[1], route.used)
        self.send = [flat(index, route.own) for index in route.send]
        self.get = [flat(index, route.used) for index in route.get]


def _lines(route: Route, batch: int, device: torch.device) -> _Lines:
    kept = _kept.setdefault(route, {})
    if (batch, device) not in kept:
        kept[batch, device] = _Lines(route, batch, device)
    return kept[batch, device]


def exchange(
    k: Tensor, v: Tensor, route: Route, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The keys and values that this rank uses, in the order of the whole sequence; differentiable.

    All ranks of the group call it, and all of them or none run its backward.

    Args:
        k: keys of this rank [B, K, P, D].
        v: values of this rank [B, K, P, Dv].
        route: of this rank.
        group: None for all ranks.

    Returns:
        Keys [B, K, U, D] and values [B, K, U, Dv]; 0 where a head does not see a row.
    """
    return _Exchange.apply(k, v, route, group)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, route: Route, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        lines = _lines(route, len(k), k.device)
        ctx.lines, ctx.group, ctx.rows = lines, group, route.own
        come = _all_to_all(k, v, lines.send, lines.get, group)
        place = torch.cat([lines.kept[1], *lines.get])
        used = []
        for x, moved in zip((k, v), come.split([k.shape[3], v.shape[3]], dim=1), strict=True):
            found = x.new_zeros(*x.shape[:2], route.used, x.shape[3])
            rows = torch.cat([x.reshape(-1, x.shape[3])[lines.kept[0]], moved])
            found.view(-1, x.shape[3])[place] = rows
            used.append(found)
        return used[0], used[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        lines: _Lines = ctx.lines
        dk, dv = grads
        come = _all_to_all(dk, dv, lines.get, lines.send, ctx.group)
        sizes = [len(index) for index in lines.send]
        found = []
        for d, moved in zip((dk, dv), come.split([dk.shape[3], dv.shape[3]], dim=1), strict=True):
            width = d.shape[3]
            wide = torch.promote_types(d.dtype, torch.float32)
            own = d.new_zeros(*d.shape[:2], ctx.rows, width, dtype=wide)
            flat = own.view(-1, width)
            flat[lines.kept[0]] = d.reshape(-1, width)[lines.kept[1]].to(wide)
            # A rank asks for a row once: no two of these meet, and sums are the same every time.
            for index, part in zip(lines.send, moved.split(sizes), strict=True):
                flat[index] += part.to(wide)
            found.append(own.to(d.dtype))
        return found[0], found[1], None, None


def _all_to_all(
    x: Tensor, y: Tensor, send: list[Tensor], get: list[Tensor], group: dist.ProcessGroup | None
) -> Tensor:
    """Send rows of two tensors [B, K, rows, D], side by side; what comes [rows, 2 D]."""
    index = torch.cat(send)
    both = [t.reshape(-1, t.shape[3])[index] for t in (x, y)]
    sent = torch.cat(both, dim=1)
    counts = [len(rows) for rows in get]
    come = sent.new_empty(sum(counts), sent.shape[1])
    dist.all_to_all_single(come, sent, counts, [len(rows) for rows in send], group=group)
    return come
