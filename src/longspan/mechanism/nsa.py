"""NSA: compressed blocks, selected blocks and a window, mixed by gates.

Paper: Native Sparse Attention (Yuan et al. 2025, arXiv 2502.11089). Each branch has its own keys
and values, gates are sigmoids of the token, one per head and branch:

    compression  attention to phi(block), blocks of l tokens, one every st, once they have ended
    selection    attention to the tokens of the best blocks of l' tokens; a block scores the
                 weights that compression gave to the blocks it overlaps, summed over the query
                 heads of a key head, which select together. First, own and previous block always
    window       the last w tokens
    out          g_c compression + g_s selection + g_w window

O(N (N / st + n l' + w) D) time for n selected blocks. Paper: l 32, st 16, l' 64, n 16, w 512. No
gradient passes through the selection; compression trains what selects.

How ours differs: the paper's sum over indices (equation 9, whose signs are questioned) is read as
overlap of blocks. Compression compares queries and keys that are *not* rotated (a mean of rotated
keys loses high frequencies); selection and window rotate them. phi is the mean, or the mean plus a
small MLP over a block with position codes, which starts at 0. Selected blocks go to any kernel as
key ranges, with grouped heads of any size. Padding: blocks count tokens.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.mechanism._nsa_branches import compression, selection
from longspan.mechanism._past import PastLayer
from longspan.mechanism.layer import at_least_one
from longspan.nn.attention import frequencies
from longspan.nn.rotary import rotate
from longspan.ops import attend
from longspan.position import Frequencies


class NSA(PastLayer):
    """Multi-head native sparse attention, x [B, N, d_model] to the same shape; causal only.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        block: tokens of a compressed block l.
        stride: tokens between the starts of compressed blocks st, at most ``block``.
        select_block: tokens of a selected block l'.
        select: selected blocks per row n, at least 3: first, own and previous are among them.
        window: w, the row itself included.
        compress: ``mean``, or ``learned``.
        rope: base of a rotary embedding or frequencies from ``longspan.position``; None: none.
        impl: kernel of ``longspan.attend``.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``bias``, ``device``, ``dtype``.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        block: int = 32,
        stride: int = 16,
        select_block: int = 64,
        select: int = 16,
        window: int = 512,
        compress: str = "mean",
        rope: float | Frequencies | None = None,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        at_least_one(
            block=block, stride=stride, select_block=select_block, select=select, window=window
        )
        if stride > block:
            raise InputError(
                f"stride must be at most block, or tokens are skipped; got {stride} and {block}"
            )
        if select < 3:
            raise InputError(f"select must be at least 3 (first, previous, own), got {select}")
        if compress not in ("mean", "learned"):
            raise InputError(f"compress must be mean or learned, got {compress!r}")
        self.block, self.stride, self.window, self.impl = block, stride, window, impl
        self.select_block, self.select = select_block, select
        bias, width = self.query.bias is not None, self.kv_heads * self.head_dim
        # ``key`` and ``value`` of the base class are those of the selection.
        make = partial(nn.Linear, d_model, width, bias=bias, **self.place)
        self.key_compressed, self.value_compressed = make(), make()
        self.key_window, self.value_window = make(), make()
        self.gate = nn.Linear(d_model, 3 * heads, **self.place)
        learned = compress == "learned"
        self.phi_key = _Phi(block, self.head_dim, **self.place) if learned else None
        self.phi_value = _Phi(block, self.head_dim, **self.place) if learned else None
        # The base class would rotate what compression compares.
        turns = frequencies(rope, self.head_dim)
        self.factor = 1.0 if turns is None else turns.attention_factor
        self._inv_freq = None if turns is None else torch.from_numpy(turns.inv_freq)

    @torch.no_grad()
    def start_near_dense(self) -> None:
        """Copy the projections to each branch, and open the gate of the window alone."""
        for branch in ("compressed", "window"):
            for part in ("key", "value"):
                own = getattr(self, f"{part}_{branch}")
                own.load_state_dict(getattr(self, part).state_dict())
        nn.init.zeros_(self.gate.weight)
        # Sigmoids of 0.0025, 0.0025 and 0.9975: open or closed, and still with a gradient.
        start = torch.tensor([-6.0, -6.0, 6.0], device=self.gate.bias.device).repeat_interleave(
            self.heads
        )
        self.gate.bias.copy_(start)

    def ask(self, x: Tensor, place: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        # The base class rotates nothing, so it needs no places.
        q, k, v = self.project(x, place)
        more = (self.key_compressed, self.value_compressed, self.key_window, self.value_window)
        kc, vc, kw, vw = (
            part(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for part in more
        )
        gate = self.gate(x).sigmoid().unflatten(-1, (3, self.heads)).permute(2, 0, 3, 1)[..., None]
        new = (self._turn(k, place), v, kc, vc, self._turn(kw, place), vw)
        return (q, self._turn(q, place), gate), new

    def answer(
        self,
        asked: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        place: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        q, turned, gate = asked
        k, v, kc, vc, kw, vw = kept
        # Queries of padding see nothing; keys of padding lie behind every query.
        asking = None if valid is None else place.clamp_max(0)
        known = None if valid is None else torch.zeros_like(valid, dtype=torch.int64)
        phi = None
        if self.phi_key is not None and self.phi_value is not None:
            phi = self.phi_key, self.phi_value
        sizes = self.block, self.stride
        compressed, weigh = compression(q, kc, vc, place, *sizes, self.impl, phi)
        selected = selection(
            turned, k, v, weigh, place, *sizes, self.select_block, self.select, self.impl
        )
        near = attend(
            turned,
            kw,
            vw,
            f"window({self.window})",
            positions=None if valid is None else place.clamp_min(0),
            segments=asking,
            key_positions=None if valid is None else torch.arange(k.shape[2], device=k.device),
            key_segments=known,
            impl=self.impl,
        )
        return gate[0] * compressed + gate[1] * selected + gate[2] * near

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        if self._inv_freq is None:
            return x
        return rotate(x, place, self._inv_freq, self.factor)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, block={self.block}, stride={self.stride}, "
            f"select_block={self.select_block}, select={self.select}, window={self.window}"
        )


class _Phi(nn.Module):
    """Mean of a block, plus an MLP over its tokens with position codes that starts at 0."""

    def __init__(self, block: int, width: int, **place: Any) -> None:
        super().__init__()
        self.block = block
        self.code = nn.Parameter(torch.randn(block, width, **place) * width**-0.5)
        self.inner = nn.Linear(block * width, width, **place)
        self.outer = nn.Linear(width, width, **place)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, stride: int) -> Tensor:
        """Blocks of x [B, K, M, D] to [B, K, S, D]."""
        block = x.unfold(2, self.block, stride).mT
        more = self.inner((block + self.code).flatten(-2))
        return block.mean(dim=3) + self.outer(nn.functional.gelu(more))
