"""LSH attention: tokens that hash alike attend to each other.

Paper: Reformer (Kitaev et al. 2020, arXiv 2001.04451).

    k_j = q_j / |q_j|,   h(x) = argmax [x R; -x R],   logits q_i . k_j, a token sees itself only
                                                      if it sees nothing else
    per round: sort by (h, position), cut into chunks of c, attend to own chunk and ``before``
    previous ones; rounds are joined by their log-sum-exp

O(rounds N c D) time plus sorting. The chunks of all rounds form one ring: the first chunk of a
round looks back into the last one of the round before.

``counting="multiset"`` is what the published code computes: a key met in several rounds counts
as often. ``"union"`` is the paper's appendix: its weight is divided by that number.

Selection. ``selection="chunks"`` (published) is causal in values but not in selection: how many
*later* tokens share a bucket moves chunk borders, so outputs of early rows change with later
tokens. ``selection="window"`` is ours and strictly causal: a row sees the last ``c (1 + before)``
earlier tokens of its own bucket. It decodes, with the tokens so far as its state.

On top of the paper: any length (padding fills the last chunk unseen), and padding changes no
token's row; inside a chunk, rows are
re-sorted by position, so that what a row sees is one range and runs on any kernel.

Axes: B batch, H heads, R rounds, N rows, D head width, T chunks of C rows over all rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longspan.errors import InputError, Refusal
from longspan.mechanism._lsh_attention import check_names, hash_buckets, lsh_attention
from longspan.mechanism._lsh_rounds import over_window
from longspan.mechanism.layer import (
    Count,
    MechanismLayer,
    at_least,
    at_least_one,
    check_state,
    cleared,
    positions,
    seen,
)
from longspan.nn.attention import check


@dataclass(frozen=True, kw_only=True)
class LSHState:
    """What decoding keeps: every token so far, O(N).

    Attributes:
        qk: shared queries and keys [B, H, N, D].
        v: values [B, H, N, D].
        bucket: [B, H, R, N]; negative at padding.
        count: tokens seen, per batch row where padding makes them differ.
    """

    qk: Tensor
    v: Tensor
    bucket: Tensor
    count: Count


class LSHAttention(MechanismLayer):
    """Multi-head LSH attention, x [B, N, d_model] to the same shape.

    Args:
        d_model: width of the tokens.
        heads: heads.
        buckets: number of buckets, even; several even numbers for a product of hashes. Fixed,
            so that a token's bucket does not depend on the length; about 2 N / chunk is usual.
        rounds: hash rounds R.
        chunk: rows of a chunk.
        before: chunks looked at before the own one.
        after: chunks looked at after it.
        causal: row i sees tokens before it.
        selection: ``chunks`` (published; early rows move with later tokens) or ``window``
            (strictly causal).
        counting: ``multiset`` or ``union``.
        padded_ring: as published; rows then change with the padding.
        scale: factor on the logits q . k / |k|.
        impl: kernel name, or ``auto``.
        generator: source of the rotations; default: torch's global one.
        kwargs: of ``MechanismLayer``: ``head_dim``, ``rope``, ``bias``, ``project_output``,
            ``device``, ``dtype``.
    """

    near_dense: ClassVar[Mapping[str, Any]] = {"selection": "window"}
    grouped = False

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        buckets: int | tuple[int, ...] = 64,
        rounds: int = 4,
        chunk: int = 64,
        before: int = 1,
        after: int = 0,
        causal: bool = True,
        selection: str = "chunks",
        counting: str = "multiset",
        padded_ring: bool = False,
        scale: float = 1.0,
        impl: str = "auto",
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, shared_key=True, **kwargs)
        at_least_one(rounds=rounds, chunk=chunk)
        at_least(0, before=before, after=after)
        self.buckets = tuple(buckets) if isinstance(buckets, tuple | list) else (buckets,)
        if not self.buckets or any(not isinstance(b, int) or b < 2 or b % 2 for b in self.buckets):
            raise InputError(f"buckets must be even numbers, got {buckets!r}")
        self.options: dict[str, Any] = {
            "chunk": chunk,
            "before": before,
            "after": after,
            "causal": causal,
            "selection": selection,
            "counting": counting,
            "padded_ring": padded_ring,
            "scale": scale,
            "impl": impl,
        }
        check_names(selection, counting, causal, after, rounds)
        shape = (self.heads, self.head_dim, rounds, sum(self.buckets) // 2)
        self.rotations = nn.Buffer(
            torch.randn(shape, generator=generator, device="cpu").to(**self.place)
        )

    @classmethod
    def from_hf(cls, layer: Any) -> LSHAttention:
        """Copy an ``LSHSelfAttention`` of transformers: same weights, buckets and outputs.

        Its rotations are drawn anew in every call unless ``hash_seed`` is set, so only a layer
        with a seed (and, as it is found out in its first call, a number of buckets) has an
        output to reproduce.

        Raises:
            InputError: if either is missing.
        """
        if layer.hash_seed is None or layer.num_buckets is None:
            raise InputError(
                "the layer hashes at random: set hash_seed and num_buckets in its config; got "
                f"hash_seed={layer.hash_seed!r}, num_buckets={layer.num_buckets!r}"
            )
        weight = layer.query_key.weight
        own = cls(
            layer.hidden_size,
            layer.num_attention_heads,
            head_dim=layer.attention_head_size,
            buckets=layer.num_buckets,
            rounds=layer.num_hashes,
            chunk=layer.chunk_length,
            before=layer.num_chunks_before,
            after=layer.num_chunks_after,
            causal=bool(layer.is_decoder),
            padded_ring=True,
            project_output=False,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            own.query.weight.copy_(weight)
            own.value.weight.copy_(layer.value.weight)
            source = torch.Generator().manual_seed(layer.hash_seed)
            drawn = torch.randn(
                own.rotations.shape, generator=source, dtype=weight.dtype, device="cpu"
            )
            own.rotations.copy_(drawn)
        return own

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new rotations, in place."""
        self.rotations.copy_(torch.randn(*self.rotations.shape, generator=generator, device="cpu"))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        state: LSHState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attend.

        Args:
            x: tokens [B, N, d_model]; with a state, those after it.
            mask: True at tokens, False at padding [B, N].
            state: of the tokens before; only for ``selection="window"``.
            return_state: also return the state after ``x``.

        Returns:
            [B, N, d_model], and with ``return_state`` the state.

        Raises:
            Refusal: for a state with ``selection="chunks"``.
        """
        check(x, self.d_model, mask)
        windowed = self.options["selection"] == "window"
        if not windowed and (state is not None or return_state):
            raise Refusal(
                'LSHAttention with selection="chunks" cannot decode: a new token moves the chunks '
                'of earlier ones, so prefill and decoding differ. Use selection="window"'
            )
        check_state(state, LSHState, "qk", len(x), self.heads)
        valid = None if mask is None else mask.to(torch.bool)
        start = 0 if state is None else state.count
        (x,) = cleared(valid, x)
        q, _, v = self.project(x, positions(x, valid, start))
        bucket = hash_buckets(q, self.rotations, self.buckets)
        if not windowed:
            return self.join(lsh_attention(q, v, bucket, mask=valid, **self.options))
        if valid is not None:
            hidden = ~valid[:, None, :, None]
            q, v = q.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
            bucket = bucket.masked_fill(hidden.mT, -1)
        qk, values, all_buckets = q, v, bucket
        if state is not None:
            qk, values = torch.cat([state.qk, q], dim=2), torch.cat([state.v, v], dim=2)
            all_buckets = torch.cat([state.bucket, bucket], dim=3)
        o = self.options
        width = o["chunk"] * (1 + o["before"])
        out = self.join(
            over_window(q, qk, values, bucket, all_buckets, width, o["scale"], o["impl"])
        )
        if not return_state:
            return out
        count = seen(x, valid, start)
        return out, LSHState(qk=qk, v=values, bucket=all_buckets, count=count)
