"""Dual Chunk Attention in models, against a layer-by-layer dense form on unrotated queries."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.hf.conftest import COMMON
from tests.mechanism.oracles import weighted_softmax

transformers = pytest.importorskip("transformers")

import longspan as ls  # noqa: E402
from longspan.errors import InputError, Refusal  # noqa: E402
from longspan.hf.routes import routed  # noqa: E402

N = 29
CONFIG = ls.DualChunk(chunk=6, local=4)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def logits(model, ids, **kwargs):
    return model(ids, **{"use_cache": False, **kwargs}).logits


def dense(model, config):
    """A copy of the model whose layers compute the dense form, with unrotated queries and keys."""
    oracle = copy.deepcopy(model)
    s, c = config.chunk, config.chunk + config.local
    rotary = oracle.model.rotary_emb
    turn = transformers.models.llama.modeling_llama.apply_rotary_pos_emb

    def layer(module):
        def forward(hidden_states, position_embeddings=None, **_):
            n = hidden_states.shape[1]
            q, k, v = (
                part(hidden_states).unflatten(-1, (-1, module.head_dim))
                for part in (module.q_proj, module.k_proj, module.v_proj)
            )
            if hasattr(module, "q_norm"):
                q, k = module.q_norm(q), module.k_norm(k)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            i = torch.arange(n)

            def at(x, place):
                cos, sin = rotary(x, place[None])
                return turn(x, x, cos, sin)[0]

            keys = at(k, i % s).mT
            intra, inter = at(q, i % s) @ keys, at(q, torch.full_like(i, c - 1)) @ keys
            successive = at(q, (s + i % s).clamp(max=c - 1)) @ keys
            back = (i // s)[:, None] - (i // s)[None]
            z = torch.where(back == 0, intra, torch.where(back == 1, successive, inter))
            out = weighted_softmax(z * module.scaling, i[None] <= i[:, None], v)
            return module.o_proj(out.transpose(1, 2).flatten(2)), None

        return forward

    for _, module in routed(oracle):
        module.forward = layer(module)
    return oracle


@pytest.fixture(params=["llama", "qwen3", "yarn"])
def model(tiny, request):
    if request.param != "yarn":
        return tiny.build(request.param)
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    scaled["original_max_position_embeddings"] = 16
    return tiny.build("llama", rope_parameters=scaled)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_equals_the_dense_form(model, tiny):
    ids = tiny.tokens(2, N)
    expected, plain = logits(dense(model, CONFIG), ids), logits(model, ids)
    with ls.hf.apply(model, CONFIG):
        close(logits(model, ids), expected)
    assert (expected - plain).abs().max() > 0.01
    assert torch.equal(logits(model, ids), plain)


def test_gradients_are_those_of_the_dense_form(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    oracle = dense(model, CONFIG)
    ls.hf.apply(model, CONFIG)
    with torch.enable_grad():
        for one in (model, oracle):
            logits(one, ids).square().mean().backward()
    wanted = dict(oracle.named_parameters())
    for name, found in model.named_parameters():
        torch.testing.assert_close(found.grad, wanted[name].grad, atol=1e-6, rtol=1e-3)


def test_padding_on_either_side_is_absent(model, tiny):
    ids = tiny.tokens(1, N)
    ls.hf.apply(model, CONFIG)
    expected = logits(model, ids)
    for left, right in ((7, 0), (0, 7), (3, 5)):
        wide = torch.nn.functional.pad(ids, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        close(logits(model, wide, attention_mask=mask)[:, left : left + N], expected)


def test_packed_documents_equal_separate_runs(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    ls.hf.apply(model, CONFIG)
    places = torch.cat([torch.arange(17), torch.arange(N - 17)])[None]
    found = logits(model, ids, position_ids=places)
    close(found, torch.cat([logits(model, ids[:, :17]), logits(model, ids[:, 17:])], dim=1))


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_equals_one_forward_at_a_time(model, tiny, cache):
    ids = tiny.tokens(2, 15)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ls.hf.apply(model, CONFIG)
    settings = {"max_new_tokens": 14, "do_sample": False, "cache_implementation": cache}
    found = model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)
    for _ in range(14):
        ids = torch.cat([ids, logits(model, ids, attention_mask=mask)[:, -1:].argmax(-1)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(found, ids)


def test_keys_enter_the_cache_where_they_stay(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    ls.hf.apply(model, CONFIG)
    whole = model(ids, use_cache=True)
    first = model(ids[:, :13], use_cache=True)
    rest = model(ids[:, 13:], past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat([first.logits, rest.logits], dim=1), whole.logits)
    for a, b in zip(whole.past_key_values.layers, rest.past_key_values.layers, strict=True):
        close(a.keys, b.keys)


def test_the_future_never_reaches_the_past(tiny):
    model, ids, at = tiny.build("llama"), tiny.tokens(2, N), 13
    ls.hf.apply(model, CONFIG)
    changed = torch.cat([ids[:, :at], tiny.tokens(2, N - at, seed=9)], dim=1)
    assert torch.equal(logits(model, ids)[:, :at], logits(model, changed)[:, :at])


def test_checkpointing_computes_the_same(tiny):
    model, ids = tiny.build("llama").train(), tiny.tokens(1, N)
    ls.hf.apply(model, CONFIG)
    grads = []
    with torch.enable_grad():
        for on in (False, True):
            ls.hf.recompute_layers(model, on)
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_it_is_listed_and_taken_out(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    plain = logits(model, ids)
    assert not ls.hf.inspect(model).changes
    first = ls.hf.apply(model, CONFIG)
    expected, report = logits(model, ids), ls.hf.inspect(model)
    assert "dual_chunk(chunk=6, local=4)" in report.attention
    assert "model.rotary_emb (LlamaRotaryEmbedding) gets positions modulo 6" in str(report)
    with ls.hf.apply(model, ls.Window(3)):
        assert not ls.hf.inspect(model).changes
    assert torch.equal(logits(model, ids), expected)
    twin = copy.deepcopy(model)
    first.remove()
    assert torch.equal(logits(model, ids), plain)
    assert torch.equal(logits(twin, ids), expected)
    # Switching by transformers itself leaves hooks that do nothing.
    twin.set_attn_implementation("sdpa")
    assert torch.equal(logits(twin, ids), plain)
    twin.set_attn_implementation(first.name)
    ls.hf.remove(twin)
    for one in (model, twin):
        assert not any(module._forward_pre_hooks for module in one.modules())


def test_positions_that_count_otherwise_are_refused(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    ls.hf.apply(model, CONFIG)
    with pytest.raises(InputError, match="count the real tokens"):
        logits(model, ids, position_ids=torch.arange(3, 3 + N)[None])


def test_images_are_refused(tiny):
    """Their tokens have several positions each: chunks would end elsewhere than rotations."""
    scaling = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    torch.manual_seed(0)
    model = transformers.Qwen2VLTextModel(
        transformers.Qwen2VLTextConfig(**COMMON, rope_parameters=scaling)
    ).eval()
    ids, places = tiny.tokens(2, N), torch.arange(N).expand(4, 2, -1).clone()
    wanted = model(ids, use_cache=False).last_hidden_state
    ls.hf.apply(model, ls.DualChunk(chunk=64, local=16))
    found = model(ids, position_ids=places, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    places[3, :, 5] = 6
    with pytest.raises(InputError, match="several positions each"):
        model(ids, position_ids=places, use_cache=False)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_models_with_windows_are_refused(tiny, family):
    model = tiny.build(family)
    before = model.config._attn_implementation
    with pytest.raises(Refusal, match="was not changed"):
        ls.hf.apply(model, CONFIG)
    assert model.config._attn_implementation == before


def test_the_demo_model_reads_four_times_its_context():
    from pathlib import Path

    from longspan.eval.losses import TokenLoss
    from longspan.train.data import python_sources, tokenize_documents

    model, tokenizer = ls.hf.load_model(Path(ls.__file__).parent / "assets" / "demo_model")
    (text,) = tokenize_documents(tokenizer, python_sources("heldout")[:1])
    ids = text[None, :2048]

    def perplexity(length):
        return TokenLoss(model)(ids.view(-1, length)).mean().exp().item()

    short, broken = perplexity(512), perplexity(2048)
    with ls.hf.apply(model, ls.DualChunk.for_length(512)):
        long = perplexity(2048)
    assert long < 1.15 * short
    assert broken > 3 * short
