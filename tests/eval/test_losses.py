"""Chunked losses and gradients equal those of whole logits, however a model ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from longspan.eval.losses import TokenLoss

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "gemma2 caps its logits": (
        "Gemma2Config",
        {"head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    ),
    "cohere scales its logits": ("CohereConfig", {"logit_scale": 0.0625}),
    "granite divides its logits": ("GraniteConfig", {"logits_scaling": 4.0}),
}


def build(name: str) -> Any:
    config, extra = MODELS[name]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**SMALL, **extra)
    )


def whole(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1].float()
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [7, 1024])
def test_chunks_equal_whole_logits(name: str, chunk: int) -> None:
    model = build(name)
    ids = torch.randint(0, 300, (2, 24))
    loss = TokenLoss(model, chunk=chunk)
    assert loss._split, "these models need no whole logits"
    ours, theirs = loss(ids), whole(model, ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(ours.mean(), parameters),
        torch.autograd.grad(theirs.mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_head_that_is_not_known_gets_whole_logits() -> None:
    model = build("llama")
    plain = model.forward

    def unusual(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    model.forward = unusual
    loss = TokenLoss(model, chunk=5)
    ids = torch.randint(0, 300, (2, 24))
    torch.testing.assert_close(loss(ids), whole(model, ids))


def test_no_tensor_of_all_logits_exists() -> None:
    model = build("llama")
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda m, i, out: sizes.append(out.shape[-2]))
    loss = TokenLoss(model, chunk=8)
    sizes.clear()
    loss(torch.randint(0, 300, (1, 60))).mean().backward()
    assert max(sizes) == 8


def test_predictions_are_greedy_generation() -> None:
    model = build("llama").eval()
    prompt = torch.randint(2, 300, (1, 12))
    written = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    best, losses = TokenLoss(model).predictions(written, last=5)
    assert best.tolist() == written[:, -5:].tolist()
    torch.testing.assert_close(losses, whole(model, written)[:, -5:])


def test_training_mode_is_left_as_it_was() -> None:
    model = build("llama").train()
    TokenLoss(model)
    assert model.training
