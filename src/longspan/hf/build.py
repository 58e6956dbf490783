"""Small Llama models and byte-level BPE tokenizers from nothing, in the standard folder layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.errors import InputError
from longspan.hf.quiet import saving

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def build_llama(
    *,
    vocab_size: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    context: int,
    rope_theta: float = 10_000.0,
    tie: bool = True,
) -> LlamaForCausalLM:
    """A Llama with random float32 weights (torch's global generator), on the CPU, training mode.

    Token 0 is the end of text and token 1 the padding, as in ``train_tokenizer``.

    Raises:
        InputError: heads that do not divide the hidden width, or KV heads that do not divide the
            heads.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden % heads or (hidden // heads) % 2:
        raise InputError(
            f"hidden {hidden} over {heads} heads gives no even head width; "
            "choose hidden as a multiple of 2 x heads."
        )
    if heads % kv_heads:
        raise InputError(
            f"{kv_heads} KV heads do not divide {heads} heads; choose a divisor of {heads}."
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": float(rope_theta)},
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).train()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text round-trips, and each digit is a token of its own.

    Single digits let a model copy a number step by step instead of learning how it happens to be
    split.

    Raises:
        InputError: a vocabulary too small for the 256 bytes and the two special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + 2
    if vocab_size < smallest:
        raise InputError(
            f"vocabulary of {vocab_size} is too small: bytes and special tokens need {smallest}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path | str
) -> None:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with saving():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer that ``save_model`` wrote."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)
