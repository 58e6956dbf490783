"""Attention layers over any pattern.

    q, k, v = x Wq, x Wk, x Wv  (by heads)        y = concat_h attend(q_h, k_h, v_h, pattern) Wo

O(N d^2) for the projections and O(pairs of the pattern) for the attention.

Axes: B batch, N tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError, PatternError
from longspan.nn.rotary import count_positions, rotate
from longspan.ops import attend
from longspan.pattern import Pattern, parse
from longspan.position import Frequencies, default


class Attention(nn.Module):
    """Multi-head attention, x [B, N, d_model] to [B, N, d_model].

    Args:
        d_model: width of the tokens.
        heads: query heads.
        pattern: where each query may look: a pattern or its text form.
        kv_heads: key and value heads, a divisor of ``heads``; default ``heads``.
        head_dim: width of a head; default ``d_model / heads``.
        rope: base of a rotary embedding such as 10000.0, or frequencies from
            ``longspan.position``; None for no rotary embedding.
        bias: whether the projections have a bias.
        layer: number of this layer, for patterns that differ between layers.
        impl: kernel of ``longspan.attend``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: if the sizes do not fit each other.
        PatternError: if the pattern does not parse, does not fit the number of heads, or is causal
            but changes as the sequence grows.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        pattern: Pattern | str,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: float | Frequencies | None = None,
        bias: bool = False,
        layer: int = 0,
        impl: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = {"d_model": d_model, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        if not isinstance(layer, int) or layer < 0:
            raise InputError(f"layer must be a whole number of at least 0, got {layer!r}")
        for name, value in sizes.items():
            if name == "head_dim" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if heads % kv_heads:
            raise InputError(f"kv_heads must divide heads, got {kv_heads} and {heads}")
        if head_dim is None:
            if d_model % heads:
                raise InputError(
                    f"d_model {d_model} is not a multiple of heads {heads}: give head_dim="
                )
            head_dim = d_model // heads
        self.pattern = parse(pattern) if isinstance(pattern, str) else pattern
        if not isinstance(self.pattern, Pattern):
            raise PatternError(f"pattern must be a pattern or its text, got {pattern!r}")
        self.pattern.at_layer(layer).require(heads)
        self.d_model, self.heads, self.kv_heads, self.head_dim = d_model, heads, kv_heads, head_dim
        self.layer, self.impl = layer, impl
        place = {"device": device, "dtype": dtype}
        self.query = nn.Linear(d_model, heads * head_dim, bias=bias, **place)
        self.key = nn.Linear(d_model, kv_heads * head_dim, bias=bias, **place)
        self.value = nn.Linear(d_model, kv_heads * head_dim, bias=bias, **place)
        self.output = nn.Linear(heads * head_dim, d_model, bias=bias, **place)
        self.rope = frequencies(rope, head_dim)
        if self.rope is not None:
            # Not a buffer: model.bfloat16() would round the frequencies to eight bits.
            self._inv_freq = torch.from_numpy(self.rope.inv_freq)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: tokens [B, N, d_model].
            mask: True (or 1) at tokens and False (or 0) at padding, [B, N].
            positions: whole numbers [N] or [B, N], the place of each token in its segment;
                default: counted inside each segment, padding not counted.
            segments: whole numbers [N] or [B, N]: packed documents, which do not see each other.

        Returns:
            [B, N, d_model]. At padding the attention is 0.
        """
        check(x, self.d_model, mask)
        for name, rows in (("positions", positions), ("segments", segments)):
            _check_rows(x, name, rows)
        segments = join(x, mask, segments)
        (x,) = cleared(None if segments is None else segments >= 0, x)
        q_BHND = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BKND = self.key(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v_BKND = self.value(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if self.rope is not None:
            place = _places(x, positions, segments)
            q_BHND = rotate(q_BHND, place, self._inv_freq, self.rope.attention_factor)
            k_BKND = rotate(k_BKND, place, self._inv_freq, self.rope.attention_factor)
        out_BHND = attend(
            q_BHND,
            k_BKND,
            v_BKND,
            self.pattern,
            positions=positions,
            segments=segments,
            impl=self.impl,
            layer=self.layer,
        )
        return self.output(out_BHND.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        words = [f"pattern={self.pattern}", f"heads={self.heads}"]
        if self.kv_heads != self.heads:
            words.append(f"kv_heads={self.kv_heads}")
        if self.layer:
            words.append(f"layer={self.layer}")
        return ", ".join(words)


def _check_rows(x: Tensor, name: str, rows: Tensor | None) -> None:
    """The rotary embedding reads these before attention does."""
    batch, n, _ = x.shape
    if rows is None:
        return
    shape = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
    if shape not in ([n], [1, n], [batch, n]):
        raise InputError(
            f"expected {name} as a tensor of shape [{n}] or [{batch}, {n}], got {shape}"
        )


def join(x: Tensor, mask: Tensor | None, segments: Tensor | None) -> Tensor | None:
    """Padding and packed documents as one table of segments; None if there is neither."""
    if mask is None:
        return segments
    own = torch.zeros(mask.shape, dtype=torch.int64, device=x.device)
    return torch.where(mask.to(torch.bool), own if segments is None else segments, -1)


def cleared(valid: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows [B, N, D] or [B, H, N, D] with 0 at padding, which may hold anything, NaN included: 0
    times NaN would be NaN in gradients of the weights.
    """
    if valid is None:
        return tensors
    hidden = ~valid[..., None]
    return tuple(x.masked_fill(hidden if x.dim() == 3 else hidden[:, None], 0.0) for x in tensors)


def _places(x: Tensor, positions: Tensor | None, segments: Tensor | None) -> Tensor:
    if positions is not None:
        return positions
    if segments is None:
        return torch.arange(x.shape[1], device=x.device)
    return count_positions(segments)


def frequencies(rope: float | Frequencies | None, head_dim: int) -> Frequencies | None:
    """Frequencies for heads of a width, from a base or given; None for no rotary embedding.

    Raises:
        InputError: if ``rope`` is neither, or belongs to heads of another width.
    """
    if rope is None:
        return None
    if not isinstance(rope, float | int | Frequencies):
        raise InputError(f"rope must be a base such as 10000.0 or frequencies, got {rope!r}")
    found = rope if isinstance(rope, Frequencies) else default(head_dim, rope)
    if len(found.inv_freq) != head_dim // 2:
        raise InputError(
            f"rope has {len(found.inv_freq)} frequencies, a head of width {head_dim} needs "
            f"{head_dim // 2}"
        )
    return found


def check(x: Tensor, d_model: int, mask: Tensor | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"expected x as a tensor of floating-point numbers, got {what}")
    if x.dim() != 3 or x.shape[-1] != d_model:
        raise InputError(f"expected x of shape [batch, tokens, {d_model}], got {list(x.shape)}")
    if 0 in x.shape:
        raise InputError(f"expected at least one sequence of one token, got {list(x.shape)}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != x.shape[:2]):
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"expected a tensor as padding mask of shape {list(x.shape[:2])}, got {given}"
        )
