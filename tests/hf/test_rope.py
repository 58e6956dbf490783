"""RoPE scaling in models: what plain transformers reads back is what was meant."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import longspan as ls
from longspan import position
from longspan.errors import InputError, PatternError, Refusal
from longspan.hf.rope import KINDS, rope_parameters, set_rope, trained_length

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TRAINED, TARGET, WIDTH, BASE = 64, 256, 8, 10_000.0
EXPECTED = {
    "none": position.default(WIDTH, BASE),
    "linear": position.linear(WIDTH, BASE, 4),
    "ntk": position.ntk(WIDTH, BASE, 4),
    "dynamic": position.dynamic(WIDTH, BASE, 4, TRAINED, TARGET),
    "yarn": position.yarn(WIDTH, BASE, 4, TRAINED),
    "llama3": position.llama3(WIDTH, BASE, 4, TRAINED),
}


def rotary(model):
    return (
        model.get_base_model().model.rotary_emb
        if hasattr(model, "peft_config")
        else (model.model.rotary_emb)
    )


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_reloads_the_same_frequencies(tiny, tmp_path, kind):
    model, ids = tiny.build("llama"), tiny.tokens(1, TARGET)
    set_rope(model, kind, TARGET)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    # A full-length pass first: dynamic scaling takes its frequencies from it.
    assert torch.equal(logits(model, ids), logits(again, ids))
    for one in (model, again):
        got = rotary(one)
        np.testing.assert_allclose(got.inv_freq.numpy(), EXPECTED[kind].inv_freq, rtol=2e-6)
        assert got.attention_scaling == pytest.approx(EXPECTED[kind].attention_factor, rel=1e-6)
        kept = TRAINED if kind == "dynamic" else TARGET
        assert one.config.max_position_embeddings == kept


@pytest.mark.parametrize("kind", KINDS[1:])
def test_scaling_changes_what_the_model_computes(tiny, kind):
    model, ids = tiny.build("llama"), tiny.tokens(1, TARGET)
    expected = logits(model, ids)
    set_rope(model, kind, TARGET)
    assert (logits(model, ids) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_length_itself_changes_nothing(tiny, kind):
    model, ids = tiny.build("llama"), tiny.tokens(1, TRAINED)
    expected = logits(model, ids)
    set_rope(model, kind, TRAINED)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)


def test_parameters_are_made_without_touching_the_configuration(tiny):
    config = tiny.build("llama").config
    before = copy.deepcopy(config.to_dict())
    made = rope_parameters(config, "yarn", TARGET)
    assert made == {
        "rope_type": "yarn",
        "rope_theta": BASE,
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    }
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_stretching_twice_equals_stretching_once(tiny, kind):
    once, twice = tiny.build("llama"), tiny.build("llama")
    set_rope(once, kind, 512)
    set_rope(twice, kind, 128)
    set_rope(twice, kind, 512)
    expected = rotary(once)
    np.testing.assert_allclose(rotary(twice).inv_freq, expected.inv_freq, rtol=1e-6)
    assert rotary(twice).attention_scaling == pytest.approx(expected.attention_scaling)


@pytest.mark.parametrize(
    "kind",
    [
        "linear",
        # Early releases look for the trained length beside the layer types and fail; set_rope
        # then refuses.
        pytest.param(
            "yarn", marks=pytest.mark.skipif(RELEASE < (5, 17), reason="cannot nest yarn")
        ),
    ],
)
def test_layers_with_their_own_window_keep_their_positions(tiny, tmp_path, kind):
    model, ids = tiny.build("gemma3"), tiny.tokens(1, 40)
    before = copy.deepcopy(model.config.rope_parameters)
    set_rope(model, kind, TARGET)
    after = model.config.rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    full = after["full_attention"]
    assert (full["rope_type"], full["factor"]) == (kind, 4.0)
    theta = before["full_attention"]["rope_theta"]
    wanted = {
        "linear": position.linear(WIDTH, theta, 4),
        "yarn": position.yarn(WIDTH, theta, 4, TRAINED),
    }[kind]
    got = rotary(model)
    np.testing.assert_allclose(got.full_attention_inv_freq, wanted.inv_freq, rtol=2e-6)
    assert got.full_attention_attention_scaling == pytest.approx(wanted.attention_factor)
    assert got.sliding_attention_attention_scaling == 1
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids)
    )


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_other_families_reload_the_same(tiny, tmp_path, family):
    model, ids = tiny.build(family), tiny.tokens(1, 100)
    set_rope(model, "yarn", TARGET)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids)
    )


def test_part_of_the_head_is_rotated(tiny):
    """A partial rotary factor narrows the width that the scaling speaks of."""
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=TRAINED,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": BASE,
            "partial_rotary_factor": 0.25,
        },
    )
    model = StableLmForCausalLM(config)
    set_rope(model, "ntk", TARGET)
    np.testing.assert_allclose(
        rotary(model).inv_freq, position.ntk(8, BASE, 4).inv_freq, rtol=2e-6
    )


def test_refusals_leave_the_model_alone(tiny):
    model = tiny.build("llama")
    set_rope(model, "yarn", 128)
    before = copy.deepcopy(model.config.to_dict())
    for kind, length, words in [
        ("yarn", 100, "below the 128"),
        ("linear", 256, "already scaled by 'yarn'"),
        ("yran", 256, "choose one of none, linear"),
        ("yarn", 256.5, "whole number of tokens, got 256.5"),
        ("yarn", "256", "whole number of tokens, got '256'"),
    ]:
        with pytest.raises(InputError, match=words):
            set_rope(model, kind, length)
        assert model.config.to_dict() == before


def test_a_model_without_rotary_positions_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=97))
    with pytest.raises(Refusal, match="GPT2Config has no rotary positions") as caught:
        trained_length(model.config)
    assert caught.value.exit_code == 3


def test_other_reading_of_the_parameters_is_noticed(tiny, monkeypatch):
    """The installed transformers is not trusted to read parameters as they are meant."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = tiny.build("llama")
    real = ROPE_INIT_FUNCTIONS["yarn"]

    def other(config, *args, **kwargs):
        inv_freq, factor = real(config, *args, **kwargs)
        return inv_freq * 1.01, factor

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "yarn", other)
    with pytest.raises(Refusal, match="other frequencies"):
        set_rope(model, "yarn", TARGET)
    assert model.config.max_position_embeddings == TRAINED


def test_extend_stretches_and_applies(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, 200)
    assert ls.hf.extend(model, TARGET, "window(16) | sink(2)") is model
    assert model.config.rope_parameters["rope_type"] == "yarn"
    plain = tiny.build("llama")
    set_rope(plain, "yarn", TARGET)
    expected = logits(tiny.oracle(plain, ls.Window(16) | ls.Sink(2)), ids)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("length", "pattern", "error"),
    [(16, "causal()", InputError), (TARGET, "causl()", PatternError)],
)
def test_extend_changes_all_or_nothing(tiny, length, pattern, error):
    model = tiny.build("llama")
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(error):
        ls.hf.extend(model, length, pattern)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
