"""The model ``longspan`` of lm-evaluation-harness: its tasks under our patterns and caches.

The harness (EleutherAI, package ``lm-eval``) finds models of its own package only, so this module
is its command line with one model more::

    python -m longspan.eval.harness run --model longspan --tasks TASK \\
        --model_args '{"pretrained": "MODEL", "pattern": "window(4096) | sink(4)"}'

Arguments with commas in them, as many patterns have, need this JSON form; others may be written
``pretrained=MODEL,kv=recent(256)``. From Python: ``register()``, then ``model="longspan"`` in
``lm_eval.simple_evaluate``, or ``register()(pretrained=...)`` for the model itself.

A log-likelihood is one forward pass that reads no cache, so a cache policy would change nothing in
it: with ``kv`` such tasks are refused (``longspan eval ppl --kv`` measures perplexity through a
cache). Sparse prefill works in both kinds of tasks; most methods look at later tokens of a prompt,
which a log-likelihood of the prompt itself then knows of.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from longspan import hf, pattern
from longspan.errors import InputError, LongspanError
from longspan.eval.answers import reading
from longspan.eval.subject import CARD, trained_positions
from longspan.hf.rope import set_rope
from longspan.position import read_factors

NAME = "longspan"


@cache
def register() -> type:
    """Tell the harness of the model ``longspan``; gives its class, always the same.

    The class is the harness's ``HFLM`` with these arguments more:

        pattern: text of an attention pattern; None: the model's own attention.
        rope: kind of position scaling (``longspan.hf.set_rope``); None: none, or that of an
            adapter of ``longspan extend`` given as ``peft``.
        length: tokens to which positions are scaled; with ``rope``.
        rope_factors: for longrope, a JSON file or model folder with the factors.
        prefill: sparse prefill; dense_below: tokens below which prompts attend exactly.
        kv: what the cache keeps while text is generated.

    A model that is given as an object is changed; ``close()`` takes pattern and prefill out again
    (after a cache policy it attends exactly, by longspan's kernels).

    Raises:
        InputError: lm-eval is not installed.
    """
    try:
        base = import_module("lm_eval.models.huggingface").HFLM
        register_model = import_module("lm_eval.api.registry").register_model
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness is not installed ({error}): pip install 'longspan[eval]'."
        ) from error

    class LongspanLM(base):
        """A Hugging Face model with what longspan puts into it."""

        def __init__(
            self,
            pretrained: Any,
            *,
            pattern: str | None = None,
            rope: str | None = None,
            length: int | None = None,
            rope_factors: str | None = None,
            prefill: str | None = None,
            dense_below: int | None = None,
            kv: str | None = None,
            **others: Any,
        ) -> None:
            wanted = _parsed(pattern)
            self._reading = reading(prefill, dense_below, kv, pattern)
            positions = _positions(rope, length, rope_factors, others.get("peft"))
            if positions is not None:
                others.setdefault("max_length", positions[1])
            super().__init__(pretrained, **others)
            if positions is not None:
                kind, to, factors = positions
                set_rope(self.model, kind, to, factors=factors)
            self._held = ExitStack()
            if wanted is not None:
                self._held.enter_context(hf.apply(self.model, wanted))
            self._make_cache = self._held.enter_context(self._reading.open(self.model))

        def close(self) -> None:
            """Give the model its own attention back; its positions stay scaled."""
            self._held.close()

        def _model_generate(self, *args: Any, **options: Any) -> Any:
            if self._make_cache is not None:
                options["past_key_values"] = self._make_cache()
            return super()._model_generate(*args, **options)

        def _loglikelihood_tokens(self, *args: Any, **options: Any) -> Any:
            if self._reading.kv is not None:
                raise InputError(
                    f"kv={self._reading.kv} changes nothing in a log-likelihood, which reads no "
                    "cache: leave kv out, choose tasks that generate, or measure perplexity with "
                    "longspan eval ppl --kv."
                )
            return super()._loglikelihood_tokens(*args, **options)

    register_model(NAME)(LongspanLM)
    return LongspanLM


def _parsed(text: str | None) -> pattern.Pattern | None:
    return None if text is None else pattern.parse(text)


def _positions(
    rope: str | None, length: int | None, factors: str | None, adapter: str | None
) -> tuple[str, int, Any] | None:
    """Kind, length and factors of the position scaling; None for none."""
    if (rope is None) != (length is None) or (rope is None and factors is not None):
        raise InputError(
            f"rope, its length and rope_factors go together; got rope={rope}, length={length} "
            f"and rope_factors={factors}."
        )
    if rope is not None and length is not None:
        return rope, length, None if factors is None else read_factors(factors)
    if adapter is not None and (Path(adapter) / CARD).exists():
        return trained_positions(Path(adapter))
    return None


def main() -> None:
    """The command line of the harness, with the model ``longspan`` beside its own."""
    try:
        register()
        import_module("lm_eval.__main__").cli_evaluate()
    except LongspanError as error:
        print(f"longspan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
