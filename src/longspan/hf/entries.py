"""What longspan has put into a model, oldest first; kept on the model, copied and pickled with it.

transformers finds an attention function by its name alone, and a new process knows no names of
longspan's: an entry registers its own wherever it is made, also when it is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longspan.errors import Refusal
from longspan.hf.dual_chunk import register_dual_chunk
from longspan.hf.mechanisms import Method, register_method
from longspan.hf.ranks import Parallel, register_parallel
from longspan.hf.register import PREFIX, register
from longspan.hf.unwrap import sharing
from longspan.mechanism import DualChunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# On the model, not in the configuration, which would be saved with it.
_PLACE = "_longspan_entries"
# The method of a model with which its continuous batching begins, in transformers that has it.
_BATCHING = "init_continuous_batching"


class Entry:
    """One pattern or mechanism, registered; equal to itself only, as the same may be put twice."""

    def __init__(self, what: Any, impl: str) -> None:
        self.what, self.impl = what, impl
        match what:
            case DualChunk():
                self.name = register_dual_chunk(what, impl)
            case Method():
                self.name = register_method(what, impl)
            case Parallel():
                self.name = register_parallel(what, impl)
            case _:
                self.name = register(what, impl)

    def __reduce__(self) -> tuple[type[Entry], tuple[Any, str]]:
        return Entry, (self.what, self.impl)


@dataclass
class Entries:
    """The entries of a model.

    Attributes:
        before: the attention implementation that the model had without longspan.
        entries: what was put in since; the last one is at work.
    """

    before: str
    entries: list[Entry] = field(default_factory=list)

    @staticmethod
    def of(base: PreTrainedModel) -> Entries:
        """Those of a model; empty where another implementation was chosen in the meantime."""
        now = str(base.config.get_text_config()._attn_implementation)
        if not now.startswith(PREFIX):
            return Entries(now)
        # A model that shares its configuration with the one that was changed has none.
        found = base.__dict__.get(_PLACE)
        return found or Entries("sdpa" if base._supports_sdpa else "eager")

    @property
    def name(self) -> str:
        """The attention implementation that belongs to the last entry, or to none."""
        return self.entries[-1].name if self.entries else self.before

    def keep(self, base: PreTrainedModel) -> None:
        """Note them on the model; nothing is left there without entries.

        Also on the models inside of it, which share its configuration and may be pickled alone.
        """
        for part in sharing(base):
            if self.entries:
                setattr(part, _PLACE, self)
                if hasattr(type(part), _BATCHING):
                    setattr(part, _BATCHING, _refuse_batching)
            else:
                part.__dict__.pop(_PLACE, None)
                part.__dict__.pop(_BATCHING, None)


def _refuse_batching(*_: Any, **__: Any) -> Any:
    """In place of a method that would switch to flash attention where that is installed."""
    raise Refusal(
        "Continuous batching (generate_batch, cache_implementation='paged') attends in its own "
        "way, without the pattern or mechanism of longspan. Pass padded batches to "
        "model.generate with an attention_mask, or take it out: longspan.hf.remove(model)."
    )
