"""The embedded model: small, complete, good inside its context and lost outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import longspan as ls
from longspan.train.data import passkey_text, python_sources, tokenize_documents, windows
from longspan.train.recipe import DemoRecipe, demo_model, demo_settings

FOLDER = Path(demo_model())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text(tokenizer):
    documents = [d for d in python_sources("heldout") if d.name in ("ipaddress", "typing")]
    return tokenize_documents(tokenizer, documents)


@torch.no_grad()
def _perplexity(model, sequences_nL):
    logits = model(input_ids=sequences_nL[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), sequences_nL[:, 1:].flatten()).exp().item()


def test_is_small_and_complete():
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    report = json.loads((FOLDER / "pretrain.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert f"{report['heldout_perplexity']:.2f} at 512 tokens" in card
    for key, value in (("steps", "5000"), ("recall_share", "0.08"), ("dropout", "0.1")):
        assert str(report["config"][key]) == value
        assert f"--{key.replace('_', '-')} {value}" in card


def test_good_inside_its_context_and_lost_outside(model, text):
    assert model.config.max_position_embeddings == 512
    inside = _perplexity(model, windows(text, 512, seed=None)[:8])
    outside = _perplexity(model, windows(text, 4096, seed=None)[:1])
    assert inside < 15
    assert outside > 4 * inside


@torch.no_grad()
def test_finds_passkeys_inside_its_context(model, tokenizer):
    found = 0
    for seed in range(8):
        key = str(10_000 + 8191 * seed)
        context, question, answer = passkey_text(1200, 0.4, key, seed)
        prompt = tokenizer(context + question)["input_ids"]
        expected = tokenizer(answer)["input_ids"]
        logits = model(input_ids=torch.tensor([prompt + expected])).logits[0]
        found += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == expected
    assert found >= 6


def test_recipe_is_a_valid_extension():
    recipe = DemoRecipe()
    pattern = ls.parse(recipe.pattern)
    assert pattern.is_causal
    pattern.check(8)
    settings = demo_settings(seed=3)
    assert settings.compare_dense
    assert settings.length == 4096
    assert settings.loop.seed == settings.suite.seed == 3
