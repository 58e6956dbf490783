"""Which attention of a model longspan would replace, and why not the rest. Changes nothing.

transformers lets a name choose the attention function, but only in classes whose ``forward`` asks
``ALL_ATTENTION_FUNCTIONS`` for it. The others keep what they do, silently, so a model is taken as
a whole or refused with each reason.
"""

from __future__ import annotations

import inspect as python_inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from longspan.hf.register import described
from longspan.hf.unwrap import base_model, sharing

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Class names, without the family's own name, of modules that mix tokens.
_MIXES_TOKENS = re.compile(
    r"(Attention|Attn|Mixer|Mamba|SSM|DeltaNet|RWKV|Recurrent|ShortConv|Hyena|Retention)"
    r"(?!.*(Layer|Norm|Embedding)$)"
)
# On the model: what was done to it beside its attention, in words, and the handle to undo it.
_CHANGES = "_longspan_changes"
_KNOWN_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, kw_only=True)
class Module:
    """One attention module.

    Attributes:
        path: its place in the model.
        kind: name of its class.
        reason: why it does not route; empty if it does.
    """

    path: str
    kind: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ``apply`` would do to a model.

    Attributes:
        model: class of the model.
        attention: how it attends at present.
        modules: every module that mixes tokens.
        reasons: why the model is refused; empty if it is not.
        changes: what was changed beside the attention function.
    """

    model: str
    attention: str
    modules: tuple[Module, ...]
    reasons: tuple[str, ...]
    changes: tuple[str, ...] = ()

    @property
    def routes(self) -> bool:
        """True if ``apply`` accepts the model."""
        return not self.reasons

    def rows(self) -> list[tuple[str, str, str]]:
        """Table of path, class and either "routes" or the reason why not."""
        return [(m.path, m.kind, m.reason or "routes") for m in self.modules]

    def __str__(self) -> str:
        verdict = "routes" if self.routes else "is refused"
        lines = [f"{self.model} {verdict}; attention now: {self.attention}"]
        lines += [f"  because {reason}" for reason in self.reasons]
        lines += [f"  {change}" for change in self.changes]
        lines += [f"  {path} ({kind}): {state}" for path, kind, state in self.rows()]
        return "\n".join(lines)


def inspect(model: Any) -> Report:
    """List the attention modules of a model and whether longspan can replace them.

    Args:
        model: a Hugging Face model, or a PEFT model around one; not changed.

    Raises:
        InputError: if there is no transformers model inside.
    """
    base = base_model(model)
    modules = tuple(_modules(base))
    return Report(
        model=type(base).__name__,
        attention=described(base.config._attn_implementation),
        modules=modules,
        reasons=tuple(_reasons(base, modules)),
        changes=tuple(change for change, _ in getattr(base, _CHANGES, ())),
    )


def note_changes(base: PreTrainedModel, changes: list[tuple[str, Any]]) -> None:
    """Note what was done to a model beside its attention, and how to undo it.

    Also on the models inside of it, which may be pickled alone, or asked to remove it.

    Args:
        base: the model.
        changes: words and a handle with ``remove()`` for each.
    """
    for part in sharing(base):
        setattr(part, _CHANGES, changes)


def undo_changes(base: PreTrainedModel) -> None:
    """Undo what was noted; nothing to do otherwise."""
    changes: list[tuple[str, Any]] = base.__dict__.get(_CHANGES, [])
    while changes:
        # The list is that of the models around this one too.
        changes.pop()[1].remove()
    for part in sharing(base):
        part.__dict__.pop(_CHANGES, None)


def routed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every attention that asks the attention interface for its function."""
    for path, module in model.named_modules():
        if not _why_not(type(module)):
            yield path, module


@cache
def _why_not(kind: type) -> str:
    """Why a class does not route; empty if it does."""
    try:
        source = python_inspect.getsource(kind.forward)  # pyright: ignore[reportAttributeAccessIssue]
    except (AttributeError, OSError, TypeError):
        return "its source cannot be read"
    if "ALL_ATTENTION_FUNCTIONS" in source:
        return ""
    return "its forward does not ask ALL_ATTENTION_FUNCTIONS for the attention function"


def _modules(base: nn.Module) -> Iterator[Module]:
    paths = [path for path, _ in routed(base)]
    refused: list[str] = []
    family = type(base).__name__.partition("For")[0]
    for path, module in base.named_modules():
        kind = type(module).__name__
        inside = any(path.startswith(f"{outer}.") for outer in (*paths, *refused))
        if path in paths:
            yield Module(path=path, kind=kind)
        elif (
            _MIXES_TOKENS.search(kind.removeprefix(family))
            and not inside
            and not _wraps(path, paths, module)
        ):
            refused.append(path)
            yield Module(path=path, kind=kind, reason=_why_not(type(module)))


def _wraps(path: str, paths: list[str], module: nn.Module) -> bool:
    """True for a shell around routed attention, and for a module without any parameter."""
    around = any(inner.startswith(f"{path}." if path else "") for inner in paths)
    return around or next(module.parameters(), None) is None


def _reasons(base: PreTrainedModel, modules: tuple[Module, ...]) -> Iterator[str]:
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        yield f"{name} is an encoder-decoder; patterns speak of one sequence"
        return
    config = base.config.get_text_config()
    if not any(not module.reason for module in modules):
        yield f"{name} has no attention that routes through the transformers attention interface"
    for kind in dict.fromkeys(module.kind for module in modules if module.reason):
        named = [module for module in modules if module.kind == kind]
        yield f"{kind} ({len(named)} modules, first {named[0].path}) does not route: " + (
            named[0].reason
        )
    stacks = [type(part).__name__ for part in _other_stacks(base)]
    if stacks:
        yield (
            f"{name} has more than one attention stack ({', '.join(stacks)}); "
            "apply the pattern to its language model alone"
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - set(_KNOWN_LAYERS)
    if unknown:
        yield f"{name} has layers of types that patterns cannot replace: {sorted(unknown)}"
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        yield f"{name} caps its logits (attn_logit_softcapping={cap}), which no kernel computes"
    if not getattr(type(base), "_can_set_attn_implementation", lambda: True)():
        yield f"transformers cannot switch the attention of {name}"


def _other_stacks(base: PreTrainedModel) -> Iterator[nn.Module]:
    from transformers import PreTrainedModel

    text = base.config.get_text_config()
    for part in base.modules():
        if isinstance(part, PreTrainedModel) and part.config not in (base.config, text):
            yield part
