"""What a cache with a policy holds and says of it, and what it refuses."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

import longspan as ls  # noqa: E402
from longspan.errors import InputError, PolicyError, Refusal  # noqa: E402
from longspan.kv.store import SPARE  # noqa: E402


def test_real_bytes_shrink_and_stay(llama, tiny):
    ids = tiny.tokens(1, 200)
    cache = ls.kv.cache(llama, "sinks(4) + recent(8) + heavy(8)")
    sizes = []
    with torch.no_grad():
        llama(ids[:, :150], past_key_values=cache)
        for token in range(150, 200):
            llama(ids[:, token : token + 1], past_key_values=cache)
            sizes.append(cache.report().bytes)
    # Keys, values, position and sum of each token, with the room of an append.
    per_token = 8 * 4 * 2 + 4 + 4
    assert set(sizes) == {2 * 2 * (20 + SPARE) * per_token}
    assert cache.report().dense_bytes == 2 * 2 * 200 * 8 * 4 * 2
    assert all(row.least == row.most == 20 for row in cache.report().layers)


def test_short_heads_really_free_their_memory(llama, tiny):
    cache = ls.kv.cache(llama, "sinks(0) + adakv(snapkv(40, 4, 3), 0.1) + recent(0)")
    with torch.no_grad():
        llama(tiny.tokens(1, 200), past_key_values=cache)
        before = cache.report().bytes
        cache.compress()
    lengths = cache.layers[0].store.length
    assert lengths.sum() == 2 * (40 + 4)
    assert lengths[0, 0] != lengths[0, 1]
    stored = cache.layers[0].store.bytes
    assert stored == (2 * 44 + 2 * SPARE) * (8 * 4 * 2 + 4)
    assert cache.report().bytes < before / 3


def test_report_and_compress(llama, tiny):
    cache = ls.kv.cache(llama, "snapkv(8, 4)")
    assert cache.report().bytes == 0
    with torch.no_grad():
        llama(tiny.tokens(1, 60), past_key_values=cache)
    assert cache.report().layers[0].most == 60
    cache.compress()
    report = cache.report()
    assert report.layers[0].most == 32 + 4 + 8
    assert report.seen == 60
    assert "snapkv(8, 4): 60 tokens seen" in str(report)
    assert report.to_dict()["layers"][1]["kind"] == "policy"


def test_a_window_layer_keeps_its_own_cache(tiny):
    model = tiny.build("gemma3")
    cache = ls.kv.cache(model, "sinks(2) + recent(4) + heavy(4)")
    model.generate(tiny.tokens(1, 20), past_key_values=cache, max_new_tokens=4, do_sample=False)
    rows = cache.report().layers
    assert [row.kind for row in rows] == ["DynamicSlidingWindowLayer", "policy"]
    assert [row.most for row in rows] == [9, 10]
    with pytest.raises(Refusal, match="nothing for a policy"):
        ls.kv.cache(tiny.build("mistral"), "recent(4)")


@pytest.mark.parametrize("policy", ["recent(3)", "expected_attention(8)"])
def test_latents_are_no_keys(policy):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    widths = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(**sizes, **heads, **dict.fromkeys(widths, 8), first_k_dense_replace=1)
    )
    with pytest.raises(Refusal, match="latents"):
        ls.kv.cache(model, policy)
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_work_is_refused(llama, tiny):
    ids = tiny.tokens(1, 20)
    with pytest.raises(PolicyError, match="did you mean"):
        ls.kv.cache(llama, "hevy(3)")
    with pytest.raises(PolicyError, match="2 of 2"):
        ls.kv.cache(llama, "duo([[1, 2, 3]])")
    with pytest.raises(InputError, match="original or packed"):
        ls.kv.cache(llama, "recent(3)", positions="rolled")
    with pytest.raises(Refusal, match="quest"):
        ls.kv.cache(llama, "quest(64)", positions="packed")
    with pytest.raises(Refusal, match="one set of frequencies"):
        ls.kv.cache(tiny.build("gemma3"), "recent(3)", positions="packed")
    cache = ls.kv.cache(llama, "recent(3)")
    with pytest.raises(Refusal, match="take tokens back"):
        llama.generate(ids, past_key_values=cache, max_new_tokens=9, prompt_lookup_num_tokens=3)
    cache.reset()
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        with pytest.raises(InputError, match="holds 1 sequences, got 2"):
            llama(tiny.tokens(2, 1), past_key_values=cache)
        ls.hf.remove(llama)
        with pytest.raises(Refusal, match="does not use"):
            llama(ids[:, :1], past_key_values=cache)
    longer = tiny.build("llama", num_hidden_layers=3)
    ls.hf.apply(longer, ls.Causal())
    cache = ls.kv.cache(llama, "recent(3)")
    with pytest.raises(Refusal, match="made for another model"):
        longer(ids, past_key_values=cache)
    with pytest.raises(Refusal, match="made for a model of 2 layers"):
        cache.update(*torch.zeros(2, 1, 2, 1, 8), 2)
    ls.hf.apply(llama, ls.DualChunk(chunk=64, local=16))
    with pytest.raises(Refusal, match="in its own way"):
        ls.kv.cache(llama, "recent(3)")
