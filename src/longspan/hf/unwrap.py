"""The transformers model inside whatever wraps it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from longspan.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_model(model: Any) -> PreTrainedModel:
    """The ``PreTrainedModel`` of a model, a PEFT model, or a DDP or compiled wrapper.

    Raises:
        InputError: if there is none inside.
    """
    from transformers import PreTrainedModel

    inner = model
    while not isinstance(inner, PreTrainedModel):
        if callable(getattr(inner, "get_base_model", None)):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "module"):
            inner = inner.module
        else:
            raise InputError(
                "Expected a transformers model (or a PEFT model around one), got "
                f"{type(model).__module__}.{type(model).__name__}."
            )
    return inner


def sharing(base: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A model, and the models inside of it that share its configuration, or its text's."""
    from transformers import PreTrainedModel

    shared = base.config, base.config.get_text_config()
    for module in base.modules():
        same = module is base or any(getattr(module, "config", None) is one for one in shared)
        if same and isinstance(module, PreTrainedModel):
            yield module
