"""A mechanism that reads with the projections of a model's own attention module.

The module stays what it is: its weights keep their names, LoRA finds its projections, and only its
``forward`` is another one. What a mechanism adds (gates, spans, more projections) becomes the
submodule ``mechanism``. That the module really is "project, norm each head, rotate, attend,
project" is tried out on a few tokens before anything is changed.

Axes: B batch, N tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from longspan.errors import Refusal
from longspan.hf.masks import rows_mask
from longspan.hf.quiet import first_line
from longspan.mechanism.layer import MechanismLayer
from longspan.ops import attend
from longspan.position import Frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = (
    ("query", "q_proj", "q_norm"),
    ("key", "k_proj", "k_norm"),
    ("value", "v_proj", ""),
    ("output", "o_proj", ""),
)
_KNOWN = {name for _, *names in _PARTS for name in names}


class Borrowed(nn.Module):
    """A projection of another module, looked up at every call, as LoRA replaces it.

    Args:
        owner: the attention module.
        name: of its projection.
        norm: of a norm over each head behind it; empty for none.
        factor: on the result.
        repeat: times that each head is repeated.
    """

    def __init__(
        self, owner: nn.Module, name: str, norm: str = "", factor: float = 1.0, repeat: int = 1
    ) -> None:
        super().__init__()
        # In a tuple: the owner must not become a submodule of its own submodule.
        self._from: tuple[Any, str, str] = (owner, name, norm)
        self.factor, self.repeat = factor, repeat

    def forward(self, x: Tensor) -> Tensor:
        owner, name, norm = self._from
        x = getattr(owner, name)(x)
        if norm or self.repeat > 1:
            x = x.unflatten(-1, (-1, owner.head_dim))
            x = getattr(owner, norm)(x) if norm else x
            x = x.repeat_interleave(self.repeat, dim=-2).flatten(-2)
        return x if self.factor == 1.0 else x * self.factor

    def extra_repr(self) -> str:
        return " ".join(part for part in self._from[1:] if part)


class HeadNorm(nn.Module):
    """A norm over each head of projected rows."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.width = norm, width

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unflatten(-1, (-1, self.width))).flatten(-2)


class Dense(MechanismLayer):
    """Causal attention, to try out what was borrowed."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        return attend(q, k, v, "causal()")


def why_not_apart(owner: nn.Module) -> str:
    """Why a module cannot lend its projections, by its looks; empty if it can."""
    absent = [name for _, name, _ in _PARTS if not hasattr(owner, name)]
    if absent:
        return f"has no {', '.join(absent)}"
    parts = {
        name for name, part in owner.named_children() if next(part.parameters(), None) is not None
    }
    more = sorted(parts - _KNOWN - {"mechanism"})
    more += [name for name, _ in owner.named_parameters(recurse=False)]
    if more:
        return f"has parts that no mechanism reads: {', '.join(more)}"
    if "forward" in vars(owner) and "mechanism" not in dict(owner.named_children()):
        return "has a forward of its own already (hooks of another library)"
    # Layers of torch's own quantisation have a method of that name.
    weight = owner.o_proj.weight  # pyright: ignore
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "has quantised weights"
    if weight.is_meta:
        return "has its weights elsewhere (device meta): offload them after this, or load them"
    # A DTensor, whose module takes long to import.
    if hasattr(weight, "placements"):
        return "has its weights in shards (DTensor): shard them after this"
    return ""


def build(
    kind: type[MechanismLayer], owner: Any, frequencies: Frequencies, options: dict[str, Any]
) -> MechanismLayer:
    """A layer beside the weights of ``owner``, started near dense attention, that borrows them."""
    width, head = owner.q_proj.in_features, owner.head_dim
    heads, kv_heads = (part.out_features // head for part in (owner.q_proj, owner.k_proj))
    weight = owner.o_proj.weight
    layer = kind(
        width,
        heads,
        **({"kv_heads": kv_heads} if kind.grouped else {}),
        head_dim=head,
        rope=frequencies,
        bias=owner.k_proj.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )
    # Projections that a mechanism adds start as copies.
    for part, name, _ in _PARTS:
        own, lent = getattr(layer, part), getattr(owner, name)
        if isinstance(own, nn.Linear) and own.weight.shape == lent.weight.shape:
            _copy(lent, own)
    layer.start_near_dense()
    scaling = float(getattr(owner, "scaling", head**-0.5)) * head**0.5
    for part, name, norm in _PARTS:
        if getattr(layer, part) is None:
            continue
        lent = Borrowed(
            owner,
            name,
            norm if norm and hasattr(owner, norm) else "",
            scaling if part == "query" and abs(scaling - 1) > 1e-6 else 1.0,
            layer.kv_heads // kv_heads if part in ("key", "value") else 1,
        )
        setattr(layer, part, lent)
    if hasattr(owner, "k_norm"):
        for name, part in list(layer.named_children()):
            if name.startswith("key_"):
                norm = HeadNorm(copy.deepcopy(owner.k_norm), head)
                setattr(layer, name, nn.Sequential(part, norm))
    return layer.train(owner.training)


@torch.no_grad()
def _copy(lent: Any, own: nn.Linear) -> None:
    """Weights of a projection, which LoRA may have wrapped; Qwen2 has a bias on three of four."""
    own.weight.copy_(lent.weight)
    if own.bias is not None:
        own.bias.zero_() if lent.bias is None else own.bias.copy_(lent.bias)


@torch.no_grad()
def try_apart(
    path: str, owner: Any, rotary: nn.Module, frequencies: Frequencies, attention: str
) -> None:
    """Compare borrowed parts with the module itself, on a few tokens.

    Args:
        path: of the module, for the error.
        owner: the attention module.
        rotary: the model's rotary module.
        frequencies: what was read from it.
        attention: name of an attention implementation that is causal.

    Raises:
        Refusal: if they differ.
    """
    weight = owner.o_proj.weight
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, owner.q_proj.in_features, generator=draw, device="cpu").to(weight)
    place = torch.arange(5, device=x.device)[None]
    training, before = owner.training, owner.config._attn_implementation
    owner.config._attn_implementation = attention
    try:
        wanted = type(owner).forward(
            owner.eval(),
            hidden_states=x,
            position_embeddings=rotary(x, place),
            attention_mask=rows_mask(attention, 1, 5, 5),
            position_ids=place,
        )[0]
        found = build(Dense, owner, frequencies, {})(x)
        apart = float((found - wanted).norm() / wanted.norm())
        same, said = apart <= _tolerance(x.dtype), f"they differ by {apart:.1e}"
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        same, said = False, first_line(error)
    finally:
        owner.config._attn_implementation = before
        owner.train(training)
    if not same:
        raise Refusal(
            f"{path} ({type(owner).__name__}) is not made of projections, norms of heads, a "
            f"rotation and causal attention alone ({said}). The model was not changed."
        )


def _tolerance(dtype: torch.dtype) -> float:
    return 0.05 if torch.finfo(dtype).bits == 16 else 1e-4


def read_frequencies(base: PreTrainedModel, rotary: Any) -> Frequencies:
    """The frequencies of a rotary module.

    Raises:
        Refusal: if they change with the length.
    """
    kind = getattr(rotary, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise Refusal(
            f"{type(base).__name__} has {kind} positions, whose frequencies change with the "
            "length: set another scaling first (longspan.hf.set_rope). The model was not changed."
        )
    inv_freq = rotary.inv_freq.detach().double().cpu().numpy().astype(np.float64)
    return Frequencies(inv_freq, float(getattr(rotary, "attention_scaling", 1.0)))
