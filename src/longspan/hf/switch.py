"""Put a pattern into a Hugging Face model, and take it out again.

Only a name in the model's configuration changes, so everything built on the model keeps working:
``generate``, gradient checkpointing, PEFT, copies. Saved models do not carry the name.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from longspan.errors import InputError, PatternError, Refusal
from longspan.hf.dual_chunk import register_dual_chunk, settle, why_not
from longspan.hf.mechanisms import (
    Method,
    method,
    register_method,
    swap,
    swapped,
    why_not_swap,
)
from longspan.hf.register import PREFIX, register, registered
from longspan.hf.rope import set_rope
from longspan.hf.routes import inspect
from longspan.hf.unwrap import base_model
from longspan.mechanism import DualChunk
from longspan.mechanism.layer import MechanismLayer
from longspan.ops.capability import KERNELS
from longspan.pattern import Pattern, parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# On the model, not in the configuration, which would be saved with it.
_BEFORE = "_longspan_attention_before"


@dataclass(frozen=True, eq=False)
class Applied:
    """A pattern at work in a model; a context manager that takes it out at the end.

    Attributes:
        model: the transformers model.
        pattern: its pattern, the sizes of its Dual Chunk Attention, or its mechanism.
        name: its attention implementation.
        before: the implementation that ``remove`` restores.
    """

    model: PreTrainedModel
    pattern: Pattern | DualChunk | Method
    name: str
    before: str

    @property
    def mechanisms(self) -> dict[str, MechanismLayer]:
        """Path of each attention module that computes a mechanism, and its layer."""
        return swapped(self.model)

    def remove(self) -> None:
        """Restore what was there before; does nothing if the pattern is no longer at work."""
        if self.model.config.get_text_config()._attn_implementation == self.name:
            _switch(self.model, self.before)

    def __enter__(self) -> Applied:
        """Enter a block; with gradient checkpointing, the backward pass belongs inside it too."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def apply(
    model: Any,
    pattern: Pattern | DualChunk | type[MechanismLayer] | str,
    impl: str = "auto",
    **options: Any,
) -> Applied:
    """Let every attention layer of a model look only where the pattern allows.

    Layers keep their own bounds: a causal model stays causal, and a layer with a sliding window
    sees the intersection. A pattern applied before is replaced.

    A layer of ``longspan.mechanism`` that needs no weights beside those of the model, such as
    ``MoBA``, ``TopK`` or ``PooledChunkAttention``, is applied likewise, with its options:
    ``apply(model, longspan.mechanism.MoBA, block=256, top=4)``. Others: ``longspan.hf.convert``.

    Args:
        model: a Hugging Face model, or a PEFT model around one.
        pattern: a pattern or its text form; or ``longspan.DualChunk``, which also changes where
            queries and keys are rotated to; or a class of ``longspan.mechanism``.
        impl: kernel name or ``"auto"``, as for ``longspan.attend``.
        options: of a mechanism.

    Returns:
        A handle; ``with apply(...)`` restores the model at the end of the block.

    Raises:
        PatternError: if the pattern does not parse, does not fit the number of heads, or is causal
            but changes as the sequence grows.
        Refusal: if the model does not route through the attention interface, with each reason, or
            ``impl`` is unknown. The model is then unchanged.
    """
    base = base_model(model)
    if isinstance(pattern, type) and issubclass(pattern, MechanismLayer):
        return put(base, method(base, pattern, None, impl, options), impl)
    if options:
        raise InputError(f"{', '.join(options)}: only mechanisms have options.")
    wanted = parse(pattern) if isinstance(pattern, str) else pattern
    if not isinstance(wanted, Pattern | DualChunk):
        raise PatternError(f"Expected a pattern or its text, got {type(pattern).__name__}.")
    return put(base, wanted, impl)


def put(
    base: PreTrainedModel,
    wanted: Pattern | DualChunk | Method,
    impl: str,
    *,
    new_weights: bool = False,
) -> Applied:
    """Switch a model to a pattern or a mechanism; see ``apply`` and ``longspan.hf.convert``.

    Args:
        base: the transformers model.
        wanted: what it is to compute.
        impl: kernel name or ``"auto"``.
        new_weights: whether a mechanism may have weights of its own.

    Raises:
        LongspanError: a child that says why not. The model is then unchanged.
    """
    kernels = ("auto", *(kernel.name for kernel in KERNELS))
    if impl not in kernels:
        raise Refusal(f"Unknown impl {impl!r}; choose one of {', '.join(kernels)}.")
    report = inspect(base)
    reasons = list(report.reasons)
    if not reasons and isinstance(wanted, DualChunk):
        reasons += why_not(base)
    if not reasons and isinstance(wanted, Method):
        reasons += why_not_swap(base, wanted.layers)
    trained = sum(p.numel() for layer in swapped(base).values() for p in layer.parameters())
    if trained:
        reasons.append(
            f"{report.model} has {trained:,} weights of a mechanism, which would be lost: "
            "longspan.hf.save_mechanism keeps them, longspan.hf.remove takes them out"
        )
    if reasons:
        raise Refusal("; ".join(reasons) + ". The model was not changed.")
    config = base.config.get_text_config()
    if isinstance(wanted, Pattern):
        for layer in range(config.num_hidden_layers):
            wanted.at_layer(layer).require(config.num_attention_heads)
    before = str(config._attn_implementation)
    if isinstance(registered(before), Method):
        # Its name alone would not bring its layers back.
        before = getattr(base, _BEFORE, "sdpa" if base._supports_sdpa else "eager")
    match wanted:
        case DualChunk():
            name = register_dual_chunk(wanted, impl)
        case Method():
            name = register_method(wanted, impl)
        case _:
            name = register(wanted, impl)
    if not before.startswith(PREFIX):
        setattr(base, _BEFORE, before)
    _switch(base, name)
    if config._attn_implementation != name:
        raise Refusal(f"transformers did not switch the attention of {report.model} to {name}.")
    if isinstance(wanted, Method):
        try:
            swap(base, wanted, name, new_weights=new_weights)
        except Exception:
            _switch(base, before)
            raise
    return Applied(base, wanted, name, before)


def remove(model: Any) -> None:
    """Restore the attention that a model had before the first ``apply``; nothing to do otherwise.

    Args:
        model: a Hugging Face model, or a PEFT model around one.
    """
    base = base_model(model)
    if (base.config.get_text_config()._attn_implementation or "").startswith(PREFIX):
        # A model that shares its configuration with the one that was changed has no note of it.
        _switch(base, getattr(base, _BEFORE, "sdpa" if base._supports_sdpa else "eager"))
    if hasattr(base, _BEFORE):
        delattr(base, _BEFORE)


def extend(model: Any, length: int, pattern: Pattern | str, rope: str = "yarn") -> Any:
    """Stretch the positions of a model and put a pattern into it; no training.

    Args:
        model: a Hugging Face model, or a PEFT model around one; changed in place.
        length: target length in tokens, at least the trained one.
        pattern: a pattern or its text form.
        rope: none, linear, ntk, dynamic, yarn or llama3.

    Returns:
        The model.

    Raises:
        LongspanError: as in ``apply`` and ``longspan.hf.rope.set_rope``; the model is then
            unchanged.
    """
    applied = apply(model, pattern)
    try:
        set_rope(model, rope, length)
    except Exception:
        applied.remove()
        raise
    return model


def _switch(base: PreTrainedModel, name: str) -> None:
    base.set_attn_implementation(name)
    settle(base)
