"""Linear attention: a feature map in place of the softmax, O(N) time and O(1) decoding state.

Paper: Transformers are RNNs (Katharopoulos et al. 2020, arXiv 2006.16236).

    o_i = phi(q_i)^T S_i / (phi(q_i)^T z_i),    S_i = sum_j phi(k_j) v_j^T,   z_i = sum_j phi(k_j)

over j <= i, or over all j. Causal: chunks of C rows, inside them the quadratic form, between them
S and z. Time O(N (C (R + D) + R D)), memory O(N (C + R D / C)), state R (D + 1) per key head.

On top of the paper: any feature map; grouped queries share one state per key head; maps that
grow like exp are carried with a running maximum of their log factor, so nothing overflows and
no later token touches an earlier row; padding removes phi(k), not k; a row without any weight
gives 0.

Axes: B batch, H query heads, K key heads, G = H / K, N rows, D head width, R features,
E = D + 1 (the values and a one, whose sum is the denominator), T chunks of C rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.errors import InputError
from longspan.mechanism import _linear_fused
from longspan.mechanism._linear_chunks import causal_sums, lowest
from longspan.mechanism.feature_maps import FeatureMap, build
from longspan.mechanism.layer import (
    Count,
    MechanismLayer,
    at_least_one,
    check_heads,
    check_state,
    cleared,
    positions,
    seen,
)
from longspan.nn.attention import check
from longspan.ops.inputs import without_autocast


@dataclass(frozen=True, kw_only=True)
class LinearState:
    """What decoding keeps: the sums over all earlier rows, whatever their number.

    Attributes:
        sum_BKRE: S and z side by side, divided by exp(log_BK); float32 or float64.
        log_BK: largest log factor so far; 0 for maps without one.
        count: tokens seen, per batch row where padding makes them differ.
        rows: rows seen, padding included.
        version: of the feature map.
    """

    sum_BKRE: Tensor
    log_BK: Tensor
    count: Count
    rows: int
    version: int


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str | FeatureMap = "elu",
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    max_length: int | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    chunk: int = 64,
) -> Any:
    """Linear attention.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, N, D]; K divides H.
        v: values [B, K, N, Dv].
        feature_map: ``elu``, ``relu``, ``exp``, ``mega``, ``cosformer``, or a ``FeatureMap``.
        causal: row i sees keys up to i.
        mask: True at tokens, False at padding [B, N].
        max_length: longest sequence, for ``cosformer``.
        state: continue after earlier rows (causal only).
        return_state: also return the state after these rows (causal only).
        chunk: rows of a chunk; changes speed, not results. GPU kernels have chunks of their own.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, and with ``return_state`` the state. Computed in
        float32 at least.

    Raises:
        InputError: if shapes do not fit, or the sequence is longer than the map allows.
    """
    check_heads(q, k, v, mask)
    at_least_one(chunk=chunk)
    if not causal and (state is not None or return_state):
        raise InputError("a state exists only for causal=True")
    if feature_map in ("hedgehog", "laplace"):
        raise InputError(
            f"{feature_map} has weights: make them once with longspan.mechanism."
            f"{str(feature_map).capitalize()}(head_dim) and pass that as feature_map"
        )
    check_state(state, LinearState, "sum_BKRE", *k.shape[:2])
    phi = build(feature_map, q.shape[-1], max_length)
    start, rows = (0, k.shape[2]) if state is None else (state.count, state.rows + k.shape[2])
    if phi.max_rows is not None and rows > phi.max_rows:
        raise InputError(f"the feature map was made for {phi.max_rows} rows, got {rows}")
    if state is not None and state.version != phi.version:
        raise InputError("the state was made before redraw(): run the prompt again")
    valid = None if mask is None else mask.to(torch.bool)
    places = positions(k[:, 0], valid, start)
    q, k, v = cleared(valid, q, k, v)
    before = None if state is None else (state.sum_BKRE, state.log_BK)
    out, sums, log = _attend(
        q, k, v, phi, places=places, valid=valid, before=before, causal=causal, chunk=chunk
    )
    if valid is not None:
        out = out.masked_fill(~valid[:, None, :, None], 0.0)
    if sums is None or log is None or not return_state:
        return out
    count = seen(k[:, 0], valid, start)
    return out, LinearState(sum_BKRE=sums, log_BK=log, count=count, rows=rows, version=phi.version)


class LinearAttention(MechanismLayer):
    """Multi-head linear attention, x [B, N, d_model] to the same shape.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        feature_map: ``elu``, ``relu``, ``exp``, ``hedgehog``, ``laplace``, ``mega``,
            ``cosformer``, or a ``FeatureMap``.
        causal: row i sees tokens up to i.
        max_length: longest sequence, for ``cosformer``.
        chunk: rows of a chunk; changes speed, not results.
        kwargs: of ``MechanismLayer``: ``kv_heads``, ``head_dim``, ``rope``, ``bias``, ``device``,
            ``dtype``.
    """

    near_dense: ClassVar[Mapping[str, Any]] = {"feature_map": "hedgehog"}

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        feature_map: str | FeatureMap = "elu",
        causal: bool = True,
        max_length: int | None = None,
        chunk: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        at_least_one(chunk=chunk)
        self.feature_map = build(
            feature_map, self.head_dim, max_length, self.kv_heads, **self.place
        )
        self.causal, self.chunk = causal, chunk

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        state: LinearState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attend.

        Args:
            x: tokens [B, N, d_model]; with a state, those after it.
            mask: True at tokens, False at padding [B, N].
            state: of the tokens before.
            return_state: also return the state after ``x``.

        Returns:
            [B, N, d_model], and with ``return_state`` the state: O(1) memory however many tokens
            came before.
        """
        check(x, self.d_model, mask)
        check_state(state, LinearState, "sum_BKRE", len(x), self.kv_heads)
        valid = None if mask is None else mask.to(torch.bool)
        (x,) = cleared(valid, x)
        q, k, v = self.project(x, positions(x, valid, 0 if state is None else state.count))
        found = linear_attention(
            q,
            k,
            v,
            self.feature_map,
            causal=self.causal,
            mask=valid,
            state=state,
            return_state=return_state,
            chunk=self.chunk,
        )
        return (self.join(found[0]), found[1]) if return_state else self.join(found)


# Times the smallest number of a dtype: far enough above it for sums over millions of rows.
_FAINT = 1e8


@without_autocast
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: FeatureMap,
    *,
    places: Tensor,
    valid: Tensor | None,
    before: tuple[Tensor, Tensor] | None,
    causal: bool,
    chunk: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Outputs [B, H, N, Dv], and what ``before`` is for the rows that follow; None if two-sided.

    Autocast would round features, and the sums over all rows, to what tensors are cast to.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    fused = causal and _linear_fused.fits(q, k, v)
    kind = _linear_fused.kind_of(phi) if fused else "given"
    # The common factor of a query's features cancels.
    phi_q, phi_k, log_k = q, k, None
    if kind == "given":
        phi_q, (phi_k, log_k) = phi(q.to(work), places)[0], phi(k.to(work), places)
    if valid is not None and log_k is not None:
        log_k = log_k.masked_fill(~valid[:, None], lowest(work))
    if fused:
        given = (phi_q, phi_k, v, log_k, valid, before, kind, phi.floor)
        return _linear_fused.causal_attention(*given)
    if valid is not None:
        phi_k = phi_k.masked_fill(~valid[:, None, :, None], 0.0)
    if not phi.floor:
        phi_q = _near_one(phi_q)
    phi_q = phi_q.unflatten(1, (k.shape[1], -1))
    v_BKNE = pad(v.to(work), (0, 1), value=1.0)
    sums = log = None
    if causal:
        total, sums, log = causal_sums(phi_q, phi_k, log_k, v_BKNE, before, chunk)
    else:
        if log_k is not None:
            phi_k = phi_k * (log_k - log_k.amax(dim=-1, keepdim=True)).exp()[..., None]
        total = phi_q @ (phi_k.transpose(-1, -2) @ v_BKNE)[:, :, None]
    return _divide(total, phi.floor).flatten(1, 2).to(q.dtype), sums, log


def _near_one(phi_q: Tensor) -> Tensor:
    """Features over the largest of their row: a factor that cancels, as do its slopes."""
    most = phi_q.detach().amax(dim=-1, keepdim=True)
    # Over less, slopes would leave the range of numbers.
    least = _FAINT * torch.finfo(most.dtype).tiny
    return phi_q / most.masked_fill(most < least, 1.0)


def _divide(total: Tensor, floor: float) -> Tensor:
    mass = total[..., -1:]
    if floor:
        return total[..., :-1] / mass.clamp_min(floor)
    empty, faint = mass <= 0, mass < _FAINT * torch.finfo(mass.dtype).tiny
    values = total[..., :-1]
    # Where weights all but vanish a quotient is left, but its slopes leave the range of numbers:
    # infinite, they would be NaN where they meet features of 0.
    left = (values / mass.masked_fill(empty, 1.0)).detach()
    return torch.where(faint, left.masked_fill(empty, 0.0), values / mass.masked_fill(faint, 1.0))
