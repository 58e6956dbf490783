"""What ``attend`` and its relatives ask of their tensors and numbers, checked in one place.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from longspan.errors import InputError, PlanError

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch's own attention does: not float64, and wherever two dtypes meet.

    A rotation in float32 leaves queries wider than values.
    """
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    # Autocast knows no device without data, and asking what it knows breaks a compiler's graph.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose products stay in the precision of what it multiplies.

    Choices are made there, which rounding to bfloat16 would make otherwise, and sums of many rows.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(given.device.type for given in args if isinstance(given, Tensor))
        # Autocast knows no device without data.
        if device == "meta":
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def without_data(x: Tensor) -> bool:
    """Whether a tensor has a shape alone.

    What is made of one for a plan, which later calls share, would have no data either.
    """
    return x.is_meta or isinstance(x, FakeTensor)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what is no attention: q [B, H, N, D], k [B, K, M, D] and v [B, K, M, Dv].

    Raises:
        InputError: if shapes, dtypes, devices or layouts do not fit, or an axis is empty.
    """
    for name, t in ("q", q), ("k", k), ("v", v):
        if isinstance(t, Tensor) and t.is_nested:
            raise InputError(
                f"{name} is a nested tensor; pack its sequences into one, and give segments"
            )
    shapes = f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"
    if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (q, k, v)):
        raise InputError(f"expected q [B, H, N, D], k [B, K, M, D], v [B, K, M, Dv]; got {shapes}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise InputError(f"batch sizes differ: {shapes}")
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise InputError(
            f"k must have the width of q, and v the heads and rows of k; got {shapes}"
        )
    if min(q.numel(), k.numel(), v.numel()) == 0:
        raise InputError(f"expected no empty axis; got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise InputError(f"the key heads must divide the query heads; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise InputError(
            "q, k and v must share one floating dtype, float64, float32, bfloat16 or float16; got "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise InputError(
            f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}"
        )
    if any(map(without_data, (q, k, v))) or not q.layout == k.layout == v.layout == torch.strided:
        kinds = (
            "meta" if t.is_meta else "fake" if without_data(t) else str(t.layout)
            for t in (q, k, v)
        )
        raise InputError(f"expected dense tensors with data; got {', '.join(kinds)}")


def check_batch(rows: int, q: Tensor) -> None:
    """Raise ``InputError`` unless positions or segments are for one batch row or those of q."""
    if rows not in (1, q.shape[0]):
        raise InputError(f"positions or segments have {rows} batch rows, q has {q.shape[0]}")


def factor_of(scale: Any, width: int) -> float:
    """The factor on the logits: ``scale``, or ``width ** -0.5`` for None.

    Raises:
        InputError: if it is no finite number, or asks for a gradient.
    """
    if scale is None:
        return width**-0.5
    without_gradient(scale)
    try:
        found = math.nan if isinstance(scale, str | bytes | bool) else float(scale)
    except (TypeError, ValueError, RuntimeError):
        found = math.nan
    # Logits are float32, or wider.
    if not abs(found) <= torch.finfo(torch.float32).max:
        raise InputError(f"scale must be a finite number, got {scale!r}")
    return found


def without_gradient(scale: Any) -> None:
    """Raise InputError if a factor asks for a gradient: it is a number, also for a compiler."""
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise InputError("scale gets no gradient: multiply q by it, and pass scale=1.0")


def on_cpu(name: str, row: Any) -> Any:
    """Positions or segments as numpy reads them; what is no tensor stays as it is.

    Raises:
        PlanError: if a tensor holds no whole numbers, or none that can be read.
    """
    if not isinstance(row, Tensor):
        return row
    if row.is_floating_point() or row.is_complex():
        raise PlanError(f"{name} must be whole numbers, got {row.dtype}")
    try:
        return row.detach().cpu().numpy()
    # A batch of vmap's, a tensor without data, or one that is not dense.
    except (RuntimeError, TypeError) as error:
        raise PlanError(
            f"{name} must be a dense tensor with data, one for the whole call (none that vmap "
            f"goes over: it takes them for all batch rows at once); {error}"
        ) from None


def _shape(t: Any) -> str:
    return str(list(t.shape)) if isinstance(t, Tensor) else type(t).__name__
