"""Mechanisms in models: near dense where they promise it, and the same however they are called."""

from __future__ import annotations

import copy
import importlib
import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.hf.conftest import COMMON  # noqa: E402

import longspan as ls  # noqa: E402
from longspan.errors import DataError, InputError, PatternError, Refusal  # noqa: E402
from longspan.hf.routes import routed  # noqa: E402
from longspan.mechanism.layer import MechanismLayer  # noqa: E402

N = 29

# Options that leave something out, so that padding and decoding are not those of dense attention.
NO_WEIGHTS = {
    "DualChunkAttention": {"chunk": 6, "local": 4},
    "HierarchicalAttention": {"chunk": 6},
    "LSHAttention": {"buckets": 4, "chunk": 4, "rounds": 2},
    "LinearAttention": {"feature_map": "elu"},
    "MoBA": {"block": 5, "top": 2},
    "Performer": {"features": 16},
    "PooledChunkAttention": {"chunk": 6},
    "RoutingAttention": {"clusters": 3, "window": 6},
    "TopK": {"keep": 5},
}
NEW_WEIGHTS = {
    "AdaptiveSpan": {"max_span": 9, "ramp": 4},
    "BlockGate": {"block": 5, "top": 2},
    "LinearAttention": {},
    "NSA": {"block": 6, "stride": 3, "select_block": 5, "select": 4, "window": 6},
    "PooledChunkAttention": {"chunk": 6, "pool": "learned"},
    "Synthesizer": {"kind": ("factorized", "dense"), "max_length": 64},
}
BOTH = [*NO_WEIGHTS.items(), *NEW_WEIGHTS.items()]


def test_names_are_not_hidden_by_modules():
    importlib.import_module(ls.hf.load_mechanism.__module__)
    for name in ls.hf.__all__:
        assert not inspect.ismodule(getattr(ls.hf, name)), name


def put(model, name, options, **more):
    torch.manual_seed(0)
    return ls.hf.convert(model, name, **options, **more)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **{"use_cache": False, **kwargs}).logits


def close(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=1e-4)


@pytest.fixture(params=["llama", "qwen3"])
def model(tiny, request):
    return tiny.build(request.param)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("TopK", {"keep": 64}, 0),
        ("MoBA", {"block": 5, "top": 6}, 0),
        ("AdaptiveSpan", {}, 0),
        ("BlockGate", {"block": 5, "top": 6}, 0),
        ("PooledChunkAttention", {"chunk": 32}, 0),
        ("PooledChunkAttention", {"chunk": 1, "pool": "learned"}, 0),
        ("DualChunkAttention", {"chunk": 32, "local": 8}, 0),
        ("NSA", {"window": 64}, 0.02),
        ("Synthesizer", {}, 0.02),
    ],
)
def test_starts_as_dense_attention(model, tiny, name, options, tolerance):
    ids = tiny.tokens(2, N)
    plain = logits(model, ids)
    applied = put(model, name, options)
    found = logits(model, ids)
    if tolerance:
        assert 0 < (found - plain).norm() / plain.norm() < tolerance
    else:
        close(found, plain)
    applied.remove()
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize(("name", "options"), BOTH, ids=str)
def test_generation_equals_one_forward_at_a_time(tiny, name, options):
    model, ids = tiny.build("qwen3"), tiny.tokens(2, 15)
    plain = logits(model, ids)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    put(model, name, options)
    assert (logits(model, ids) - plain).abs().max() > 0.01
    settings = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **settings)
    for _ in range(14):
        ids = torch.cat([ids, logits(model, ids, attention_mask=mask)[:, -1:].argmax(-1)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize(("name", "options"), BOTH, ids=str)
def test_padding_is_absent_and_a_cache_changes_nothing(model, tiny, name, options):
    ids = tiny.tokens(1, N)
    put(model, name, options)
    expected = logits(model, ids)
    for left, right in ((7, 0), (0, 7), (3, 5)):
        wide = torch.nn.functional.pad(ids, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        close(logits(model, wide, attention_mask=mask)[:, left : left + N], expected)
    with torch.no_grad():
        first = model(ids[:, :13], use_cache=True)
        rest = model(ids[:, 13:], past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat([first.logits, rest.logits], 1), expected)


@pytest.mark.parametrize(("name", "options"), BOTH, ids=str)
def test_gradients_reach_the_model_and_the_new_weights(tiny, name, options):
    model, ids = tiny.build("llama"), tiny.tokens(2, N)
    put(model, name, options)
    logits_of = model(ids, use_cache=False).logits
    logits_of.square().mean().backward()
    for path, parameter in model.named_parameters():
        # Hashing takes keys from queries, synthetic weights need neither; gates are trained by
        # distillation.
        unread = {"LSHAttention": ("k_proj",), "Synthesizer": ("q_proj", "k_proj")}.get(name, ())
        if any(part in path for part in (*unread, "mechanism.gate_")):
            continue
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
    first = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ls.hf.recompute_layers(model)
    model.train()
    model(ids).logits.square().mean().backward()
    for path, parameter in model.named_parameters():
        if path in first and name not in ("RoutingAttention",):
            torch.testing.assert_close(parameter.grad, first[path], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("name", "options"), BOTH, ids=str)
def test_autocast_and_low_precision_are_close(tiny, name, options):
    # Norms of heads leave queries and keys wider than values under autocast.
    model, ids = tiny.build("qwen3"), tiny.tokens(2, N)
    put(model, name, options)
    wanted = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(ids, use_cache=False).logits
    cast.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    low = model.bfloat16()(ids).logits
    # Rounding changes what some select.
    selects = name in ("BlockGate", "LSHAttention", "MoBA", "RoutingAttention", "TopK")
    for found in (cast, low):
        assert found.dtype == torch.bfloat16
        apart = (found.float() - wanted).norm() / wanted.norm()
        assert apart < (0.4 if selects else 0.03)


def test_the_future_never_reaches_the_past(tiny):
    ids, at = tiny.tokens(2, N), 13
    changed = torch.cat([ids[:, :at], tiny.tokens(2, N - at, seed=9)], dim=1)
    for name, options in BOTH:
        model = tiny.build("llama")
        put(model, name, options)
        found, wanted = logits(model, changed)[:, :at], logits(model, ids)[:, :at]
        # Sorting rows into buckets changes the rounding.
        sorts = name in ("LSHAttention", "RoutingAttention")
        assert torch.equal(found, wanted) or (sorts and torch.allclose(found, wanted, atol=1e-5))


def test_only_chosen_layers_are_converted(model, tiny):
    ids = tiny.tokens(1, N)
    plain = logits(model, ids)
    applied = put(model, "TopK", {"keep": 2}, layers=[-1])
    assert list(applied.mechanisms) == ["model.layers.1.self_attn"]
    with torch.no_grad():
        hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        applied.remove()
        before = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    close(hidden[1], before[1])
    assert (hidden[2] - before[2]).abs().max() > 0.01
    assert torch.equal(logits(model, ids), plain)
    put(model, "TopK", {"keep": 2}, layers=[1])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "options"), [*NEW_WEIGHTS.items(), *[("Performer", {})]], ids=str
)
def test_new_weights_are_saved_and_loaded(tiny, name, options, tmp_path):
    model, ids = tiny.build("qwen3"), tiny.tokens(1, N)
    applied = put(model, name, options, layers=[1])
    for layer in applied.mechanisms.values():
        for tensor in layer.state_dict().values():
            tensor += 0.05 * torch.randn_like(tensor)
    wanted = logits(model, ids)
    ls.hf.save_mechanism(model, tmp_path)
    again = tiny.build("qwen3")
    loaded = ls.hf.load_mechanism(again, tmp_path)
    assert torch.equal(logits(again, ids), wanted)
    assert str(loaded.pattern) == str(applied.pattern)
    loaded.remove()
    (tmp_path / "mechanism.safetensors").write_bytes(b"interrupted")
    with pytest.raises(DataError, match="holds no saved mechanism"):
        ls.hf.load_mechanism(again, tmp_path)
    ls.hf.save_mechanism(model, tmp_path)
    other = tiny.build("qwen3", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    plain = logits(other, ids)
    with pytest.raises(DataError, match="does not fit this model"):
        ls.hf.load_mechanism(other, tmp_path)
    assert torch.equal(logits(other, ids), plain)


def test_projections_may_have_biases_of_their_own_and_adapters(tiny):
    """Qwen2 has a bias on all but the output; LoRA wraps projections before a mechanism comes."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model, ids = (
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON)).eval(),
        tiny.tokens(1, N),
    )
    for _, owner in routed(model):
        torch.nn.init.normal_(owner.q_proj.bias)
        torch.nn.init.normal_(owner.k_proj.bias)
    for adapted in (False, True):
        if adapted:
            model = ls.hf.add_lora(model, rank=2, alpha=4.0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        plain = logits(model, ids)
        for name, options in (("MoBA", {"block": 5, "top": 6}), ("AdaptiveSpan", {})):
            with put(model, name, options):
                close(logits(model, ids), plain)
        assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("name", ["TopK", "NSA"])
def test_positions_that_are_not_one_apart_are_refused(tiny, name):
    """A mechanism counts tokens; gaps and images were rotated as if there were none."""
    model, ids = tiny.build("llama"), tiny.tokens(2, N)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = dict(BOTH)[name]
    put(model, name, options)
    plain = logits(model, ids, attention_mask=mask)
    for places in (torch.arange(N) + 1000, (mask.cumsum(1) - 1).clamp(min=0)):
        places = places.expand(2, -1)
        close(logits(model, ids, attention_mask=mask, position_ids=places), plain, 1e-4)
    gap = torch.arange(N) + (torch.arange(N) > 20)
    with pytest.raises(InputError, match="by other distances than 1"):
        logits(model, ids, attention_mask=mask, position_ids=gap.expand(2, -1))
    with pytest.raises(InputError, match="by other distances than 1"):
        logits(model, ids, attention_mask=mask[:1], position_ids=gap[None])
    scaling = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    torch.manual_seed(0)
    seeing = transformers.Qwen2VLTextModel(
        transformers.Qwen2VLTextConfig(**COMMON, rope_parameters=scaling)
    ).eval()
    put(seeing, name, options)
    places = torch.arange(N).expand(3, 2, -1).clone()
    with torch.no_grad():
        seeing(ids, position_ids=places, use_cache=False)
        # Four tokens of an image, two by two.
        places[:, :, 5:9] = torch.tensor([[5, 5, 5, 5], [5, 5, 6, 6], [5, 6, 5, 6]])[:, None]
        with pytest.raises(InputError, match="or images, whose tokens have several"):
            seeing(ids, position_ids=places, use_cache=False)


def test_a_scaling_comes_before_a_mechanism(tiny):
    """A mechanism keeps the frequencies that it was made with."""
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    with ls.hf.apply(model, "TopK", keep=64):
        plain = logits(model, ids)
        with pytest.raises(Refusal, match="set the scaling, and put it in again"):
            ls.hf.set_rope(model, "yarn", 128)
        assert torch.equal(logits(model, ids), plain)
    ls.hf.set_rope(model, "yarn", 128)
    plain = logits(model, ids)
    with ls.hf.apply(model, "TopK", keep=64):
        close(logits(model, ids), plain)


def test_saving_the_model_keeps_its_own_names(tiny, tmp_path):
    model = tiny.build("llama")
    names = set(model.state_dict())
    put(model, "NSA", NEW_WEIGHTS["NSA"])
    assert names < set(model.state_dict())
    assert all(".self_attn.mechanism." in name for name in set(model.state_dict()) - names)
    ls.hf.remove(model)
    assert set(model.state_dict()) == names
    assert all("forward" not in vars(owner) for _, owner in routed(model))


def test_a_copy_is_independent_and_lora_is_seen(tiny):
    pytest.importorskip("peft")
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    put(model, "NSA", NEW_WEIGHTS["NSA"])
    wanted = logits(model, ids)
    twin = copy.deepcopy(model)
    for _, owner in routed(twin):
        owner.q_proj.weight.data.zero_()
    assert (logits(twin, ids) - wanted).abs().max() > 1e-3
    assert torch.equal(logits(model, ids), wanted)
    ls.hf.remove(twin)
    assert torch.equal(logits(model, ids), wanted)
    adapted = ls.hf.add_lora(model, rank=2, alpha=4.0, targets=["q_proj", "v_proj"])
    assert torch.equal(logits(adapted, ids), wanted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert (logits(adapted, ids) - wanted).abs().max() > 1e-3


def test_beams_carry_their_states(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(2, 11)
    for name in ("LinearAttention", "PooledChunkAttention", "AdaptiveSpan"):
        with put(model, name, NEW_WEIGHTS[name]):
            settings = {"max_new_tokens": 8, "num_beams": 3, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            found = model.generate(ids, attention_mask=mask, **settings)
            wanted = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
            assert torch.equal(found, wanted), name


def test_apply_takes_mechanisms_without_new_weights(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    plain = logits(model, ids)
    for name, options in NO_WEIGHTS.items():
        kind = getattr(ls.mechanism, name)
        with ls.hf.apply(model, kind, **options) as applied:
            assert applied.pattern.kind is kind
            assert "computes " + name in str(ls.hf.inspect(model))
            found = logits(model, ids)
            assert (found - plain).abs().max() > 1e-3
        assert torch.equal(logits(model, ids), plain)
        if name not in ("LSHAttention", "Performer", "RoutingAttention"):
            # Those draw random numbers.
            with ls.hf.apply(model, name, **options):
                assert torch.equal(logits(model, ids), found)
    for name in ("NSA", "AdaptiveSpan", "LinearAttention"):
        with pytest.raises(Refusal, match=r"weights of its own.*use longspan.hf.convert"):
            ls.hf.apply(model, getattr(ls.mechanism, name), **NEW_WEIGHTS[name])
        assert torch.equal(logits(model, ids), plain)


def test_refusals_name_the_method_and_leave_the_model_alone(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    plain = logits(model, ids)
    for name in ("Linformer", "Nystromformer", "LongformerAttention", "BigBirdAttention"):
        with pytest.raises(Refusal, match=f"{name} cannot stand in for the causal attention"):
            ls.hf.convert(model, name)
    with pytest.raises(Refusal, match="causal=False lets tokens see later ones"):
        ls.hf.convert(model, "LinearAttention", causal=False)
    with pytest.raises(InputError, match=r"'Mamba' is no layer .*NSA, AdaptiveSpan"):
        ls.hf.convert(model, "Mamba")
    with pytest.raises(InputError, match=r"expected a layer of longspan\.mechanism or its name"):
        ls.hf.convert(model, 5)
    with pytest.raises(InputError, match="DualChunkAttention needs chunk, local"):
        ls.hf.apply(model, ls.mechanism.DualChunkAttention)
    with pytest.raises(
        InputError, match="no option window; it has block, impl, share_blocks, top"
    ):
        ls.hf.convert(model, "MoBA", window=5)
    with pytest.raises(InputError, match="numbers from 0 to 1"):
        ls.hf.convert(model, "MoBA", layers=[2])
    with pytest.raises(InputError, match="numbers from 0 to 1, got 1"):
        ls.hf.convert(model, "MoBA", layers=1)
    with pytest.raises(InputError, match="computes no mechanism"):
        ls.hf.save_mechanism(model, "nowhere")
    with pytest.raises(DataError, match="holds no saved mechanism"):
        ls.hf.load_mechanism(model, "nowhere")
    with pytest.raises(InputError, match="only mechanisms have options"):
        ls.hf.apply(model, "window(4)", block=3)
    with pytest.raises(PatternError, match="Expected a pattern"):
        ls.hf.apply(model, torch.nn.Linear)
    assert torch.equal(logits(model, ids), plain)
    windowed = tiny.build("mistral")
    with pytest.raises(Refusal, match="has a window of its own"):
        ls.hf.convert(windowed, "MoBA")
    gemma = tiny.build("gemma3")
    with pytest.raises(Refusal, match=r"rotary modules|frequencies"):
        ls.hf.convert(gemma, "MoBA", layers=[1])
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=97)
    )
    with pytest.raises(Refusal, match="has no q_proj"):
        ls.hf.convert(gpt, "MoBA")
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(Refusal, match="frequencies change with the length"):
        ls.hf.convert(tiny.build("llama", rope_parameters=dynamic), "MoBA")


@pytest.mark.filterwarnings("ignore")
def test_quantised_models_take_what_needs_no_weights(tiny):
    """Layers of torch's quantisation have no parameters, and a method in place of a weight."""
    plain, ids = tiny.build("llama"), tiny.tokens(1, N)
    engines = torch.backends.quantized.supported_engines
    if engines == ["none"]:
        pytest.skip("this torch quantises nothing")
    model = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear})
    wanted = logits(model, ids)
    with pytest.raises(Refusal, match=r"self_attn .* has quantised weights"):
        ls.hf.apply(model, "MoBA", **NO_WEIGHTS["MoBA"])
    for what in ("causal()", ls.DualChunk(chunk=32, local=8)):
        with ls.hf.apply(model, what):
            # Activations are quantised in every call, by their largest values.
            assert (logits(model, ids) - wanted).norm() < 0.05 * wanted.norm()


def test_what_would_be_lost_or_mixed_up_is_refused(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    applied = put(model, "NSA", NEW_WEIGHTS["NSA"])
    with pytest.raises(Refusal, match="weights of a mechanism, which would be lost"):
        ls.hf.apply(model, "window(4)")
    places = torch.cat([torch.arange(17), torch.arange(N - 17)])[None]
    with pytest.raises(Refusal, match="Packed documents"):
        logits(model, ids, position_ids=places)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(Refusal, match="cannot be cropped"):
        cache.crop(-1)
    applied.remove()
    with pytest.raises(Refusal, match="start with a new cache"):
        model(ids[:, :1], past_key_values=cache)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    put(model, "MoBA", NO_WEIGHTS["MoBA"])
    with pytest.raises(Refusal, match="needs a new dynamic cache"):
        model(ids[:, :1], past_key_values=cache)

    class Forgetful(MechanismLayer):
        def mix(self, q, k, v, valid):
            return v.repeat_interleave(self.heads // self.kv_heads, dim=1)

    ls.hf.apply(model, Forgetful)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    with pytest.raises(Refusal, match=r"Forgetful cannot go on .*keeps no state.*use_cache"):
        model.generate(ids, attention_mask=mask, **settings)
    model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    ls.hf.remove(model)
    put(model, "LSHAttention", {"selection": "chunks", "buckets": 4})
    with pytest.raises(Refusal, match="a new token moves the chunks"):
        model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_configuration_does_not_carry_a_mechanism(tiny, layers):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    put(model, "MoBA", NO_WEIGHTS["MoBA"], layers=layers)
    twin = type(model)(copy.deepcopy(model.config)).eval()
    with pytest.raises(Refusal, match=r"MoBA.*not put into it.*longspan\.hf\.remove"):
        logits(twin, ids)
    ls.hf.remove(twin)
    logits(twin, ids)
    put(twin, "MoBA", NO_WEIGHTS["MoBA"], layers=layers)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(twin, ids), logits(model, ids))


def test_a_mechanism_under_another_attention_is_refused(tiny):
    config = tiny.build("llama").config
    one, other = (type(tiny.build("llama"))(config).eval() for _ in range(2))
    put(one, "MoBA", NO_WEIGHTS["MoBA"])
    ls.hf.apply(other, "window(4)")
    ids = tiny.tokens(1, N)
    logits(other, ids)
    with pytest.raises(Refusal, match=r"computes MoBA, but .* is now longspan.*window\(4\)"):
        logits(one, ids)
    one.set_attn_implementation("eager")
    with pytest.raises(Refusal, match=r"computes MoBA, but .* is now eager"):
        logits(one, ids)
    ls.hf.remove(one)
    logits(one, ids)


def test_offloaded_weights_are_said_and_may_come_after(tiny):
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    applied = put(model, "MoBA", NO_WEIGHTS["MoBA"])
    wanted = logits(model, ids)
    accelerate.cpu_offload(model, "cpu")
    assert torch.equal(logits(model, ids), wanted)
    applied.remove()
    with pytest.raises(Refusal, match=r"device meta.*offload them after this"):
        put(model, "MoBA", NO_WEIGHTS["MoBA"])


def test_shards_are_said_and_may_come_after(tiny):
    from torch.distributed import device_mesh, fsdp

    ids = tiny.tokens(1, N)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = device_mesh.init_device_mesh("cpu", (1,))
        model = tiny.build("llama")
        applied = put(model, "MoBA", NO_WEIGHTS["MoBA"])
        wanted = logits(model, ids)
        fsdp.fully_shard(model, mesh=mesh)
        close(logits(model, ids), wanted)
        applied.remove()
        model.reshard()
        with pytest.raises(Refusal, match="shard them after this"):
            put(model, "MoBA", NO_WEIGHTS["MoBA"])
    finally:
        torch.distributed.destroy_process_group()
