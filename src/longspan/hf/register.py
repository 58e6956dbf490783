"""The attention function and the mask function behind one name.

transformers looks both up by the name in ``config._attn_implementation``. They are registered
together: an attention without a mask function is handed no mask at all, and padding silently
becomes text. The name is made from the pattern, so the model itself says what it computes wherever
its forward runs again, as in gradient checkpointing; nothing depends on a surrounding ``with``.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError, Refusal
from longspan.hf._cache_asked import Asked, kept_layer
from longspan.hf._position_ids import check_positions
from longspan.hf.collected import collected
from longspan.hf.masks import CROSSES, check_run, rows_mask
from longspan.hf.rows import Rows, within
from longspan.ops import attend
from longspan.ops.inputs import autocast
from longspan.pattern import Causal, Pattern

PREFIX = "longspan."

# Arguments by which some models change the logits in ways that no kernel computes.
_CHANGES_LOGITS = ("softcap", "position_bias", "head_mask", "indices", "block_indices", "sinks")

Attention = Callable[..., tuple[Tensor, None]]

_known: dict[str, tuple[Any, str]] = {}


class Estimated(Causal):
    """Causal attention of which some prompts get an estimate; see ``longspan.hf.prefill``."""

    def takes(self, rows: Rows, query: Tensor, key: Tensor) -> bool:
        """Whether these rows get one."""
        raise NotImplementedError

    def attend(
        self,
        module: nn.Module,
        rows: Rows,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
    ) -> tuple[Tensor, Tensor]:
        """The estimate: out [B, H, N, D] and lse [B, H, N]."""
        raise NotImplementedError


def register(pattern: Pattern, impl: str) -> str:
    """Make a pattern available to transformers; registering it again changes nothing.

    Args:
        pattern: where each query may look, within what the model's own layers allow.
        impl: kernel name or ``"auto"``, as for ``attend``.

    Returns:
        The name to use as ``attn_implementation``.
    """
    return enlist(pattern, impl, attention_over)


def enlist(
    what: Any,
    impl: str,
    make: Callable[[str, Any, str], Attention],
    mask: Callable[..., Rows] = rows_mask,
) -> str:
    """Register an attention function and the mask function that belongs to it.

    Args:
        what: what it computes; its text makes the name.
        impl: kernel name or ``"auto"``.
        make: gives the function for (name, what, impl).
        mask: the mask function, which takes the name first.

    Returns:
        The name to use as ``attn_implementation``.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    digest = hashlib.sha256(f"{what} {impl}".encode()).hexdigest()[:16]
    name = PREFIX + digest
    if name not in _known:
        # A compiler around the model steps out here: plans are made by numpy, and the kernels that
        # are compiled do that themselves.
        whole = partial(
            torch.compiler.disable,
            reason="longspan plans outside of compiled code: compile without fullgraph=True; "
            "to export the model, take the pattern out with longspan.hf.remove(model)",
        )
        AttentionInterface.register(name, whole(make(name, what, impl)))
        AttentionMaskInterface.register(name, whole(partial(mask, name)))
        _known[name] = (what, impl)
    return name


def registered(name: str | None) -> Any:
    """What an attention implementation computes; None if it is not longspan's."""
    return _known[name][0] if name in _known else None


def described(name: str | None) -> str:
    """An attention implementation in words: a longspan name with its pattern."""
    if name not in _known:
        return str(name)
    what, impl = _known[name]
    return f"{name} = {what} (impl {impl})"


def attention_over(name: str, pattern: Pattern, impl: str) -> Attention:
    """The function behind a name that computes a pattern, as ``enlist`` wants it made."""
    estimated = pattern if isinstance(pattern, Estimated) else None
    exact = pattern if estimated is None else Causal()

    def longspan_attention(
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
        kept = kept_layer(key)
        if kept is not None:
            kept.claim(module)
        rows = checked_rows(name, module, query, key, attention_mask, dropout, kwargs)
        check_positions(rows, kwargs.get("position_ids"))
        query, key, value = autocast(query, key, value)
        layer = getattr(module, "layer_idx", None) or 0
        sink = kwargs.get("s_aux")

        own = rows if kept is None else rows.newest()
        dense = estimated is None or not estimated.takes(own, query, key)

        def new_rows() -> tuple[Tensor, Tensor]:
            if estimated is not None and not dense:
                return estimated.attend(module, own, query, key, value, scaling)
            laid = own.plan(exact, layer, query.shape[1])
            return attend(query, key, value, laid, scale=scaling, impl=impl, return_lse=True)

        if kept is None:
            out, lse = new_rows()
        else:
            asked = Asked(
                rows=rows,
                pattern=within(exact.at_layer(layer), rows.own),
                scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
                position_ids=kwargs.get("position_ids"),
                with_lse=sink is not None,
                dense=dense,
            )
            out, lse = kept.attend(query, key, value, asked, new_rows)
        if sink is not None:
            assert lse is not None
            out = beside_sink(out, lse, sink)
        return out.transpose(1, 2).contiguous(), None

    return longspan_attention


def beside_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Outputs beside a learned logit per head that takes weight and gives no value (gpt-oss).

    e^lse / (e^lse + e^sink) is what remains for the keys.
    """
    share = torch.sigmoid(lse - sink.to(lse.dtype)[None, :, None])
    return out * share[..., None].to(out.dtype)


def checked_rows(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Any,
    dropout: float,
    kwargs: dict[str, Any],
) -> Rows:
    """The record in place of a mask, once everything that would be ignored has been refused."""
    check_run(query)
    kind = type(module).__name__
    if _crosses(module, attention_mask):
        raise Refusal(f"{kind}: {CROSSES}")
    if not isinstance(attention_mask, Rows):
        given = "none" if attention_mask is None else type(attention_mask).__name__
        if isinstance(attention_mask, Tensor):
            given = f"a tensor of shape {list(attention_mask.shape)}"
        raise InputError(
            f"{kind} got {given} instead of the mask record of longspan. Pass attention_mask as "
            "[batch, tokens] of ones and zeros (or none); masks of pairs are not supported."
        )
    if attention_mask.attention != name:
        raise Refusal(
            f"{kind} computes {described(name)}, but its mask was made for "
            f"{described(attention_mask.attention)}: a backward pass with gradient checkpointing "
            "after another pattern was applied. Finish the backward pass first."
        )
    if dropout:
        raise InputError(
            f"{kind} asks for attention dropout {dropout}, which no kernel computes. Set "
            "attention_dropout of its modules to 0 (and in the configuration, before building)."
        )
    for argument in _CHANGES_LOGITS:
        if kwargs.get(argument) is not None:
            raise Refusal(f"{kind} changes its logits by {argument!r}, which no kernel computes.")
    ends = kwargs.get("cu_seq_lens_q")
    packed = attention_mask.segments is not None and not attention_mask.masked
    if ends is not None and len(ends) > 2 and not packed:
        raise InputError(
            f"{kind} got cu_seq_lens_q of {len(ends) - 1} packed documents, which only flash "
            "attention reads: they would see each other. Pass position_ids that start again with "
            "each document, without attention_mask and with use_cache=False."
        )
    if kwargs.get("is_causal") is False and attention_mask.own.is_causal:
        raise Refusal(f"{kind} asks for attention to both sides but made a causal mask.")
    if kwargs.get("output_attentions") or collected("attentions"):
        raise InputError("Attention weights are never formed; call without output_attentions.")
    # A cache with a policy hands on new keys alone, and reads the others by itself.
    keys = attention_mask.queries if kept_layer(key) else attention_mask.keys
    if (query.shape[2], key.shape[2]) != (attention_mask.queries, keys):
        raise Refusal(
            f"{kind} attends from {query.shape[2]} to {key.shape[2]} rows, but its mask was made "
            f"for {attention_mask.queries} and {keys}: this cache gives layers of "
            "one type different lengths."
        )
    return attention_mask


def _crosses(module: nn.Module, attention_mask: Any) -> bool:
    """Whether the keys are those of another text or of an image.

    Modules of a decoder that read an encoder's rows are two-sided (Bart), or say what they are
    (GPT-2, BERT, Mllama); some are given no mask at all.
    """
    if isinstance(attention_mask, Rows) and attention_mask.own.is_causal:
        return False
    decodes = getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)
    named = "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False)
    return bool(decodes or named)
