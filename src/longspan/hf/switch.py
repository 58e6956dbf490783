"""Put a pattern into a Hugging Face model, and take it out again.

Only a name in the model's configuration changes, so everything built on the model keeps working:
``generate``, gradient checkpointing, PEFT, copies, pickles. Saved models do not carry the name.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from longspan import mechanism
from longspan.errors import InputError, PatternError, Refusal
from longspan.hf._cache_calls import leave_calls
from longspan.hf.dual_chunk import settle, why_not
from longspan.hf.embedded import forget_norms
from longspan.hf.entries import Entries, Entry
from longspan.hf.mechanisms import (
    Method,
    mechanism_names,
    method,
    swap,
    swapped,
    why_not_swap,
)
from longspan.hf.ranks import Parallel
from longspan.hf.rope import set_rope
from longspan.hf.routes import inspect
from longspan.hf.unwrap import base_model
from longspan.mechanism import DualChunk
from longspan.mechanism.layer import MechanismLayer
from longspan.ops.capability import KERNELS
from longspan.pattern import Pattern, parse
from longspan.position import LongFactors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Applied:
    """A pattern at work in a model; a context manager that takes it out at the end.

    Attributes:
        model: the transformers model.
        entry: what was put into it.
    """

    model: PreTrainedModel
    entry: Entry

    @property
    def pattern(self) -> Any:
        """Its pattern, the sizes of its Dual Chunk Attention, its mechanism, or its ranks."""
        return self.entry.what

    @property
    def name(self) -> str:
        """Its attention implementation."""
        return self.entry.name

    @property
    def mechanisms(self) -> dict[str, MechanismLayer]:
        """Path of each attention module that computes a mechanism, and its layer."""
        return swapped(self.model)

    def remove(self) -> None:
        """Restore what was there before.

        Handles may go in any order: if something else was applied since, that stays at work, and
        this pattern does not come back when it goes. Does nothing a second time.
        """
        found = Entries.of(self.model)
        if self.entry in found.entries:
            last = self.entry is found.entries[-1]
            found.entries.remove(self.entry)
            found.keep(self.model)
            if last:
                _switch(self.model, found.name)

    def __enter__(self) -> Self:
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
    sees the intersection. A pattern applied before is replaced. Two models built from one
    configuration object (``from_config(config)`` twice) share it, and so the pattern: give each a
    copy of it.

    A layer of ``longspan.mechanism`` that needs no weights beside those of the model, such as
    ``MoBA``, ``TopK`` or ``PooledChunkAttention``, is applied likewise, with its options:
    ``apply(model, longspan.mechanism.MoBA, block=256, top=4)``. Others: ``longspan.hf.convert``.

    Args:
        model: a Hugging Face model, or a PEFT model around one.
        pattern: a pattern or its text form; or ``longspan.DualChunk``, which also changes where
            queries and keys are rotated to; or a class of ``longspan.mechanism``, or its name.
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
    if isinstance(pattern, str) and pattern not in mechanism.__all__:
        _refuse_mechanism_as_text(pattern)
        pattern = parse(pattern)
    if isinstance(pattern, str) or (
        isinstance(pattern, type) and issubclass(pattern, MechanismLayer)
    ):
        return put(base, method(base, pattern, None, impl, options), impl)
    if options:
        raise InputError(f"{', '.join(options)}: only mechanisms have options.")
    if not isinstance(pattern, Pattern | DualChunk):
        given = type(pattern).__name__
        if isinstance(pattern, type):
            given = (
                f"the class {pattern.__name__} itself: give one such as {pattern.__name__}(...)"
            )
        elif isinstance(pattern, MechanismLayer):
            given = f"a {given} layer, not made for this model: give the class and its options"
        raise PatternError(f"Expected a pattern or its text, got {given}.")
    return put(base, pattern, impl)


def _refuse_mechanism_as_text(text: str) -> None:
    """A mechanism has a name and options beside it; as a pattern it would be unknown."""
    word = text.partition("(")[0].strip()
    meant = [name for name in mechanism_names() if name.lower() == word.lower()]
    if meant:
        raise PatternError(
            f"{text!r} is no pattern. The mechanism takes its options beside its name: "
            f'apply(model, "{meant[0]}", ...)'
        )


def put(
    base: PreTrainedModel,
    wanted: Pattern | DualChunk | Method | Parallel,
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
    pattern = wanted.pattern if isinstance(wanted, Parallel) else wanted
    if isinstance(pattern, Pattern):
        check_heads(pattern, config)
    found, entry = Entries.of(base), Entry(wanted, impl)
    # The name of a mechanism alone would not bring its layers back.
    kept = [old for old in found.entries if not isinstance(old.what, Method)]
    below = Entries(found.before, kept)
    _switch(base, entry.name)
    if config._attn_implementation != entry.name:
        raise Refusal(
            f"transformers did not switch the attention of {report.model} to {entry.name}."
        )
    if isinstance(wanted, Method):
        try:
            swap(base, wanted, impl, new_weights=new_weights)
        except Exception:
            below.keep(base)
            _switch(base, below.name)
            raise
    Entries(found.before, [*kept, entry]).keep(base)
    return Applied(base, entry)


def check_heads(pattern: Pattern, config: Any) -> None:
    """Raise PatternError for a pattern that does not fit the heads of some layer."""
    text = config.get_text_config()
    for layer in range(text.num_hidden_layers):
        pattern.at_layer(layer).require(text.num_attention_heads)


def remove(model: Any) -> None:
    """Restore the attention that a model had before the first ``apply``; nothing to do otherwise.

    Args:
        model: a Hugging Face model, or a PEFT model around one.
    """
    base = base_model(model)
    before = Entries.of(base).before
    if base.config.get_text_config()._attn_implementation != before:
        base.set_attn_implementation(before)
    settle(base)
    forget_norms(base)
    leave_calls(base)
    Entries(before).keep(base)


def extend(
    model: Any,
    length: int,
    pattern: Pattern | str,
    rope: str = "yarn",
    *,
    factors: LongFactors | None = None,
) -> Any:
    """Stretch the positions of a model and put a pattern into it; no training.

    Args:
        model: a Hugging Face model, or a PEFT model around one; changed in place.
        length: target length in tokens, at least the trained one.
        pattern: a pattern or its text form.
        rope: none, linear, ntk, dynamic, yarn, llama3 or longrope.
        factors: for longrope, as in ``longspan.hf.set_rope``.

    Returns:
        The model.

    Raises:
        LongspanError: as in ``apply`` and ``longspan.hf.rope.set_rope``; the model is then
            unchanged.
    """
    applied = apply(model, pattern)
    try:
        set_rope(model, rope, length, factors=factors)
    except Exception:
        applied.remove()
        raise
    return model


def _switch(base: PreTrainedModel, name: str) -> None:
    base.set_attn_implementation(name)
    settle(base)
