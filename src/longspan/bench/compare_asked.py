"""What a comparison is asked for, and the model and text that it is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.bench.compare_entries import Entry, PatternLayer
from longspan.bench.setting import DTYPES
from longspan.errors import InputError, LongspanError
from longspan.eval.environment import environment
from longspan.eval.seed import check_seed
from longspan.hf.beside import layers_beside
from longspan.hf.models import load_model
from longspan.mechanism.layer import MechanismLayer
from longspan.train.data import python_sources, tokenize_documents
from longspan.train.recipe import demo_model

# Tokens of the two measurements of the state, in the middle of chunks, which are empty at their
# borders.
STATE = (248, 504)
# Tokens of a rehearsal: what refuses them refuses any.
_FEW = 8


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What is asked.

    Attributes:
        entries: what is compared.
        lengths: tokens at which work is counted, and time and memory are measured.
        tokens: length for sight; pairs are followed one by one.
        followed: rows whose sight is followed through a mechanism; of a pattern, all are.
        near: keys that count as near.
        text: tokens of held-out text for the error.
        device: of time and memory.
        dtype: of time and memory.
        rounds: rounds that count, fewer for what takes long; 0: neither time nor memory.
        threads: of the CPU; with more, layers as small as these mostly wait for each other.
        seed: of what mechanisms draw at random.
    """

    entries: tuple[Entry, ...]
    lengths: tuple[int, ...] = (256, 512)
    tokens: int = 256
    followed: int = 4
    near: int = 32
    text: int = 512
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 3
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.entries:
            raise InputError("expected at least one pattern or mechanism")
        sizes = {name: getattr(self, name) for name in ("tokens", "followed", "near", "text")}
        if not self.lengths or min(*self.lengths, *sizes.values()) < 2:
            given = ", ".join(f"{name}={value}" for name, value in sizes.items())
            raise InputError(
                "expected lengths and sizes of at least 2, got "
                f"lengths={','.join(map(str, self.lengths))}, {given}"
            )
        check_seed(self.seed)
        if self.rounds < 0:
            raise InputError(f"rounds must be at least 0, got {self.rounds}")
        if self.threads < 1:
            raise InputError(f"threads must be at least 1, got {self.threads}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        kind = self.device.split(":")[0]
        if kind not in ("cpu", "cuda"):
            raise InputError(f"device must be cpu or cuda, got {self.device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError("device is cuda, and torch sees none; leave --device out, or cpu")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that any figure needs."""
        return max(*self.lengths, self.text, self.tokens, *STATE)

    def settings(self) -> dict[str, Any]:
        """What a record depends on besides its entry; versions and machine."""
        sizes = {key: value for key, value in vars(self).items() if key != "entries"}
        return {**sizes, "model": "the embedded model", "environment": environment()}


class Bench:
    """The embedded model and held-out text.

    Args:
        asked: what is measured.
        device: of the model.
        dtype: of the model.
    """

    def __init__(self, asked: Compare, device: str = "cpu", dtype: str = "float32") -> None:
        self.asked, self.device, self.dtype = asked, device, getattr(torch, dtype)
        self.model, tokenizer = load_model(demo_model(), dtype=dtype, device=device)
        ids = _text(tokenizer, asked.longest)
        # Longer runs than there is text read it again: nothing but time depends on that.
        self.ids = ids.repeat(-(-asked.longest // len(ids)))[: asked.longest][None]

    def layers(self, one: Entry) -> list[MechanismLayer]:
        """An entry beside each attention module."""
        return _beside(self.model, self.asked, one)

    @torch.no_grad()
    def first(self, n: int) -> Tensor:
        """What the first attention module reads, without running the others [1, N, d_model]."""
        ids = self.ids[:, :n].to(self.device)
        return self.model.model.layers[0].input_layernorm(self.model.model.embed_tokens(ids))


@torch.no_grad()
def rehearse(asked: Compare, entries: Sequence[Entry]) -> None:
    """Build entries and give them a few tokens, so that a wrong option is found before any work.

    Raises:
        InputError: which entry cannot be built or called, and why.
    """
    model, _ = load_model(demo_model())
    x = torch.zeros(1, _FEW, model.config.hidden_size, device=model.device)
    for one in entries:
        try:
            for layer in _beside(model, asked, one):
                layer(x)
        except LongspanError as error:
            raise InputError(f"{one.text} cannot be compared: {error}") from error


def _beside(model: Any, asked: Compare, one: Entry) -> list[MechanismLayer]:
    """An entry beside each attention module of a model."""
    torch.manual_seed(asked.seed)
    found = layers_beside(model, one.kind, one.at(asked.longest))
    for number, layer in enumerate(found):
        if isinstance(layer, PatternLayer):
            layer.layer = number
    return found


def _text(tokenizer: Any, count: int) -> Tensor:
    """Held-out tokens [M], at least ``count`` if there are as many."""
    found: list[Tensor] = []
    for document in python_sources("heldout"):
        found += tokenize_documents(tokenizer, [document])
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)
