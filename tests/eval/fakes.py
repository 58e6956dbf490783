"""A tokenizer of characters, and a model that has the answers from elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import torch


class Letters:
    """A tokenizer of characters."""

    pad_token_id = 0

    def __call__(self, text, return_tensors=None, **_):
        ids = [ord(c) % 251 + 1 for c in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def encode(self, text, **_):
        return self(text)["input_ids"]

    def decode(self, ids, **_):
        return "".join(chr(int(i)) for i in ids)


class Knows:
    """A model that finds the answer in its prompt by other means."""

    def __init__(self, answer):
        self.answer = answer
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.caches = []
        self.asked = []
        self.generation_config = SimpleNamespace(eos_token_id=None)

    def parameters(self):
        return iter([self.weight])

    def generate(self, ids, max_new_tokens, past_key_values=None, **more):
        self.caches.append(past_key_values)
        self.asked.append(more)
        said = self.answer(tuple(ids[0].tolist()))[:max_new_tokens]
        return torch.cat([ids, torch.tensor([[ord(c) for c in said]])], 1)
