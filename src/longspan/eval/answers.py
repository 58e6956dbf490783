"""How prompts are read and answered: a cache policy, sparse prefill, greedy generation.

Log-likelihoods of a whole text never read a cache, so nothing that happens to it would show: what
a policy loses is measured on answers that are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan import hf
from longspan.errors import InputError
from longspan.hf.generate import one_text
from longspan.kv import cache
from longspan.kv import parse as read_policy
from longspan.kv.policy import Policy
from longspan.select import parse as read_method
from longspan.select.method import Method

MakeCache = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is done to prompts and caches.

    Attributes:
        prefill: sparse attention for prompts; None: the model's own.
        dense_below: tokens below which a prompt attends exactly; None: measured here.
        kv: what the cache keeps; None: everything.
    """

    prefill: Method | None = None
    dense_below: int | None = None
    kv: Policy | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values on which answers depend."""
        return {
            "prefill": self.prefill and str(self.prefill),
            "dense_below": self.dense_below,
            "kv": self.kv and str(self.kv),
        }

    @contextmanager
    def open(self, model: Any) -> Iterator[MakeCache | None]:
        """Put the prefill into a model for a block; gives what makes a cache for each prompt."""
        sparse = (
            nullcontext()
            if self.prefill is None
            else hf.prefill(model, self.prefill, dense_below=self.dense_below)
        )
        policy = self.kv
        with sparse:
            yield None if policy is None else lambda: cache(model, policy)


def reading(
    prefill: str | None, dense_below: int | None, kv: str | None, pattern: str | None = None
) -> Reading:
    """A reading from its text forms.

    Args:
        prefill: sparse prefill, such as ``"vertical_slash(1000, 6096)"``.
        dense_below: tokens below which a prompt attends exactly.
        kv: cache policy, such as ``"sinks(4) + recent(256)"``.
        pattern: attention pattern that the model gets too, to see that both go together.

    Raises:
        InputError: for prefill beside a pattern, or a length without prefill or below 0.
        PolicyError: if a text does not parse.
    """
    method = None if prefill is None else read_method(prefill)
    if method is not None and pattern is not None:
        raise InputError("Give a pattern or sparse prefill, not both: each is the attention.")
    if method is None and dense_below is not None:
        raise InputError("--dense-below goes with --prefill.")
    if dense_below is not None and dense_below < 0:
        raise InputError(f"--dense-below is a number of tokens from 0, got {dense_below}.")
    policy = None if kv is None else read_policy(kv)
    return Reading(prefill=method, dense_below=dense_below, kv=policy)


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    tokens: int,
    make_cache: MakeCache | None = None,
    *,
    stop: Sequence[int] = (),
) -> str:
    """What a model says to a prompt, generated greedily.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        ids: prompt, int64 token ids [1, N].
        tokens: most new tokens.
        make_cache: gives a fresh cache; None: the model's own.
        stop: token ids that end the answer beside the model's own ends of text; at least one
            token is generated then.
    """
    ids = ids.to(next(model.parameters()).device)
    more: dict[str, Any] = {} if make_cache is None else {"past_key_values": make_cache()}
    if stop:
        own = model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [] if own is None else [own]
        more |= {"eos_token_id": [*own, *stop], "min_new_tokens": 1}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=padding,
        # Which stop strings need that were saved with a model.
        tokenizer=tokenizer,
        **{**one_text(model, tokens), **more},
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
