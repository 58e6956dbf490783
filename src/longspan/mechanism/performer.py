"""Performer: positive random features whose products are exp(q . k / sqrt(D)) on average.

Paper: Rethinking Attention with Performers (Choromanski et al. 2021, arXiv 2009.14794), FAVOR+.

    phi(x) = m^-1/2 exp(W x' - |x'|^2 / 2),   x' = D^-1/4 x
    E[phi(q) . phi(k)] = exp(q . k / sqrt(D))

W [m, D] has Gaussian rows, orthogonal within each block of D. O(N m D) time, state m (D + 1).
``kernel="relu"`` is the paper's generalised form, phi(x) = relu(W x') + 1e-3.

On top of the paper: exact causal form without a floor on the features. Published code subtracts
a maximum over all positions and then adds 1e-4, so a large later key lowers every earlier
feature towards the floor: a leak. Here each key keeps its own maximum and rows are joined in
units of the running maximum of earlier keys. W changes only when ``redraw`` is called, so
recomputation under gradient checkpointing sees the same features, and a decoding state made with
another W is refused.

The estimator's relative variance falls as 1 / m but grows like exp(|q + k|^2 / sqrt(D)): it is a
poor copy of softmax attention for large logits.

Axes: B batch, H heads, N rows, D head width, m features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.mechanism.feature_maps import FeatureMap, Features, stable_exp
from longspan.mechanism.layer import at_least_one, placed
from longspan.mechanism.linear import LinearAttention


def orthogonal_gaussian(
    rows: int, dim: int, *, generator: torch.Generator | None = None, **place: Any
) -> Tensor:
    """Random matrix [rows, dim]: every row Gaussian, rows orthogonal within each block of ``dim``.

    Args:
        rows: number of rows m.
        dim: width D.
        generator: source of randomness; default: torch's global one.
        place: device and dtype of the result; drawn on the CPU in float64, so that a seed means
            the same everywhere.
    """
    blocks = -(-rows // dim)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    q, r = torch.linalg.qr(torch.randn(blocks, dim, dim, **draw))
    # Signs make the orthogonal matrices uniformly distributed.
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    length = torch.randn(rows, dim, **draw).norm(dim=1, keepdim=True)
    return (q.mT.reshape(-1, dim)[:rows] * length).to(**place)


class Favor(FeatureMap):
    """The random features of FAVOR+, one W for all heads.

    Args:
        head_dim: width D of a head.
        features: m; default ``int(D ln D)``.
        kernel: ``softmax`` or ``relu``.
        generator: source of randomness; default: torch's global one.
        place: device and dtype of W.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        features: int | None = None,
        kernel: str = "softmax",
        generator: torch.Generator | None = None,
        **place: Any,
    ) -> None:
        super().__init__()
        count = max(1, int(head_dim * math.log(head_dim))) if features is None else features
        at_least_one(features=count)
        if kernel not in ("softmax", "relu"):
            raise InputError(f"kernel must be softmax or relu, got {kernel!r}")
        self.kernel = kernel
        self.projection = nn.Buffer(
            orthogonal_gaussian(count, head_dim, generator=generator, **placed(**place))
        )

    def forward(self, x: Tensor, positions: Tensor) -> Features:
        x = x * x.shape[-1] ** -0.25
        u = x @ self.projection.to(x.dtype).T
        if self.kernel == "relu":
            return u.relu() + 1e-3, None
        # The factor m^-1/2 cancels between numerator and denominator.
        return stable_exp(u - x.square().sum(dim=-1, keepdim=True) / 2)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw a new W, in place."""
        rows, dim = self.projection.shape
        self.projection.copy_(orthogonal_gaussian(rows, dim, generator=generator))
        self.version += 1

    def extra_repr(self) -> str:
        return f"features={self.projection.shape[0]}, kernel={self.kernel!r}"


class Performer(LinearAttention):
    """Multi-head FAVOR+ attention, x [B, N, d_model] to the same shape.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        features: random features m; default ``int(D ln D)``.
        kernel: ``softmax`` or ``relu``.
        causal: row i sees tokens up to i.
        generator: source of W; default: torch's global one.
        kwargs: of ``LinearAttention`` and ``MechanismLayer``: ``chunk``, ``kv_heads``,
            ``head_dim``, ``rope``, ``bias``, ``device``, ``dtype``.
    """

    near_dense: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        features: int | None = None,
        kernel: str = "softmax",
        causal: bool = True,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, heads, causal=causal, **kwargs)
        self.feature_map = Favor(
            self.head_dim, features=features, kernel=kernel, generator=generator, **self.place
        )


def redraw(module: nn.Module, generator: torch.Generator | None = None) -> int:
    """Draw new random features in every Performer layer of a model; between training steps.

    Args:
        module: any module.
        generator: source of randomness; default: torch's global one.

    Returns:
        How many layers were redrawn.
    """
    found = [part for part in module.modules() if isinstance(part, Favor)]
    for part in found:
        part.redraw(generator)
    return len(found)
