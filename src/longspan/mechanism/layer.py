"""What the layers of this package share: projections around an attention that a subclass gives.

    q, k, v = x Wq, x Wk, x Wv  (by heads)        y = concat_h mix(q, k, v)_h Wo

Parameter names are those of ``longspan.nn.Attention`` (``query``, ``key``, ``value``,
``output``), so weights move between the two.

Axes: B batch, N tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longspan.errors import InputError, Refusal
from longspan.nn.attention import check, cleared, frequencies
from longspan.nn.rotary import rotate
from longspan.position import Frequencies

Count = int | Tensor


class MechanismLayer(nn.Module):
    """Base of the layers: x [B, N, d_model] to [B, N, d_model].

    Args:
        d_model: width of the tokens.
        heads: query heads.
        kv_heads: key and value heads, a divisor of ``heads``; default ``heads``.
        head_dim: width of a head; default ``d_model / heads``.
        rope: base of a rotary embedding such as 10000.0, or frequencies from
            ``longspan.position``; None for no rotary embedding.
        bias: whether the projections have a bias.
        shared_key: keys are made from the queries; there is no ``key`` projection.
        project_output: False leaves the heads side by side, for layers taken from models that
            keep their output projection elsewhere.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        no_causal_form: why there is none; empty if there is one.
        near_dense: options that start a layer near dense attention, for models trained with it.
        grouped: whether query heads may share key heads.

    Raises:
        InputError: if the sizes do not fit each other.
    """

    no_causal_form: ClassVar[str] = ""
    near_dense: ClassVar[Mapping[str, Any]] = {}
    grouped: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: float | Frequencies | None = None,
        bias: bool = False,
        shared_key: bool = False,
        project_output: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        at_least_one(d_model=d_model, heads=heads, kv_heads=kv_heads)
        if heads % kv_heads:
            raise InputError(f"kv_heads must divide heads, got {kv_heads} and {heads}")
        if shared_key and kv_heads != heads:
            raise InputError(
                "keys are the queries here, so there are as many key heads as query heads; got "
                f"kv_heads={kv_heads} and heads={heads}: leave kv_heads out"
            )
        if head_dim is None:
            if d_model % heads:
                raise InputError(
                    f"d_model {d_model} is not a multiple of heads {heads}: give head_dim="
                )
            head_dim = d_model // heads
        at_least_one(head_dim=head_dim)
        self.d_model, self.heads, self.kv_heads, self.head_dim = d_model, heads, kv_heads, head_dim
        self.place = placed(device, dtype)
        self.query = nn.Linear(d_model, heads * head_dim, bias=bias, **self.place)
        self.key = (
            None
            if shared_key
            else nn.Linear(d_model, kv_heads * head_dim, bias=bias, **self.place)
        )
        self.value = nn.Linear(d_model, kv_heads * head_dim, bias=bias, **self.place)
        self.output = (
            nn.Linear(heads * head_dim, d_model, bias=bias, **self.place)
            if project_output
            else nn.Identity()
        )
        self.rope = frequencies(rope, head_dim)
        if self.rope is not None:
            # Not a buffer: model.bfloat16() would round the frequencies to eight bits.
            self._inv_freq = torch.from_numpy(self.rope.inv_freq)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens [B, N, d_model].
            mask: True (or 1) at tokens and False (or 0) at padding, [B, N].

        Returns:
            [B, N, d_model]. At padding the attention is 0.
        """
        check(x, self.d_model, mask)
        valid = None if mask is None else mask.to(torch.bool)
        (x,) = cleared(valid, x)
        q, k, v = self.project(x, positions(x, valid))
        return self.join(self.mix(q, k, v, valid))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """The mechanism itself, on q [B, H, N, D], k and v [B, K, N, D] and valid [B, N]."""
        raise NotImplementedError

    def project(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, N, D], keys and values [B, K, N, D]; rotated to ``places`` if asked."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.value(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        k = q if self.key is None else self.key(x).unflatten(-1, (self.kv_heads, -1))
        k = k if self.key is None else k.transpose(1, 2)
        if self.rope is not None:
            factor = self.rope.attention_factor
            q = rotate(q, places, self._inv_freq, factor)
            k = q if self.key is None else rotate(k, places, self._inv_freq, factor)
        return q, k, v

    def start_near_dense(self) -> None:
        """Set the mechanism's own weights so that the layer is as near to dense attention, with
        the present projections, as the mechanism allows. Nothing to do for most.
        """

    def refuse_causal(self) -> None:
        """Refuse the causal form of a mechanism that has none.

        Raises:
            Refusal: always.
        """
        raise Refusal(
            f"{type(self).__name__} has no causal form: {self.no_causal_form}. Use causal=False "
            "(encoders), or a mechanism with a causal form such as LinearAttention or Performer"
        )

    def join(self, out_BHND: Tensor) -> Tensor:
        """Heads side by side, through the output projection."""
        return self.output(out_BHND.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        kv = "" if self.kv_heads == self.heads else f", kv_heads={self.kv_heads}"
        return f"d_model={self.d_model}, heads={self.heads}{kv}"


def placed(device: Any = None, dtype: Any = None) -> dict[str, Any]:
    """Where parameters go, torch's defaults spelt out: what is drawn on the CPU follows them."""
    return {
        "device": torch.get_default_device() if device is None else device,
        "dtype": torch.get_default_dtype() if dtype is None else dtype,
    }


def options_of(kind: type[MechanismLayer]) -> dict[str, inspect.Parameter]:
    """What a kind of layers takes beside sizes, projections and what a model brings, by name."""
    found: dict[str, inspect.Parameter] = {}
    for owner in kind.__mro__[: kind.__mro__.index(MechanismLayer)]:
        if "__init__" in vars(owner):
            found = {**inspect.signature(owner.__init__).parameters, **found}
    brought = {"self", "d_model", "heads", "rope", "kwargs"}
    return {name: one for name, one in found.items() if name not in brought}


def positions(x: Tensor, valid: Tensor | None, start: Count = 0) -> Tensor:
    """Place of each token [N] or [B, N], padding not counted, after ``start`` earlier tokens."""
    if valid is None:
        row = torch.arange(x.shape[1], device=x.device)
        return row + (start[:, None] if isinstance(start, Tensor) else start)
    count = (valid.cumsum(dim=-1) - 1).clamp_min(0)
    return count + (start[:, None] if isinstance(start, Tensor) else start)


def seen(x: Tensor, valid: Tensor | None, start: Count = 0) -> Count:
    """Number of tokens up to the end of ``x``, per batch row where padding makes them differ."""
    return start + (x.shape[1] if valid is None else valid.sum(dim=-1))


def to_front(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Order [B, N] that brings tokens before padding, and its inverse."""
    order = (~valid).to(torch.int8).argsort(dim=-1, stable=True)
    return order, order.argsort(dim=-1)


def rows_at(x_BHND: Tensor, row_BL: Tensor) -> Tensor:
    """Rows of each batch row, the same for all heads [B, H, L, D]."""
    index = row_BL[:, None, :, None].expand(-1, x_BHND.shape[1], -1, x_BHND.shape[3])
    return x_BHND.gather(2, index)


def at_least_one(**sizes: int) -> None:
    """Refuse sizes that are no positive whole numbers.

    Raises:
        InputError: naming the size.
    """
    at_least(1, **sizes)


def at_least(least: int, **sizes: int) -> None:
    """Refuse sizes that are no whole numbers from ``least`` on.

    Raises:
        InputError: naming the size.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


def share(**numbers: float) -> None:
    """Refuse numbers that are not from 0 to 1.

    Raises:
        InputError: naming the number.
    """
    for name, value in numbers.items():
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{name} must be a number from 0 to 1, got {value!r}")


def check_state(state: Any, kind: type, part: str, batch: int, heads: int) -> None:
    """Refuse what is no state of earlier tokens of as many sequences, in a layer of these heads.

    Args:
        state: what was given; None is none.
        kind: of the states of the layer.
        part: attribute of a state, of rows or sums [batch, heads, ...], or several of them.
        batch: sequences B.
        heads: key heads K.

    Raises:
        InputError: with what was given.
    """
    if state is None:
        return
    if not isinstance(state, kind):
        raise InputError(
            f"expected a state as return_state=True gives it ({kind.__name__}), got "
            f"{type(state).__name__}"
        )
    kept = getattr(state, part)
    given = (kept[0] if isinstance(kept, tuple) else kept).shape[:2]
    if tuple(given) != (batch, heads):
        raise InputError(
            f"the state is that of {given[0]} sequences and {given[1]} key heads, the tokens are "
            f"of {batch} and {heads}: give the one that this layer returned for these sequences"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    """Refuse tensors that are not q [B, H, N, D], k [B, K, N, D], v [B, K, N, Dv], K a divisor of
    H, in one floating dtype, with a mask [B, N] if any.

    Raises:
        InputError: with what was given.
    """
    if not all(isinstance(x, Tensor) for x in (q, k, v, q if mask is None else mask)):
        words = ", ".join(type(x).__name__ for x in (q, k, v, mask))
        raise InputError(f"expected q, k, v and mask (or None) as tensors; got {words}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise InputError(f"expected q [B, H, N, D], k [B, K, N, D], v [B, K, N, Dv]; got {shapes}")
    if k.shape != (q.shape[0], k.shape[1], *q.shape[2:]) or v.shape[:3] != k.shape[:3]:
        raise InputError(f"expected equal batch, rows and (for q and k) width; got {shapes}")
    if 0 in q.shape or 0 in v.shape:
        raise InputError(f"expected no empty axis; got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise InputError(f"the key heads must divide the query heads; got {shapes}")
    # Norms of heads leave queries and keys wider than values under autocast.
    same = q.dtype == k.dtype == v.dtype or torch.is_autocast_enabled(q.device.type)
    if not same or not all(x.is_floating_point() for x in (q, k, v)):
        dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        raise InputError(f"expected q, k and v in one floating-point dtype; got {dtypes}")
    if mask is not None and mask.shape != (q.shape[0], q.shape[2]):
        wanted = [q.shape[0], q.shape[2]]
        raise InputError(f"expected a padding mask of shape {wanted}, got {list(mask.shape)}")
