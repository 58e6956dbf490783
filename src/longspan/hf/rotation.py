"""Turning keys and queries on with a model's own rotation.

Rotations add, R(a) R(b) = R(a + b), so what a model has rotated to one place is moved to another
by the difference. The angles are those of the model's rotary module, scaled frequencies included;
its ``attention_scaling`` is in the tensors already and is divided out.

Axes: B batch, H heads, N rows, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longspan.errors import Refusal
from longspan.hf.rotary import rotary_modules
from longspan.hf.rotates import ROTATE, rotates
from longspan.hf.routes import routed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Their frequencies change with the longest position that they are asked for.
_CHANGING = ("dynamic", "longrope")


def rotation(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The model's own rotation of queries [B, H, N, D] by cosine and sine [B, N, D]."""
    apply = getattr(sys.modules[type(module).__module__], ROTATE, None)
    if apply is None:
        raise Refusal(f"{type(module).__name__} has no {ROTATE} beside it.")
    # It rotates a query and a key; one head of a key is the least it takes.
    return lambda q, cos, sin: apply(q, q[:, :1], cos, sin)[0]


def rotations_add(module: nn.Module, rotary: nn.Module) -> bool:
    """Whether turning by 5 and then by 7 is turning by 12, with the width that queries have."""
    # Quantised modules have no parameters, and those that are offloaded lie nowhere.
    device = next(rotary.buffers()).device
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int):
        return False
    x = torch.linspace(-1, 1, width, device=device)[None, None, None]
    scale = getattr(rotary, "attention_scaling", 1.0)
    try:
        turn = rotation(module)
        places = [torch.tensor([[p]], device=device) for p in (5, 7, 12)]
        first, second, both = (
            [part / scale for part in rotary.forward(x.new_empty(0), place)] for place in places
        )
        return torch.allclose(turn(turn(x, *first), *second), turn(x, *both), atol=1e-5)
    except (Refusal, RuntimeError, AttributeError, TypeError, ValueError):
        return False


def still_layers(base: PreTrainedModel) -> frozenset[int]:
    """Indices of the layers whose attention does not rotate: there is nothing to turn in them."""
    still = (getattr(m, "layer_idx", None) for _, m in routed(base) if rotates(m) is False)
    return frozenset(index for index in still if isinstance(index, int))


def why_not_turn(base: PreTrainedModel, *, still: bool = False) -> Iterator[str]:
    """Reasons why rotated keys or queries of a model cannot be turned on.

    Args:
        base: the model.
        still: accept layers that do not rotate; they are not to be turned.
    """
    name = type(base).__name__
    rotary = [module for _, module in rotary_modules(base)]
    if len(rotary) != 1 or not hasattr(rotary[0], "inv_freq"):
        yield f"{name} has {len(rotary)} rotary modules instead of one with one set of frequencies"
        return
    for path, module in routed(base):
        turns = rotates(module)
        if turns is False and still and isinstance(getattr(module, "layer_idx", None), int):
            continue
        if turns is False:
            yield f"{path} does not rotate its queries"
        elif not rotations_add(module, rotary[0]):
            yield f"{path} ({type(module).__name__}) rotates in a way that does not add up"
        elif turns is None:
            yield f"{path} ({type(module).__name__}) does not show whether it rotates its queries"


def turner(base: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that turns x [B, H, N, D] on by places [B, N], which may be negative.

    It computes in float32 at least and gives the dtype of ``x``. It is not for ``still_layers``.

    Raises:
        Refusal: if the model's rotations do not add up, or change with the length.
    """
    reasons = list(why_not_turn(base, still=True))
    kind = getattr(base.config.get_text_config(), "rope_parameters", None) or {}
    if kind.get("rope_type") in _CHANGING:
        reasons.append(f"its {kind['rope_type']} frequencies change with the length")
    if reasons:
        raise Refusal(f"keys cannot be moved to other positions: {'; '.join(reasons)}.")
    ((_, rotary),) = rotary_modules(base)
    module = next(module for _, module in routed(base))
    own, scale = rotation(module), getattr(rotary, "attention_scaling", 1.0)

    def turn(x: Tensor, places: Tensor) -> Tensor:
        kind = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary.forward(x.new_empty(0, dtype=kind), places)
        return own(x.to(kind), cos / scale, sin / scale).to(x.dtype)

    return turn
