"""Synthesizer: attention weights without comparing tokens.

Paper: Synthesizer, Rethinking Self-Attention (Tay et al. 2020, arXiv 2005.00743). Logits B, one
matrix per head, out = softmax(B) v:

    dense             B_ij = w2_j . relu(W1 x_i + b1) + b2_j
    random            B = R [L, L], learned or fixed
    factorized        B = R1 R2^T, R1 and R2 [L, r]
    factorized_dense  B_ij = a_i[j // s] b_i[j mod s], a_i and b_i from x_i as in ``dense``
    dot_product       B_ij = q_i . k_j / sqrt(D)

and a mixture is sum_t softmax(alpha)_t B_t. A sequence is at most ``max_length`` = L long. Causal
masking is exact: row i of B depends on x_i alone. O(N^2) time for all.

On top of the paper: dense, factorized and dot-product logits are inner products, of [relu(..), 1]
with the *constant* keys [w2_j, b2_j], and so on; they and their mixtures are run as ordinary
attention, whose kernels never hold an N x N matrix. Random and factorized_dense logits do.

Decoding keeps the values so far, and the keys of ``dot_product``.

Axes: B batch, H heads, K value heads, N rows (the last of M), M keys, L longest sequence, F hidden
width, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.mechanism._past import PastLayer, TokenState
from longspan.mechanism._range_op import over_ranges
from longspan.mechanism.layer import at_least_one, check_state
from longspan.nn.attention import check
from longspan.ops import attend
from longspan.pattern import Causal, Dense

KINDS = ("dense", "random", "factorized", "factorized_dense", "dot_product")


class Synthesizer(PastLayer):
    """Multi-head synthetic attention, x [B, N, d_model] to the same shape.

    Args:
        d_model: width of the tokens.
        heads: heads.
        kind: one of ``dense``, ``random``, ``factorized``, ``factorized_dense``,
            ``dot_product``, or several of them for their mixture.
        max_length: longest sequence L.
        hidden: width F of the dense kinds; default the head width.
        rank: r of ``factorized``.
        fixed_random: R is not learned.
        causal: row i sees tokens up to i.
        impl: kernel of ``longspan.attend``; none runs where ``random`` or ``factorized_dense`` is
            among the kinds, whose logits are held.
        kwargs: of ``MechanismLayer``: ``kv_heads`` (of the values, and of the keys of
            ``dot_product``), ``head_dim``, ``rope``, ``bias``, ``device``, ``dtype``.
    """

    near_dense: ClassVar[Mapping[str, Any]] = {"kind": ("dot_product", "dense")}

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kind: str | Sequence[str] = "dense",
        max_length: int = 512,
        hidden: int | None = None,
        rank: int = 8,
        fixed_random: bool = False,
        causal: bool = True,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        several = isinstance(kind, Sequence) and not isinstance(kind, str)
        self.kinds: tuple[Any, ...] = tuple(kind) if several else (kind,)
        if not self.kinds or any(one not in KINDS for one in self.kinds):
            raise InputError(f"kind must be one or several of {', '.join(KINDS)}; got {kind!r}")
        if len(set(self.kinds)) != len(self.kinds):
            raise InputError(f"each kind can be mixed in once; got {kind!r}")
        width = self.head_dim if hidden is None else hidden
        at_least_one(max_length=max_length, hidden=width, rank=rank)
        self.max_length, self.causal, self.impl = max_length, causal, impl
        if "dot_product" not in self.kinds:
            self.register_module("query", None)
            self.register_module("key", None)
        if "dense" in self.kinds:
            self.dense_hidden = nn.Linear(d_model, heads * width, **self.place)
            self.dense_key = self._parameter(heads, max_length, width)
            self.dense_bias = nn.Parameter(torch.zeros(heads, max_length, **self.place))
        if "random" in self.kinds:
            random = torch.randn(heads, max_length, max_length, **self.place)
            self.random = nn.Buffer(random) if fixed_random else nn.Parameter(random)
        if "factorized" in self.kinds:
            self.factor_query = self._parameter(heads, max_length, rank)
            self.factor_key = self._parameter(heads, max_length, rank)
        if "factorized_dense" in self.kinds:
            self.side = -(-max_length // max(1, int(max_length**0.5)))
            self.coarse = nn.Linear(d_model, heads * width, **self.place)
            self.fine = nn.Linear(d_model, heads * width, **self.place)
            self.coarse_key = self._parameter(heads, -(-max_length // self.side), width)
            self.fine_key = self._parameter(heads, self.side, width)
        if len(self.kinds) > 1:
            self.mixture = nn.Parameter(torch.zeros(len(self.kinds), **self.place))

    @torch.no_grad()
    def start_near_dense(self) -> None:
        """Give nearly all weight to the dot product, where it is part of a mixture."""
        if "dot_product" in self.kinds and len(self.kinds) > 1:
            self.mixture.fill_(-4.0)
            self.mixture[self.kinds.index("dot_product")] = 4.0

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        state: TokenState | None = None,
        return_state: bool = False,
    ) -> Any:
        if not self.causal and (state is not None or return_state):
            raise InputError("a state exists only for causal=True")
        check(x, self.d_model, mask)
        check_state(state, TokenState, "kept", len(x), self.kv_heads)
        rows = x.shape[1] + (0 if state is None else state.kept[0].shape[2])
        if rows > self.max_length:
            raise InputError(f"the layer was made for {self.max_length} rows, got {rows}")
        return super().forward(x, mask, state=state, return_state=return_state)

    def ask(self, x: Tensor, place: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if "dot_product" in self.kinds:
            q, k, v = self.project(x, place)
            return (x, q), (v, k)
        return (x,), (self.value(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2),)

    def answer(
        self,
        asked: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        place: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        q, k, extra = self._logits(asked, kept, place.clamp_min(0))
        v = kept[0].repeat_interleave(self.heads // self.kv_heads, dim=1).to(q.dtype)
        if extra is None and valid is None and q.shape[2] == k.shape[2]:
            pattern = Causal() if self.causal else Dense()
            return attend(q, k, v, pattern, scale=1.0, impl=self.impl)
        # Keys that each row sees; padding sees none.
        seen = place + 1
        if not self.causal:
            seen = seen.amax(dim=-1, keepdim=True).where(place >= 0, 0)
        seen = seen[:, None, :, None]
        if extra is None:
            return over_ranges(q, k, v, torch.zeros_like(seen), seen, 1.0, self.impl)[0]
        return _softmax(extra if q.shape[-1] == 0 else extra + q @ k.mT, seen) @ v

    def _logits(
        self, asked: tuple[Tensor, ...], kept: tuple[Tensor, ...], place: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [B, H, N, R] and keys [B, H, M, R] whose product, plus a matrix if any, are the
        logits.
        """
        x, count = asked[0], kept[0].shape[2]
        shares = x.new_ones(1) if len(self.kinds) == 1 else self.mixture.softmax(dim=0)
        nothing = x.new_empty(1, 1, 1, 0)
        queries, keys, extra = [nothing], [nothing], None
        for kind, share in zip(self.kinds, shares.to(x), strict=True):
            if kind == "dense":
                h = self._split(self.dense_hidden(x).relu())
                queries += [h * share, share.expand(1, 1, 1, 1)]
                keys += [self.dense_key[:, :count], self.dense_bias[:, :count, None]]
            elif kind == "factorized":
                queries.append(self.factor_query[:, place].transpose(0, 1) * share)
                keys.append(self.factor_key[:, :count])
            elif kind == "dot_product":
                queries.append(asked[1] * (share * self.head_dim**-0.5))
                keys.append(kept[1].repeat_interleave(self.heads // self.kv_heads, dim=1))
            else:
                part = self._matrix(kind, x, place)[..., :count] * share
                extra = part if extra is None else extra + part
        q, k = (
            torch.cat([p.expand(len(x), self.heads, rows, -1) for p in parts], dim=-1)
            for parts, rows in ((queries, x.shape[1]), (keys, count))
        )
        return q, k, extra

    def _matrix(self, kind: str, x: Tensor, place: Tensor) -> Tensor:
        """Logits [1 or B, H, N, L or a few more]."""
        if kind == "random":
            return self.random[:, place].transpose(0, 1)
        a = self._split(self.coarse(x).relu()) @ self.coarse_key.mT
        b = self._split(self.fine(x).relu()) @ self.fine_key.mT
        return (a[..., :, None] * b[..., None, :]).flatten(-2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, **self.place) * shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kinds}, max_length={self.max_length}"


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Weights of the first ``seen`` keys [1 or B, 1, N, 1] of each row."""
    hidden = torch.arange(logits.shape[-1], device=logits.device) >= seen
    # A row of padding is computed unmasked, then zeroed.
    empty = seen == 0
    return logits.masked_fill(hidden & ~empty, -torch.inf).softmax(dim=-1).masked_fill(empty, 0.0)
