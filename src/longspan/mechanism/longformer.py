"""Longformer: a window, and global tokens with projections of their own.

Paper: Longformer (Beltagy et al. 2020, arXiv 2004.05150).

    out_i = softmax(q_i . k_j / sqrt(D)) v_j        |i - j| <= w / 2, or j global
    out_g = softmax(q'_g . k'_j / sqrt(D)) v'_j     all j, for global g

q, k, v are the local projections and q', k', v' the global ones. Local rows read global tokens
through the *local* keys, each key once. O(N (w + G) D) time for G global tokens, O(N) memory.

There is no causal form: a global token sees all later tokens, and all tokens see it. (Without
projections of their own, ``longspan.longformer(..., causal=True)`` is a pattern for
``longspan.nn.Attention``.)

How ours differs from the class in transformers: any length, gaps in the window per head as in the
authors' own kernel, grouped queries, rotary embeddings, float64, and places count tokens, so that
padding may stand anywhere. Window and global keys are two passes merged by log-sum-exp.

Axes: B batch, H query heads, K key heads, N rows, G most global tokens of a batch row, D head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.mechanism.layer import MechanismLayer, cleared, positions, rows_at, to_front
from longspan.nn.attention import check
from longspan.nn.rotary import rotate
from longspan.ops import attend, merge
from longspan.pattern import longformer


class LongformerAttention(MechanismLayer):
    """Multi-head Longformer attention, x [B, N, d_model] to the same shape; two-sided only.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        window: keys of the window in all, w; w / 2 on each side.
        dilation: gaps of the window; a list gives one to each equal run of heads.
        global_tokens: places of global tokens, the same in every sequence, padding not counted;
            ``forward`` takes others.
        causal: only False is possible.
        impl: kernel of ``longspan.attend``.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``rope``, ``bias``,
            ``project_output``, ``device``, ``dtype``.

    Raises:
        Refusal: for ``causal=True``.
    """

    no_causal_form = "global tokens see, and show, later tokens"

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        window: int = 512,
        dilation: int | Sequence[int] = 1,
        global_tokens: Sequence[int] = (),
        causal: bool = False,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        if causal:
            self.refuse_causal()
        local = longformer(window, dilation=dilation)
        local.check(heads)
        listed = isinstance(global_tokens, Sequence) and not isinstance(global_tokens, str)
        if not listed or any(not isinstance(t, int) or t < 0 for t in global_tokens):
            raise InputError(f"global_tokens must be places from 0, got {global_tokens!r}")
        self.local, self.impl = str(local), impl
        self.global_tokens = tuple(global_tokens)
        bias, width = self.query.bias is not None, self.kv_heads * self.head_dim
        self.query_global = nn.Linear(d_model, heads * self.head_dim, bias=bias, **self.place)
        self.key_global = nn.Linear(d_model, width, bias=bias, **self.place)
        self.value_global = nn.Linear(d_model, width, bias=bias, **self.place)

    @classmethod
    def from_hf(cls, layer: Any) -> LongformerAttention:
        """Copy a ``LongformerSelfAttention`` of transformers: same weights, same outputs.

        Its mask is given here as ``mask`` (not -10000) and ``global_mask`` (10000).
        """
        own = cls(
            layer.embed_dim,
            layer.num_heads,
            head_dim=layer.head_dim,
            window=2 * layer.one_sided_attn_window_size,
            bias=True,
            project_output=False,
            device=layer.query.weight.device,
            dtype=layer.query.weight.dtype,
        )
        own.load_state_dict(layer.state_dict())
        return own

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, global_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: tokens [B, N, d_model].
            mask: True at tokens, False at padding [B, N].
            global_mask: True at global tokens [B, N]; default: those of ``global_tokens``.

        Returns:
            [B, N, d_model]. At padding the attention is 0.
        """
        check(x, self.d_model, mask)
        check(x, self.d_model, global_mask)
        valid = None if mask is None else mask.to(torch.bool)
        (x,) = cleared(valid, x)
        place = positions(x, valid)
        q, k, v = self.project(x, place)
        own = None if valid is None else valid.to(torch.int64) - 1
        is_global = self._global(x, place, valid, global_mask)
        if is_global is None:
            return self.join(attend(q, k, v, self.local, segments=own, impl=self.impl))
        own = torch.zeros_like(is_global, dtype=torch.int64) if own is None else own
        place = place.expand_as(own)
        near = attend(
            q,
            k,
            v,
            self.local,
            positions=place,
            segments=own,
            key_positions=place,
            key_segments=own.masked_fill(is_global, -1),
            return_lse=True,
            impl=self.impl,
        )
        order, real = _front(is_global)
        seen = real.to(torch.int64) - 1
        far = attend(
            q,
            rows_at(k, order),
            rows_at(v, order),
            "dense()",
            positions=place,
            segments=own,
            key_positions=place.gather(1, order),
            key_segments=seen,
            return_lse=True,
            impl=self.impl,
        )
        out = merge([near, far])[0]
        asking = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
        qg = self._heads(self.query_global(asking), place.gather(1, order))
        kg = self._heads(self.key_global(x), place)
        vg = self._heads(self.value_global(x), None)
        whole = attend(qg, kg, vg, "dense()", segments=seen, key_segments=own, impl=self.impl)
        # Rows of ``order`` that are not global stay what they are.
        whole = torch.where(real[:, None, :, None], whole, rows_at(out, order))
        return self.join(out.scatter(2, order[:, None, :, None].expand_as(whole), whole))

    def _global(
        self, x: Tensor, place: Tensor, valid: Tensor | None, given: Tensor | None
    ) -> Tensor | None:
        """Which rows are global [B, N]; None if there are no global tokens."""
        if given is None:
            if not self.global_tokens:
                return None
            listed = torch.tensor(self.global_tokens, device=x.device)
            given = (place[..., None] == listed).any(dim=-1).expand(x.shape[:2])
        given = given.to(torch.bool)
        return given if valid is None else given & valid

    def _heads(self, x: Tensor, place: Tensor | None) -> Tensor:
        """Projected rows [B, N, width] by heads, rotated to ``place`` if there is a rotation."""
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.rope is None or place is None:
            return x
        return rotate(x, place, self._inv_freq, self.rope.attention_factor)

    def extra_repr(self) -> str:
        words = f"{super().extra_repr()}, local={self.local}"
        return f"{words}, global_tokens={self.global_tokens}" if self.global_tokens else words


def _front(is_global: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that are global, padded to their largest number [B, G], and which of them are real."""
    order, _ = to_front(is_global)
    if not torch.compiler.is_compiling():
        # A compiled graph cannot depend on the number, and carries every row along.
        order = order[:, : max(1, int(is_global.sum(dim=-1).max()))]
    return order, is_global.gather(1, order)
