"""Block gate: a small learned scorer chooses the blocks that a row attends to, exactly.

Papers: SeerAttention (Gao et al. 2024, arXiv 2410.13276), and SeerAttention-R (2506.08889) for
``level="token"``.

    kappa_b = Wk [max, min, mean of k_j in block b]     r_i = Wq [q_i of each head of the group]
    score_ib = r_i . kappa_b / sqrt(W)                  b < i // S
    out_i    = softmax(q_i . k_j / sqrt(D)) v_j         j <= i, own block and the best top - 1

q and k as they are before rotation; r and kappa are then rotated, to the row and to the middle of
the block. Query heads that share a key head share its gate and its blocks. No gradient passes
through the choice: the gate alone is trained, by ``distill``, towards the attention that the
layer's own projections would pay to each block. O(N^2 / S W + N top S D) time.

Selection. ``level="token"`` scores each row and is strictly causal; it decodes, with the tokens so
far as its state. ``level="block"`` (published, for prompts) scores the mean query of the row's
block: tokens of that block *after* the row take part in its choice, so early rows change with
later tokens (values never leak), and it does not decode.

How ours differs from the published gate: it starts as the mean key against the mean query instead
of at random, its targets are the mass of a block (``target="max"``: the largest weight), the own
block is always seen and not scored, and blocks stand at their middle.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, W gate width, S
block size, T blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longspan.errors import InputError, Refusal
from longspan.mechanism._blocks import over_blocks
from longspan.mechanism._gate_scores import (
    chosen_blocks,
    mean_queries,
    own_block,
    pooled_keys,
)
from longspan.mechanism._gate_targets import block_mass, divergence, of_block_pairs
from longspan.mechanism._past import PastLayer, TokenState, places, tokens_first
from longspan.mechanism.layer import at_least_one, rows_at
from longspan.nn.attention import check, frequencies
from longspan.nn.rotary import rotate
from longspan.ops.inputs import without_autocast
from longspan.position import Frequencies

LEVELS = ("token", "block")
TARGETS = ("mass", "max")


class BlockGate(PastLayer):
    """Multi-head attention to gated blocks, x [B, N, d_model] to the same shape; causal only.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        block: tokens of a block S.
        top: blocks a row sees, its own included.
        width: of the gate W; default the head width.
        level: ``token``, or ``block`` (see the module text).
        rope: base of a rotary embedding or frequencies from ``longspan.position``; None: none.
        impl: kernel of ``longspan.attend``.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``bias``, ``device``, ``dtype``.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        block: int = 64,
        top: int = 16,
        width: int | None = None,
        level: str = "token",
        rope: float | Frequencies | None = None,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        width = self.head_dim if width is None else width
        at_least_one(block=block, top=top, width=width)
        if level not in LEVELS:
            raise InputError(f"level must be token or block, got {level!r}")
        self.block, self.top, self.level, self.impl = block, top, level, impl
        turns = frequencies(rope, self.head_dim)
        if isinstance(rope, Frequencies) and width != self.head_dim:
            raise InputError(
                f"rope has {len(rope.inv_freq)} frequencies, a gate of width {width} needs "
                f"{width // 2}: leave width out, or give rope as a base"
            )
        own = frequencies(rope, width)
        # The base class would rotate what the gate compares.
        self.factor = 1.0 if turns is None else turns.attention_factor
        self._inv_freq = None if turns is None else torch.from_numpy(turns.inv_freq)
        self._gate_freq = None if own is None else torch.from_numpy(own.inv_freq)
        group = heads // self.kv_heads
        self.gate_query = nn.Parameter(
            torch.empty(self.kv_heads, group * self.head_dim, width, **self.place)
        )
        self.gate_key = nn.Parameter(
            torch.empty(self.kv_heads, 3 * self.head_dim, width, **self.place)
        )
        self.reset_gate()

    @torch.no_grad()
    def reset_gate(self) -> None:
        """Score by the mean key and the mean query of the group, as far as the width allows."""
        eye = torch.eye(self.head_dim, self.gate_key.shape[-1], device=self.gate_key.device)
        group = self.heads // self.kv_heads
        self.gate_query.copy_(eye.repeat(group, 1) / group)
        self.gate_key.copy_(pad(eye, (0, 0, 2 * self.head_dim, 0)))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        state: TokenState | None = None,
        return_state: bool = False,
    ) -> Any:
        if self.level == "block" and (state is not None or return_state):
            raise Refusal(
                'BlockGate with level="block" cannot decode: its choice pools the queries of a '
                'whole block. Use level="token"'
            )
        return super().forward(x, mask, state=state, return_state=return_state)

    def ask(self, x: Tensor, place: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        # The base class rotates nothing, so it needs no places.
        q, k, v = self.project(x, place)
        if self._inv_freq is None:
            return (q, q), (k, v, k)
        turned = (rotate(t, place, self._inv_freq, self.factor) for t in (q, k))
        return (next(turned), q), (next(turned), v, k)

    def answer(
        self,
        asked: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        place: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        (turned, q), (k, v, plain) = asked, kept
        with torch.no_grad():
            asking, told = self._scored(q, plain, place)
            chosen = self._chosen(asking, told, place)
        begin = own_block(place, self.block, 1 if len(place) == 1 else len(q)) * self.block
        near, scale = (begin, place + 1), self.head_dim**-0.5
        return over_blocks(turned, k, v, [near], chosen, self.block, scale, self.impl)

    def distill(self, x: Tensor, mask: Tensor | None = None, *, target: str = "mass") -> Tensor:
        """Loss of the gate: how far its scores are from the attention it stands for.

        Args:
            x: tokens [B, N, d_model].
            mask: True at tokens, False at padding [B, N].
            target: of a block: ``mass``, the sum of its weights, mean over the heads of a group;
                or ``max``, the largest weight of any.

        Returns:
            Mean over rows of KL(target || softmax of the scores) over earlier blocks, in nats.
            Gradients reach the gate only. O(N^2 / S) memory.
        """
        if target not in TARGETS:
            raise InputError(f"target must be mass or max, got {target!r}")
        place, (turned, q), (k, _, plain) = self._look(x, mask)
        asking, told = self._scored(q, plain, place)
        wanted = block_mass(turned, k, place, self.block, largest=target == "max")
        own = own_block(place, self.block, len(x))
        number = torch.arange(told.shape[2], device=x.device)
        if self.level == "block":
            wanted = of_block_pairs(wanted, own, len(number), largest=target == "max")
            own = number[None]
        past = (number < own[..., None])[:, None]
        return divergence(asking @ told.mT, wanted, past)

    @torch.no_grad()
    def recall(self, x: Tensor, mask: Tensor | None = None, *, best: bool = False) -> Tensor:
        """Share of dense attention that falls into the chosen blocks.

        Args:
            x: tokens [B, N, d_model].
            mask: True at tokens, False at padding [B, N].
            best: the most that any choice of as many blocks could hold, instead.

        Returns:
            Mean over rows and the heads of a group [K].
        """
        place, (turned, q), (k, _, plain) = self._look(x, mask)
        mass = block_mass(turned, k, place, self.block)
        asking, told = (mass, None) if best else self._scored(q, plain, place)
        own = own_block(place, self.block, len(x))[:, None, :, None].expand(*mass.shape[:3], 1)
        seen = torch.cat([self._chosen(asking, told, place), own], dim=-1)
        real = (place >= 0).expand(len(x), -1).sum()
        return pad(mass, (0, 1)).gather(-1, seen).sum(dim=(0, 2, 3)) / real

    def _look(
        self, x: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Places, and what ``ask`` gives without its gradient."""
        check(x, self.d_model, mask)
        valid = None if mask is None else mask.to(torch.bool)
        place = places(x.shape[1], valid, x.shape[1], x.device)
        with torch.no_grad():
            asked, new = self.ask(x, place)
        return place, asked, tokens_first(valid, *new)

    @without_autocast
    def _scored(self, q: Tensor, k: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """What rows (or blocks) ask with, scaled, and what blocks answer [B, K, N or T, W]."""
        work = torch.promote_types(q.dtype, torch.float32)
        q, told = q.to(work), pooled_keys(k.to(work), self.block) @ self.gate_key.to(work)
        blocks = told.shape[2]
        middle = torch.arange(blocks, device=q.device) * self.block + (self.block - 1) // 2
        if self.level == "block":
            q, place = mean_queries(q, place, self.block, blocks), middle[None]
        group = q.unflatten(1, (self.kv_heads, -1)).transpose(2, 3).flatten(3)
        asking = group @ self.gate_query.to(work) * self.gate_query.shape[-1] ** -0.5
        if self._gate_freq is not None:
            asking = rotate(asking, place, self._gate_freq, self.factor)
            told = rotate(told, middle, self._gate_freq, self.factor)
        return asking, told

    def _chosen(self, asking: Tensor, told: Tensor | None, place: Tensor) -> Tensor:
        """Best past blocks of each row, see ``chosen_blocks``; rows of a block share theirs."""
        if self.level == "block" and told is not None:
            asking = rows_at(asking, own_block(place, self.block, len(asking)))
        return chosen_blocks(asking, told, place, self.block, self.top - 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}, top={self.top}, level={self.level!r}"
