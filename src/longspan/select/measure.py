"""What a method is worth: how much attention mass it keeps, and from which length it pays.

``recall`` compares the executed selection with dense attention on a few rows. ``break_even`` runs
method and exact attention (``attend``, what shorter prompts get) on this machine, at doubling
lengths, until the method is faster twice in a row; answers are kept while the process lives and
nothing is measured before it is asked for.

Axes: B batch, H query heads, P rows that are looked at, M keys, D head width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longspan.nn.rotary import rotate
from longspan.ops import attend
from longspan.pattern import Causal
from longspan.position import default
from longspan.select.attention import Selected, select
from longspan.select.estimate import weights
from longspan.select.method import Method, Term, method

# Lengths that are tried; a chunk that is shorter than the first is not worth an estimate.
SHORTEST, LONGEST = 1024, 131072


@torch.no_grad()
def recall(found: Selected, rows: int = 64) -> Tensor:
    """Share of the dense attention mass that is kept, mean over some rows: float [B, H].

    A measurement: no gradients flow through it.

    Args:
        found: a selection.
        rows: looked at, evenly spread; O(rows M D) time.
    """
    prompt = found.layout.prompt
    stands = prompt.at >= 0
    count = stands.sum(1)
    share = torch.linspace(0, 1, rows, device=count.device)
    place = share * (count - 1).clamp(min=0)[:, None]
    first = stands.int().argmax(1)
    row = first[:, None] + place.round().long()
    at = prompt.at.gather(1, row)
    group = prompt.q.shape[1] // prompt.k.shape[1]
    shares = []
    # A key head at a time: rows M weights for each of its queries' heads.
    for start in range(0, prompt.q.shape[1], group):
        part = slice(start, start + group)
        own = prompt.heads(part)
        index = row[:, None, :, None].expand(-1, group, -1, own.q.shape[3])
        mass = weights(own.q.gather(2, index), at, own)
        shares.append((mass * found.selection.heads(part).rows(own, row)).sum(-1))
    real = (at >= 0)[:, None]
    return (torch.cat(shares, 1) * real).sum(-1) / real.sum(-1).clamp(min=1)


def break_even(
    what: Method | Term | str,
    *,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    seconds: float = 5.0,
    longest: int = LONGEST,
) -> int:
    """Prompt length from which a method is faster than dense attention on this machine.

    Both are timed on one prompt of made-up queries and keys (``sample``), estimation included, at
    lengths that double from 1024 on. What a prompt of one's own gives depends on how many keys
    methods with a coverage find there.

    Args:
        what: the method.
        heads: query heads.
        kv_heads: key heads.
        width: head width.
        dtype: of queries, keys and values.
        device: where.
        seconds: no length is tried that would end later, by four times the last one's time.
        longest: last length that is tried.

    Returns:
        The shortest length tried from which on the method was faster; if it never was, twice the
        longest length tried.
    """
    return _break_even(
        method(what), heads, kv_heads, width, dtype, str(torch.device(device)), seconds, longest
    )


@lru_cache(maxsize=64)
def _break_even(
    what: Method,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    seconds: float,
    longest: int,
) -> int:
    begin, n, won = time.perf_counter(), SHORTEST, 0
    while True:
        start = time.perf_counter()
        q, k, v = sample(n, heads, kv_heads, width, dtype=dtype, device=device)

        def sparse(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return select(q, k, v, what).attend()[0]

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return attend(q, k, v, Causal())

        won = won + 1 if best_time(sparse, device) < best_time(dense, device) else 0
        # Dense attention takes four times as long at twice the length.
        now = time.perf_counter()
        over = now - begin + 4 * (now - start) > seconds or 2 * n > longest
        if won == 2 or (won and over):
            return n // 2 ** (won - 1)
        if over:
            return 2 * n
        n *= 2


@torch.no_grad()
def sample(
    n: int,
    heads: int,
    kv_heads: int,
    width: int,
    *,
    dtype: torch.dtype,
    device: Any,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, H, N, D], keys and values [1, K, N, D] with attention as models have it.

    Content is random around a common direction and rotated by position, so that weights fall with
    the distance; the first keys draw attention from everywhere, and so do a few others.
    """
    make = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=device)

    frequencies = torch.from_numpy(default(width, 10000.0).inv_freq)
    place = torch.arange(n, device=device)
    heavy = torch.cat([place[:4], torch.randint(n, (8,), generator=make, device=device)])
    parts = []
    # A key head at a time: in half precision a long sample is smaller than one made in float32.
    for _ in range(kv_heads):
        common = draw(1, 1, 1, width)
        common = 3.0 * common / common.norm() * width**0.25
        k = rotate(common + 0.5 * draw(1, 1, n, width), place, frequencies)
        q = rotate(common + 0.5 * draw(1, heads // kv_heads, n, width), place, frequencies)
        # What queries have in common over all positions.
        direction = q.mean((0, 1, 2))
        k[:, :, heavy] += 4.0 * direction / direction.norm() * width**0.25
        parts.append([x.to(dtype) for x in (q, k, draw(1, 1, n, width))])
    q, k, v = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return q, k, v


@torch.no_grad()
def best_time(run: Callable[[], Any], device: str, times: int = 2) -> float:
    """Seconds of the fastest of a few runs after one that compiles."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    found = []
    for _ in range(times + 1):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - begin)
    return min(found[1:])
