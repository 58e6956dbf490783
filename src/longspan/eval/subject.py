"""What is measured: a model, optionally with a pattern, a position scaling or an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan import hf, pattern
from longspan.errors import DataError, InputError
from longspan.eval.losses import TokenLoss
from longspan.hf.models import check_device, check_model, contents_hash
from longspan.hf.rope import KINDS
from longspan.position import LongFactors

# What longspan extend writes beside an adapter.
CARD = "longspan.json"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and what is put into it.

    Attributes:
        model: local folder.
        length: longest context that will be measured; positions are scaled to it.
        pattern: text of an attention pattern; None: the model's own attention.
        rope: position scaling; None: the adapter's, or none.
        rope_factors: for longrope, its two lists; None: those that the model has already.
        adapter: folder written by ``longspan extend``.
        dtype: of the weights.
        device: ``cpu``, ``cuda``, ...
    """

    model: str
    length: int
    pattern: str | None = None
    rope: str | None = None
    rope_factors: LongFactors | None = None
    adapter: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.rope_factors is not None and self.rope != "longrope":
            raise InputError("--rope-factors go with --rope longrope.")

    def settings(self) -> dict[str, Any]:
        """Plain values on which results depend: the length only if positions are scaled."""
        settings = {**asdict(self), "adapter": self.adapter and str(self.adapter)}
        # A folder that was trained again gives other results under the same name.
        settings["contents"] = contents_hash(self.model)
        if self.adapter is not None:
            settings["adapter_contents"] = contents_hash(self.adapter)
        if self.rope is None:
            del settings["length"]
        if self.rope_factors is None:
            del settings["rope_factors"]
        return settings

    def check(self) -> None:
        """Raise what ``open`` would, as far as it can be told without reading weights."""
        from longspan.hf.lora import check_adapter
        from longspan.hf.rope import rope_parameters
        from longspan.hf.switch import check_heads

        parsed = None if self.pattern is None else pattern.parse(self.pattern)
        rope, length, factors = self._positions()
        _, config = check_model(self.model, self.dtype)
        if rope is not None:
            rope_parameters(config, rope, length, factors=factors)
        if parsed is not None:
            check_heads(parsed, config)
        if self.adapter is not None:
            check_adapter(self.adapter)

    def _positions(self) -> tuple[str | None, int, LongFactors | None]:
        """Kind of scaling, length and factors: the adapter's, unless others are given."""
        if self.adapter is not None and self.rope is None:
            return trained_positions(self.adapter)
        return self.rope, self.length, self.rope_factors

    @contextmanager
    def open(self) -> Iterator[tuple[TokenLoss, Any]]:
        """Load everything: (token losses of the model, tokenizer).

        Raises:
            LongspanError: a child that names what is wrong with the pattern, the model or the
                adapter.
        """
        from longspan.hf import lora
        from longspan.hf.rope import set_rope

        parsed = None if self.pattern is None else pattern.parse(self.pattern)
        rope, length, factors = self._positions()
        model, tokenizer = hf.load_model(self.model, dtype=self.dtype, device=self.device)
        if rope is not None:
            set_rope(model, rope, length, factors=factors)
        with nullcontext() if parsed is None else hf.apply(model, parsed):
            adapted = model if self.adapter is None else lora.load_adapter(model, self.adapter)
            adapted.eval()
            yield TokenLoss(adapted), tokenizer


def trained_positions(adapter: Path) -> tuple[str, int, LongFactors | None]:
    """Position scaling under which an adapter of ``longspan extend`` was trained.

    Args:
        adapter: its folder.

    Returns:
        Kind, length in tokens, and the factors of longrope.

    Raises:
        DataError: the folder is missing, or was not written by ``longspan extend``, or its card
            is damaged.
    """
    path = adapter / CARD
    if not adapter.is_dir():
        raise DataError(f"The adapter folder {adapter} does not exist.")
    if not path.exists():
        raise DataError(
            f"{path} is missing: this adapter was not written by longspan extend, so its position "
            "scaling is unknown. Say it with --rope."
        )
    try:
        how = json.loads(path.read_text(encoding="utf-8"))
        # Adapters from before there was longrope say nothing of factors.
        held = how.get("rope_factors")
        factors = held and LongFactors(short=tuple(held["short"]), long=tuple(held["long"]))
        if how["rope"] not in KINDS or type(how["length"]) is not int or how["length"] < 1:
            raise ValueError(f"rope {how['rope']!r} to a length of {how['length']!r}")
        return how["rope"], how["length"], factors
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} does not say the position scaling of an adapter ({type(error).__name__}: "
            f"{error}): copy the adapter again, or say it with --rope."
        ) from error
