"""Feature maps of linear attention: phi with phi(q) . phi(k) in place of exp(q . k).

    elu      elu(x) + 1                                  Katharopoulos et al. 2020, 2006.16236
    relu     max(x, 0)
    exp      exp(x), element-wise
    hedgehog [exp(W x'), exp(-W x')], W learned, x' = D^-1/4 x: spiky like a softmax once trained
             to copy one (Zhang et al. 2024, 2402.04347; there q and k have a W each)
    laplace  m^-1/2 [cos(W x), sin(W x)], W Cauchy: E[phi(x) . phi(y)] = exp(-|x - y|_1 / b)
             (random Fourier features, Rahimi and Recht 2007); signed
    mega     (1 + erf((x - sqrt(1/2)) sqrt(2 pi))) / 2: the bell of Mega (Ma et al. 2022,
             2209.10655) used element-wise; positive and at most 1
    cosformer  relu(x) [cos(a), sin(a)], a = pi i / (2 M) at position i, so that a pair weighs
             relu(q_i) . relu(k_j) cos(pi (i - j) / (2 M))      Qin et al. 2022, 2202.08791

A map may return its features divided by exp(c) with one c per row. Features then never
overflow, and the attention puts the factor back where it matters, using only c of earlier rows:
a maximum over the whole sequence would let later tokens act on earlier ones.

cosFormer's M is fixed here; its own code takes M = N, so that every weight changes when the
sequence grows.

Axes: B batch, H heads, N rows, D head width, R features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.mechanism.layer import at_least_one

Features = tuple[Tensor, Tensor | None]


class FeatureMap(nn.Module):
    """Base: x [B, H, N, D] and positions [N] or [B, N] to features [B, H, N, R] and, or None, the
    logarithm of their common factor [B, H, N], which carries no gradient.

    Attributes:
        floor: least denominator; 0 where features are positive.
        max_rows: most rows of a sequence, or None.
        version: counts redraws; a decoding state of another version is refused.
    """

    floor = 0.0
    max_rows: int | None = None
    version = 0

    def forward(self, x: Tensor, positions: Tensor) -> Features:
        raise NotImplementedError


class Elu(FeatureMap):
    """elu(x) + 1."""

    def forward(self, x: Tensor, positions: Tensor) -> Features:
        return torch.where(x > 0, x + 1, x.clamp_max(0).exp()), None


class Relu(FeatureMap):
    """max(x, 0): a row may be 0 everywhere, hence the floor."""

    floor = 1e-6

    def forward(self, x: Tensor, positions: Tensor) -> Features:
        return x.relu(), None


class Exp(FeatureMap):
    """exp(x), element-wise."""

    def forward(self, x: Tensor, positions: Tensor) -> Features:
        return stable_exp(x)


class Mega(FeatureMap):
    """The Laplace activation of Mega: a smooth step from 0 to 1."""

    def forward(self, x: Tensor, positions: Tensor) -> Features:
        # Mean sqrt(1/2) and deviation sqrt(1 / (4 pi)), as published. Not 1 + erf, of which
        # nothing is left far below the mean.
        return 0.5 * torch.erfc((math.sqrt(0.5) - x) * math.sqrt(2 * math.pi)), None


class Laplace(FeatureMap):
    """Random Fourier features of the Laplacian kernel exp(-|x - y|_1 / bandwidth).

    Args:
        head_dim: width D of a head.
        features: frequencies m; the map has 2 m features. Default 2 D.
        bandwidth: b; default D, the kernel of the mean absolute difference.
        place: device and dtype of the frequencies.
    """

    # Signed features: their sum may come out at or below 0 by chance.
    floor = 1e-3

    def __init__(
        self,
        head_dim: int,
        *,
        features: int | None = None,
        bandwidth: float | None = None,
        **place: Any,
    ) -> None:
        super().__init__()
        count = 2 * head_dim if features is None else features
        uniform = torch.rand(count, head_dim, **place) - 0.5
        frequencies = (uniform * math.pi).tan() / (head_dim if bandwidth is None else bandwidth)
        self.frequencies = nn.Buffer(frequencies)

    def forward(self, x: Tensor, positions: Tensor) -> Features:
        angle = x @ self.frequencies.to(x.dtype).T
        return torch.cat([angle.cos(), angle.sin()], dim=-1) / angle.shape[-1] ** 0.5, None


class Cosformer(FeatureMap):
    """cosFormer's features; weights fall to 0 at a distance of ``max_length`` tokens.

    Args:
        max_length: M, the longest sequence.
    """

    floor = 1e-6

    def __init__(self, max_length: int) -> None:
        super().__init__()
        at_least_one(max_length=max_length)
        self.max_rows = max_length

    def forward(self, x: Tensor, positions: Tensor) -> Features:
        assert self.max_rows is not None
        angle = positions.to(x.dtype)[..., None] * (math.pi / 2 / self.max_rows)
        angle = angle[:, None] if angle.dim() == 3 else angle
        x = x.relu()
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1), None

    def extra_repr(self) -> str:
        return f"max_length={self.max_rows}"


class Hedgehog(FeatureMap):
    """exp(W x'), exp(-W x') with learned W and x' = D^-1/4 x; W starts as the identity.

    Args:
        head_dim: width D of a head.
        heads: key heads, each with its W, which its query heads share; default: one W for all.
        place: device and dtype of W.
    """

    def __init__(self, head_dim: int, heads: int | None = None, **place: Any) -> None:
        super().__init__()
        eye = torch.eye(head_dim, **place)
        self.weight = nn.Parameter(eye if heads is None else eye.repeat(heads, 1, 1))

    def forward(self, x: Tensor, positions: Tensor) -> Features:
        weight = self.weight.to(x.dtype)
        if weight.dim() == 3:
            weight = weight.repeat_interleave(x.shape[1] // len(weight), dim=0)
        turned = (x * x.shape[-1] ** -0.25) @ weight.mT
        return stable_exp(torch.cat([turned, -turned], dim=-1))


NAMES = ("cosformer", "elu", "exp", "hedgehog", "laplace", "mega", "relu")


def build(
    name: str | FeatureMap,
    head_dim: int,
    max_length: int | None = None,
    heads: int | None = None,
    **place: Any,
) -> FeatureMap:
    """Feature map by name.

    Args:
        name: one of ``NAMES``, or a map, which is given back.
        head_dim: width D of a head.
        max_length: longest sequence, for ``cosformer``.
        heads: key heads, for maps that learn one W for each.
        place: device and dtype of weights.

    Raises:
        InputError: if the name is unknown, or cosFormer has no length.
    """
    if isinstance(name, FeatureMap):
        return name
    if name == "cosformer":
        if max_length is None:
            raise InputError(
                "cosformer needs max_length=, the longest sequence it will see: its weights are "
                "cos(pi (i - j) / (2 max_length)) and must not change while a sequence grows"
            )
        return Cosformer(max_length)
    if name == "hedgehog":
        return Hedgehog(head_dim, heads, **place)
    if name == "laplace":
        return Laplace(head_dim, **place)
    plain = {"elu": Elu, "exp": Exp, "mega": Mega, "relu": Relu}
    if not isinstance(name, str) or name not in plain:
        raise InputError(
            f"feature_map must be one of {', '.join(NAMES)} or a FeatureMap; got {name!r}"
        )
    return plain[name]()


def stable_exp(x: Tensor) -> Features:
    """exp(x - c) and c, the largest entry of each row."""
    largest = x.detach().amax(dim=-1, keepdim=True)
    return (x - largest).exp(), largest[..., 0]
