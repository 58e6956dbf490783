"""Routing attention: tokens near the same centroid attend to each other.

Paper: Efficient Content-Based Sparse Attention with Routing Transformers (Roy et al. 2021, arXiv
2003.05997).

    every centroid takes the w queries and the w keys most similar to it (unit length)
    inside a cluster: softmax(q . k / sqrt(D)) v
    a token in several clusters gets the mean, a token in none gets 0
    centroids <- decay centroids + (1 - decay) mean direction of the tokens nearest to them

O(c w^2 D + N c D) time for c clusters: N^1.5 D at w = sqrt(N).

Selection. ``selection="clusters"`` (published) is causal in values but not in selection: which w
tokens a cluster takes depends on the whole sequence, so early rows change with later tokens.
``selection="window"`` is ours and strictly causal: each query and key goes to its nearest
centroid alone, and a row sees the last w keys of its cluster up to its own; a row that finds none
sees itself. It decodes, with the tokens so far as its state.

On top of the paper: a cluster is a range of sorted keys, so any kernel runs it; grouped key heads
(query heads share the centroids of their key head); clusters where a row sees no key are left
out of its mean; centroids change only in ``update_centroids``, never inside a forward pass, so
recomputation under gradient checkpointing selects the same keys.

Axes: B batch, H query heads, K key heads, N rows, D head width, c clusters, w rows of a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longspan.errors import Refusal
from longspan.mechanism._buckets import take
from longspan.mechanism._routing_attention import check_names, routing_attention
from longspan.mechanism._routing_selections import nearest, over_window, similarity, unit
from longspan.mechanism.layer import (
    Count,
    MechanismLayer,
    at_least_one,
    check_state,
    cleared,
    positions,
    seen,
    share,
)
from longspan.nn.attention import check


@dataclass(frozen=True, kw_only=True)
class RoutingState:
    """What decoding keeps: every token so far, O(N).

    Attributes:
        k: keys [B, K, N, D].
        v: values [B, K, N, D].
        cluster: of each key [B, K, N]; negative at padding.
        count: tokens seen, per batch row where padding makes them differ.
    """

    k: Tensor
    v: Tensor
    cluster: Tensor
    count: Count


class RoutingAttention(MechanismLayer):
    """Multi-head routing attention, x [B, N, d_model] to the same shape.

    In training, call ``update_centroids()`` after each step; forward passes only gather what it
    needs.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        clusters: centroids c per key head; N / window is usual.
        window: rows w of a cluster.
        causal: row i sees tokens up to i.
        selection: ``clusters`` (published; early rows move with later tokens) or ``window``
            (strictly causal).
        shared_key: keys are made from the queries.
        decay: of the moving average of centroids.
        impl: kernel name, or ``auto``.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``rope``, ``bias``, ``device``,
            ``dtype``.
    """

    near_dense: ClassVar[Mapping[str, Any]] = {"selection": "window"}

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        clusters: int = 16,
        window: int = 64,
        causal: bool = True,
        selection: str = "clusters",
        shared_key: bool = False,
        decay: float = 0.999,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, shared_key=shared_key, **kwargs)
        at_least_one(clusters=clusters, window=window)
        share(decay=decay)
        check_names(selection, causal)
        self.window, self.causal, self.selection = window, causal, selection
        self.shared_key, self.decay, self.impl = shared_key, decay, impl
        shape = (self.kv_heads, clusters, self.head_dim)
        self.centroids = nn.Buffer(unit(torch.randn(shape, **self.place)).to(self.place["dtype"]))
        self.gathered = nn.Buffer(torch.zeros(shape, **self.place), persistent=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        state: RoutingState | None = None,
        return_state: bool = False,
        return_loss: bool = False,
    ) -> Any:
        """Attend.

        Args:
            x: tokens [B, N, d_model]; with a state, those after it.
            mask: True at tokens, False at padding [B, N].
            state: of the tokens before; only for ``selection="window"``.
            return_state: also return the state after ``x``.
            return_loss: also return the mean squared distance of queries and keys to their
                nearest centroid, which the paper adds to the loss with weight 1e-4.

        Returns:
            [B, N, d_model], then the state and the loss where asked for.

        Raises:
            Refusal: for a state with ``selection="clusters"``.
        """
        check(x, self.d_model, mask)
        if self.selection == "clusters" and (state is not None or return_state):
            raise Refusal(
                'RoutingAttention with selection="clusters" cannot decode: a new token changes '
                "which tokens a cluster takes, so prefill and decoding differ. "
                'Use selection="window"'
            )
        check_state(state, RoutingState, "k", len(x), self.kv_heads)
        valid = None if mask is None else mask.to(torch.bool)
        start = 0 if state is None else state.count
        (x,) = cleared(valid, x)
        q, k, v = self.project(x, positions(x, valid, start))
        extra = []
        if self.selection == "clusters":
            out = routing_attention(
                q,
                k,
                v,
                self.centroids,
                window=self.window,
                causal=self.causal,
                shared_key=self.shared_key,
                mask=valid,
                impl=self.impl,
            )
        else:
            if valid is not None:
                q, k, v = (z.masked_fill(~valid[:, None, :, None], 0.0) for z in (q, k, v))
            cluster_q, cluster = (nearest(similarity(z, self.centroids), valid) for z in (q, k))
            keys = unit(k).to(k.dtype) if self.shared_key else k
            if state is not None:
                keys = torch.cat([state.k, keys], dim=2)
                v = torch.cat([state.v, v], dim=2)
                cluster = torch.cat([state.cluster, cluster], dim=2)
            out = over_window(
                q, keys, v, cluster_q, cluster, self.window, self.shared_key, self.impl
            )
            if return_state:
                count = seen(x, valid, start)
                extra.append(RoutingState(k=keys, v=v, cluster=cluster, count=count))
        if self.training or return_loss:
            loss = self._gather(q, k, valid)
            extra += [loss] if return_loss else []
        return (self.join(out), *extra) if extra else self.join(out)

    def _gather(self, q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
        """Add tokens to the centroids nearest to them; their mean squared distance."""
        q = q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
        tokens = unit(q if self.shared_key else torch.cat([q, k], dim=2))
        cluster = similarity(tokens, self.centroids).argmax(dim=-1)
        used = torch.ones_like(cluster, dtype=torch.bool)
        if valid is not None:
            used = valid[:, None].repeat(1, 1, tokens.shape[2] // valid.shape[1]).expand_as(used)
        rows = self.centroids.to(tokens.dtype)
        own = take(rows.expand(len(tokens), -1, -1, -1), cluster)
        if self.training:
            flat = (tokens.detach() * used[..., None]).transpose(0, 1).flatten(1, 2)
            to = cluster.transpose(0, 1).flatten(1)[..., None].expand_as(flat)
            self.gathered.scatter_add_(1, to, flat.to(self.gathered.dtype))
        distance = (tokens - own).square().mean(dim=-1)
        return (distance * used).sum() / used.sum().clamp_min(1)

    @torch.no_grad()
    def update_centroids(self, decay: float | None = None) -> None:
        """Move the centroids towards the tokens gathered since the last call.

        Args:
            decay: share of the old centroids that stays; default: the layer's own. 0 makes it a
                step of k-means, which is a good start.
        """
        decay = self.decay if decay is None else decay
        new = unit(self.gathered)
        moved = self.centroids * decay + new * (1 - decay)
        some = self.gathered.abs().sum(dim=-1, keepdim=True) > 0
        self.centroids.copy_(torch.where(some, moved, self.centroids))
        self.gathered.zero_()
