"""RoPE scaling in models: what plain transformers reads back is what was meant."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from tests.hf.conftest import COMMON
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import longspan as ls
from longspan import position
from longspan.errors import DataError, InputError, LongspanError, PatternError, Refusal
from longspan.hf.rope import KINDS, check_rope, rope_parameters, set_rope, trained_length

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TRAINED, TARGET, WIDTH, BASE = 64, 256, 8, 10_000.0
FACTORS = position.LongFactors(short=(1.0, 1.0, 1.25, 1.5), long=(1.0, 1.5, 3.0, 4.0))
EXPECTED = {
    "none": position.default(WIDTH, BASE),
    "linear": position.linear(WIDTH, BASE, 4),
    "ntk": position.ntk(WIDTH, BASE, 4),
    "dynamic": position.dynamic(WIDTH, BASE, 4, TRAINED, TARGET),
    "yarn": position.yarn(WIDTH, BASE, 4, TRAINED),
    "llama3": position.llama3(WIDTH, BASE, 4, TRAINED),
    "longrope": position.longrope(WIDTH, BASE, FACTORS.long, 4, TRAINED),
}


def stretch(model, kind, length, factors=FACTORS):
    set_rope(model, kind, length, factors=factors if kind == "longrope" else None)


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
    stretch(model, kind, TARGET)
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
    stretch(model, kind, TARGET)
    assert (logits(model, ids) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_length_itself_changes_nothing(tiny, kind):
    model, ids = tiny.build("llama"), tiny.tokens(1, TRAINED)
    expected = logits(model, ids)
    # The short list of factors is for these lengths.
    stretch(model, kind, TRAINED, position.LongFactors(short=(1.0,) * 4, long=FACTORS.long))
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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("none", "ntk")])
def test_what_a_family_could_not_save_is_refused(tiny, tmp_path, kind):
    """Phi-3 knows longrope alone; what it takes can be saved."""
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TRAINED,
            original_max_position_embeddings=TRAINED,
            pad_token_id=0,
        )
    )
    before, frequencies = copy.deepcopy(model.config.to_dict()), rotary(model).inv_freq.clone()
    if kind == "longrope":
        stretch(model, kind, TARGET)
    else:
        for change in (set_rope, check_rope):
            with pytest.raises(Refusal, match=f"Phi3Config does not accept RoPE scaling '{kind}'"):
                change(model, kind, TARGET)
        assert model.config.to_dict() == before
        assert torch.equal(rotary(model).inv_freq, frequencies)
    model.save_pretrained(tmp_path)


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


def grown(model, tmp_path):
    """A Llama as plain transformers makes it from the saved configuration, the same weights."""
    model.save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("length", [1, TRAINED - 1, TRAINED, TRAINED + 1, 200, TARGET])
def test_longrope_equals_that_of_transformers_at_every_length(tiny, length):
    """Built by transformers from its own parameters, never touched by longspan."""
    ids = tiny.tokens(2, length)
    plain = tiny.build(
        "llama",
        max_position_embeddings=TARGET,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": BASE,
            "factor": 4.0,
            "original_max_position_embeddings": TRAINED,
            "short_factor": list(FACTORS.short),
            "long_factor": list(FACTORS.long),
        },
    )
    model = tiny.build("llama")
    set_rope(model, "longrope", TARGET, factors=FACTORS)
    # What was looked at before must not matter.
    for seen in (TARGET, 3, length):
        logits(model, tiny.tokens(1, seen))
    assert torch.equal(logits(model, ids), logits(plain, ids))
    assert model.config.rope_parameters == plain.config.rope_parameters
    factors = FACTORS.long if length > TRAINED else FACTORS.short
    wanted = position.longrope(WIDTH, BASE, factors, 4, TRAINED)
    np.testing.assert_allclose(rotary(model).inv_freq, wanted.inv_freq, rtol=2e-6)
    assert rotary(model).attention_scaling == pytest.approx(wanted.attention_factor, rel=1e-6)


def test_longrope_goes_on_with_other_factors(tiny, tmp_path):
    """Nothing of the first factors is left, also where a long text has been read with them."""
    model, ids = tiny.build("llama"), tiny.tokens(1, 400)
    set_rope(model, "longrope", 128, factors=FACTORS)
    logits(model, ids[:, :100])
    more = position.LongFactors(short=(1.0,) * 4, long=(1.0, 2.0, 5.0, 9.0))
    set_rope(model, "longrope", 512, factors=more)
    entry = model.config.rope_parameters
    assert (entry["factor"], entry["original_max_position_embeddings"]) == (8.0, TRAINED)
    again = grown(model, tmp_path)
    for length in (400, 50):
        assert torch.equal(logits(model, ids[:, :length]), logits(again, ids[:, :length]))
    set_rope(again, "longrope", 1024)
    assert again.config.rope_parameters["long_factor"] == list(more.long)
    assert again.config.rope_parameters["factor"] == 16.0


@pytest.mark.parametrize("stated", [TRAINED, 2 * TRAINED])
@pytest.mark.parametrize("kind", ["yarn", "llama3", "longrope"])
def test_a_scaled_model_is_stretched_from_where_it_reaches(tiny, kind, stated):
    """Qwen2's YaRN gives the original length as max_position_embeddings, others the reach."""
    first = rope_parameters(
        tiny.build("llama").config,
        kind,
        2 * TRAINED,
        factors=(FACTORS if kind == "longrope" else None),
    )
    model = tiny.build("llama", max_position_embeddings=stated, rope_parameters=first)
    assert rope_parameters(model.config, kind, 2 * TRAINED) == first
    set_rope(model, kind, TARGET)
    set_rope(model, kind, TARGET)
    assert model.config.rope_parameters["factor"] == TARGET / TRAINED
    wanted = EXPECTED[kind]
    if kind == "longrope":
        # Up to the original length.
        wanted = position.longrope(WIDTH, BASE, FACTORS.short, 4, TRAINED)
    np.testing.assert_allclose(rotary(model).inv_freq, wanted.inv_freq, rtol=2e-6)
    assert rotary(model).attention_scaling == pytest.approx(wanted.attention_factor)


def test_llama3_factors_that_do_not_say_the_length_are_multiplied(tiny):
    """Llama 3.1 reaches 16 times its original length with a factor of 8."""
    given = {
        "rope_type": "llama3",
        "rope_theta": BASE,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = tiny.build("llama", max_position_embeddings=256, rope_parameters=given)
    assert rope_parameters(model.config, "llama3", 512)["factor"] == 16.0


@pytest.mark.parametrize(("written", "left"), [(2, None), (1.0, 1.0), (1.2, 1.2)])
@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_a_written_temperature_of_the_old_factor_does_not_stay(tiny, kind, written, left):
    """One that somebody chose stays."""
    factors = FACTORS if kind == "longrope" else None
    given = rope_parameters(tiny.build("llama").config, kind, 2 * TRAINED, factors=factors)
    if written == 2:
        own = {
            "yarn": position.yarn(WIDTH, BASE, 2, TRAINED),
            "longrope": position.longrope(WIDTH, BASE, FACTORS.long, 2, TRAINED),
        }
        written = own[kind].attention_factor
    given["attention_factor"] = written
    model = tiny.build("llama", max_position_embeddings=TRAINED, rope_parameters=given)
    same = rope_parameters(model.config, kind, 2 * TRAINED)
    assert same["attention_factor"] == written
    set_rope(model, kind, TARGET)
    assert model.config.rope_parameters.get("attention_factor") == left
    wanted = EXPECTED[kind].attention_factor if left is None else left
    assert rotary(model).attention_scaling == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["ntk", "dynamic"])
def test_a_rotary_width_that_ntk_cannot_scale_is_refused(kind):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TRAINED,
        )
    )
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(InputError, match="rotary width of at least 4, got dim=2"):
        set_rope(model, kind, TARGET)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_without_a_factor_the_lengths_say_how_far_a_model_is_stretched(tiny, kind):
    """Phi-3 says the lengths alone; transformers takes their ratio."""
    given = {"rope_type": kind, "rope_theta": BASE, "original_max_position_embeddings": TRAINED}
    if kind == "longrope":
        given |= {"short_factor": list(FACTORS.short), "long_factor": list(FACTORS.long)}
    else:
        given["factor"] = None
    model = tiny.build("llama", max_position_embeddings=128, rope_parameters=given)
    set_rope(model, kind, TARGET)
    assert model.config.rope_parameters["factor"] == 4.0
    wanted = EXPECTED[kind].attention_factor
    assert rotary(model).attention_scaling == pytest.approx(wanted)


@pytest.mark.skipif(RELEASE < (5, 17), reason="cannot nest longrope")
def test_longrope_leaves_layers_with_a_window_alone(tiny, tmp_path):
    model, ids = tiny.build("gemma3"), tiny.tokens(1, 100)
    before = copy.deepcopy(model.config.rope_parameters)
    logits(model, ids)
    set_rope(model, "longrope", TARGET, factors=FACTORS)
    after = model.config.rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"]["long_factor"] == list(FACTORS.long)
    again = grown(model, tmp_path)
    for length in (100, 20):
        assert torch.equal(logits(model, ids[:, :length]), logits(again, ids[:, :length]))


def test_factors_are_read_from_files_and_models(tiny, tmp_path):
    lists = {"short_factor": list(FACTORS.short), "long_factor": list(FACTORS.long)}
    (tmp_path / "factors.json").write_text(json.dumps(lists))
    old = {"model_type": "phi3", "rope_scaling": {"type": "longrope", **lists}}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    model = tiny.build("llama")
    set_rope(model, "longrope", TARGET, factors=FACTORS)
    model.config.save_pretrained(tmp_path / "new")
    for place in ("factors.json", "old", "old/config.json", "new"):
        assert position.read_factors(tmp_path / place) == FACTORS


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (None, "cannot be read: No such file"),
        ("[1, 2", "is no JSON"),
        ('{"short_factor": [1]}', "holds no lists short_factor and long_factor"),
        ("[1, 2]", "holds no lists"),
        ('{"short_factor": [1], "long_factor": []}', "long_factor of LongRoPE is empty"),
        ('{"short_factor": [0], "long_factor": [1]}', "positive numbers.*got 0 in it"),
        ('{"short_factor": [1], "long_factor": ["2"]}', "positive numbers.*got '2' in it"),
        ('{"short_factor": [NaN], "long_factor": [1]}', "got nan in it"),
        ('{"short_factor": [true], "long_factor": [1]}', "got True in it"),
        ('{"short_factor": [1e39], "long_factor": [1]}', r"float32 holds.*got 1e\+39 in it"),
        ('{"short_factor": [1], "long_factor": [1e-39]}', "float32 holds.*got 1e-39 in it"),
        ('{"short_factor": [1%s], "long_factor": [1]}' % ("0" * 400), "float32 holds.*got 10000"),
    ],
)
def test_files_without_factors_are_refused(tmp_path, written, words):
    path = tmp_path / "factors.json"
    if written is not None:
        path.write_text(written)
    with pytest.raises((DataError, InputError), match=words):
        position.read_factors(path)


def test_factors_that_do_not_fit_leave_the_model_alone(tiny):
    model = tiny.build("llama")
    before = copy.deepcopy(model.config.to_dict())
    short = position.LongFactors(short=FACTORS.short[:3], long=FACTORS.long)
    for kind, factors, words in [
        ("longrope", None, "needs the factors that somebody searched"),
        ("longrope", short, "short_factor of LongRoPE has 3 numbers; a rotary width of 8 needs 4"),
        ("yarn", FACTORS, "Factors belong to longrope; RoPE scaling 'yarn' takes none"),
        (
            "longrope",
            position.LongFactors(short=FACTORS.short, long=(1.0, 1.5, 3.0, 3e38)),
            r"long_factor of LongRoPE holds 3e\+38, which with rope_theta .* makes a frequency of",
        ),
        (
            "longrope",
            position.LongFactors(short=(1.0, 1.0, 1e38, 1.0), long=FACTORS.long),
            r"short_factor of LongRoPE holds 1e\+38",
        ),
    ]:
        with pytest.raises(InputError, match=words):
            set_rope(model, kind, TARGET, factors=factors)
        with pytest.raises(InputError, match=words):
            ls.hf.extend(model, TARGET, "causal()", kind, factors=factors)
        assert model.config.to_dict() == before
    set_rope(model, "yarn", TARGET)
    with pytest.raises(InputError, match="already scaled by 'yarn'"):
        set_rope(model, "longrope", 512, factors=FACTORS)


def test_other_long_frequencies_than_meant_are_noticed(tiny, monkeypatch):
    """Also those that a short text does not show."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    real = ROPE_INIT_FUNCTIONS["longrope"]

    def other(config, device=None, seq_len=None, **kwargs):
        inv_freq, factor = real(config, device, seq_len, **kwargs)
        return (inv_freq * 1.01 if seq_len else inv_freq), factor

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "longrope", other)
    model = tiny.build("llama")
    with pytest.raises(Refusal, match="other frequencies"):
        set_rope(model, "longrope", TARGET, factors=FACTORS)
    assert model.config.max_position_embeddings == TRAINED


@pytest.mark.skipif(not hasattr(transformers, "GraniteSWAConfig"), reason="is not there yet")
def test_layers_with_bases_of_their_own_are_refused(tiny):
    """Granite SWA builds a rotary module for each base, from a copy of the configuration."""
    bases = {"layer_rope_theta": [1e4, 5e4], "layer_types": ["full_attention"] * 2}
    torch.manual_seed(0)
    model = transformers.GraniteSWAForCausalLM(
        transformers.GraniteSWAConfig(**COMMON, **bases)
    ).eval()
    before, ids = model.config.to_dict(), tiny.tokens(1, 20)
    plain = model(ids).logits
    for kind in ("ntk", "dynamic", "yarn"):
        with pytest.raises(Refusal, match=r"rotary_embs\.0 .* has a configuration of its own"):
            set_rope(model, kind, TARGET)
    assert model.config.to_dict() == before
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="is not there yet")
@pytest.mark.parametrize("kind", ["default", "proportional"])
def test_layers_with_heads_of_several_widths(kind):
    """Gemma 4: its configuration does not say one width."""
    scaling = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": kind, "rope_theta": 1e6},
    }
    small = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 97}
    model = transformers.Gemma4ForCausalLM(
        transformers.Gemma4TextConfig(
            **COMMON,
            **small,
            global_head_dim=16,
            rope_parameters=scaling,
            layer_types=["sliding_attention", "full_attention"],
        )
    )
    with pytest.raises(LongspanError, match=r"several head widths|already scaled"):
        ls.hf.extend(model, TARGET, "causal()")
    assert model.config.max_position_embeddings == TRAINED
    assert not model.config._attn_implementation.startswith("longspan")
    ls.hf.extend(model, TARGET, "causal()", "none")
    assert model.config.max_position_embeddings == TARGET
