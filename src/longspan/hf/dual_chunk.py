"""Dual Chunk Attention in a Llama-type model, without training and without new weights.

An attention function receives queries and keys that the model has rotated. So the model's rotary
module is given positions modulo the chunk: keys enter the cache rotated as they stay for ever, and
queries as the intra pass needs them. For the other passes queries are turned on by the difference,
with the model's own functions: rotations add, R(a) R(b) = R(a + b), which is tried out first.
Angles stay small at any length.

Two forward hooks do it, and take part only while the model's attention is a dual chunk one: on the
rotary module (positions modulo the chunk) and on the module that owns it (positions count real
tokens, as chunks do; layers are handed the rotary module).

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from longspan.errors import InputError, Refusal
from longspan.hf.register import Attention, checked_rows, enlist, registered
from longspan.hf.rotary import rotary_modules
from longspan.hf.rotation import rotation, why_not_turn
from longspan.hf.routes import note_changes, undo_changes
from longspan.hf.rows import Rows
from longspan.mechanism._dual_chunk_plan import DualChunk, DualChunkPlan, lay_out, plain_plan
from longspan.mechanism.dual_chunk import attend_in_passes
from longspan.ops.inputs import autocast
from longspan.pattern import Causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROTARY = "longspan_rotary"


def register_dual_chunk(config: DualChunk, impl: str) -> str:
    """Make Dual Chunk Attention available to transformers; the name to use."""
    return enlist(config, impl, _attention)


def settle(base: PreTrainedModel) -> None:
    """Add the hooks that the model's present attention needs, and take others away."""
    undo_changes(base)
    config = registered(base.config.get_text_config()._attn_implementation)
    if not isinstance(config, DualChunk):
        return
    ((path, rotary),) = rotary_modules(base)
    outer, _, own = path.rpartition(".")
    owner = base.get_submodule(outer)
    changes = (
        (rotary, path, _fold, f"gets positions modulo {config.chunk}"),
        (owner, outer or "the model", partial(_count, own), "gets positions of real tokens"),
    )
    note_changes(
        base,
        [
            (
                f"{name} ({type(module).__name__}) {what}",
                module.register_forward_pre_hook(hook, with_kwargs=True),
            )
            for module, name, hook, what in changes
        ],
    )


def why_not(base: PreTrainedModel) -> Iterator[str]:
    """Reasons why Dual Chunk Attention cannot be put into a model that routes."""
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        name = type(base).__name__
        yield f"{name} has layers with a window of their own, whose distances must not change"
    yield from why_not_turn(base)


@dataclass(frozen=True, eq=False)
class _Laid:
    plan: DualChunkPlan
    turns: list[tuple[Tensor, Tensor] | None]


def _attention(name: str, config: DualChunk, impl: str) -> Attention:
    def longspan_dual_chunk(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers asks: q [B, H, N, D], k and v [B, K, M, D] to [B, N, H, D]."""
        rows = checked_rows(name, module, query, key, attention_mask, dropout, kwargs)
        if kwargs.get("s_aux") is not None:
            raise Refusal(f"{type(module).__name__} adds a sink to its logits.")
        rotary = kwargs.get(_ROTARY)
        if rotary is None:
            raise Refusal(
                f"{type(module).__name__} was not handed the rotary module: this model does not "
                "pass its keyword arguments on to its layers, or longspan.hf.apply was not used."
            )
        laid = _lay(rows, config, rotary, query, kwargs.get("position_ids"))
        turn = rotation(module)

        def queries(index: int) -> Tensor:
            turned = laid.turns[index]
            own = query if turned is None else turn(query.to(turned[0].dtype), *turned)
            return autocast(own.to(query.dtype))[0]

        key, value = autocast(key, value)
        out = attend_in_passes(queries, key, value, laid.plan, scale=scaling, impl=impl)
        return out.transpose(1, 2).contiguous(), None

    return longspan_dual_chunk


def _lay(
    rows: Rows, config: DualChunk, rotary: nn.Module, query: Tensor, position_ids: Any
) -> _Laid:
    """Plan and rotations, shared by the layers of a forward pass."""
    if config not in rows.kept:
        if rows.own != Causal():
            raise Refusal(f"Dual Chunk Attention is causal; this model's own mask is {rows.own}.")
        lay, stands = plain_plan, {}
        if rows.segments is not None:
            tables = ("positions", "segments", "key_positions", "key_segments")
            lay, stands = lay_out, {table: getattr(rows, table) for table in tables}
        elif rows.query_start + rows.queries != rows.keys or rows.key_start:
            lay = lay_out
            stands["positions"] = rows.query_start + np.arange(rows.queries)
            stands["key_positions"] = rows.key_start + np.arange(rows.keys)
        laid = lay(config, rows.queries, query.shape[1], keys=rows.keys, **stands)
        _check_positions(rows, laid, position_ids)
        own = laid.position % config.chunk
        # In float32 whatever the model's dtype: queries are rotated a second time.
        place = query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))
        scale = getattr(rotary, "attention_scaling", 1.0)
        turns: list[tuple[Tensor, Tensor] | None] = []
        for _, target in laid.passes:
            turn = torch.from_numpy(target - own).to(query.device)
            cos, sin = rotary.forward(place, turn)
            turns.append((cos / scale, sin / scale) if (target != own).any() else None)
        rows.kept[config] = _Laid(laid, turns)
    return rows.kept[config]


def _check_positions(rows: Rows, laid: DualChunkPlan, position_ids: Any) -> None:
    """Refuse positions that count otherwise than chunks do.

    Raises:
        InputError: if the model rotates real tokens to places where the plan has others.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        given = "none" if position_ids is None else f"{list(position_ids.shape)}"
        raise Refusal(f"Layers need position_ids [batch, tokens] to be handed on, got {given}.")
    given = position_ids.cpu().numpy()
    real = True if rows.segments is None else rows.segments >= 0
    if ((given != laid.position) & real).any():
        raise InputError(
            "position_ids do not count the real tokens of each sequence from 0, and chunks do. "
            "Leave position_ids out and pass attention_mask by name; with a cache pass neither, "
            "or the mask of all tokens so far."
        )


def _fold(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the rotary module: positions modulo the chunk."""
    config = registered(getattr(module.config, "_attn_implementation", None))
    if not isinstance(config, DualChunk):
        return None
    places = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    if places.dim() > 2 and bool((places != places[:1]).any()):
        raise InputError(
            "Tokens of images have several positions each, which chunks do not count. Use Dual "
            "Chunk Attention for text alone, or a pattern: longspan.hf.remove(model)."
        )
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": places % config.chunk}
    return (args[0], places % config.chunk, *args[2:]), kwargs


def _count(rotary: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the module that owns the rotary one."""
    own = module.get_submodule(rotary)
    if not isinstance(registered(getattr(own.config, "_attn_implementation", None)), DualChunk):
        return None
    mask, tokens = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    tokens = kwargs.get("input_ids", args[0] if args else None) if tokens is None else tokens
    given = kwargs.get("position_ids")
    if given is None and isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None:
        count = (mask.to(torch.int64).cumsum(dim=-1) - 1).clamp_min(0)
        given = count[:, -tokens.shape[1] :]
    return args, {**kwargs, "position_ids": given, _ROTARY: own}
