"""Generate from one prompt through a cache, piece by piece, and measure it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from longspan.errors import InputError
from longspan.hf.cache import CacheReport, KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of the generation settings that were saved with a model: where a text ends, and which tokens are
# none of any text; then, of texts that are drawn, what they are drawn from.
_ENDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
_DRAWN = (
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A continuation and what it took.

    Attributes:
        text: without the prompt.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated, an end of text included.
        prefill_seconds: until the first new token.
        decode_seconds: for the others.
        cache: what the cache holds at the end.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache: CacheReport

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: tokens after the first one by the seconds they took; 0 for one token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "tokens_per_second": self.tokens_per_second,
            "cache": self.cache.to_dict(),
        }


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a model without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("This model has no chat template; leave --chat out.")


def read_prompt(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> torch.Tensor:
    """Token ids [1, N] of a prompt.

    Args:
        tokenizer: of the model.
        text: the prompt.
        chat: put it into the model's chat template as the words of a user.

    Raises:
        InputError: for a prompt without tokens, one that is no Unicode text, or a model without a
            chat template.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Bytes that are no UTF-8 reach a command line as halves of characters.
        raise InputError(
            f"The prompt holds half of a character, or bytes that are no UTF-8 text: {error}."
        ) from None
    if chat:
        check_chat(tokenizer)
        said = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    read = tokenizer(text, return_tensors="pt", add_special_tokens=not chat, verbose=False)
    ids = read["input_ids"]
    assert isinstance(ids, torch.Tensor)
    if not ids.numel():
        raise InputError("The prompt is empty.")
    return ids


def one_text(model: PreTrainedModel, tokens: int, temperature: float = 0.0) -> dict[str, Any]:
    """Arguments of ``model.generate`` for one text, through the cache that it is given.

    They take back what generation settings saved with the model ask for beside: several texts,
    beams, other caches and outputs, searches that transformers does not hold; and, where the
    likeliest token is taken, penalties and biases that make another one the likeliest.

    Args:
        model: a causal language model.
        tokens: most new tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
    """
    drawn: dict[str, Any] = {"do_sample": bool(temperature)}
    if temperature:
        drawn["temperature"] = temperature
    kept = (*_ENDS, *_DRAWN) if temperature else _ENDS
    saved = vars(model.generation_config)
    back = [name for name in saved if name not in kept and saved[name] is not None]
    return {
        **{name: None for name in back if not name.startswith("_")},
        "max_new_tokens": tokens,
        "num_beams": 1,
        "num_return_sequences": 1,
        "use_cache": True,
        **drawn,
    }


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    cache: KVCache,
    *,
    tokens: int,
    temperature: float = 0.0,
    write: Callable[[str], None] = lambda _: None,
) -> Generated:
    """Continue a prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        ids: the prompt [1, N].
        cache: a fresh cache, or one that holds the beginning of the prompt.
        tokens: most new tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        write: called with each piece of text as soon as it is there.

    Raises:
        InputError: for fewer than one token or a temperature below 0.
    """
    from transformers import TextStreamer

    if tokens < 1 or not temperature >= 0:
        raise InputError(
            f"expected at least 1 token and a temperature from 0, got {tokens} and {temperature}."
        )
    pieces: list[str] = []
    arrived: list[float] = []

    class Stream(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            arrived.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            write(text)

    ids = ids.to(model.device)
    with torch.inference_mode():
        out = model.generate(  # pyright: ignore[reportCallIssue]
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            # Which stop strings need that were saved with a model.
            tokenizer=tokenizer,
            # The prompt arrives first.
            streamer=Stream(tokenizer, skip_prompt=True, skip_special_tokens=True),  # pyright: ignore[reportArgumentType]
            **one_text(model, tokens, temperature),
        )
    assert isinstance(out, torch.Tensor)
    return Generated(
        text="".join(pieces),
        prompt_tokens=ids.shape[1],
        new_tokens=out.shape[1] - ids.shape[1],
        prefill_seconds=arrived[1] - arrived[0],
        decode_seconds=arrived[-1] - arrived[1],
        cache=cache.report(),
    )
