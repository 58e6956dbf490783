"""Arguments that contradict a cache: the tokens that they ask for, or an error before any work."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.hf.caches import PAD, POLICIES, padded  # noqa: E402

import longspan as ls  # noqa: E402
from longspan.errors import InputError, Refusal  # noqa: E402

GREEDY = {"max_new_tokens": 6, "do_sample": False}
AGAIN = "The cache has read 12 tokens, and by its position_ids or attention_mask"


def untouched(cache):
    return cache.get_seq_length() == 0 and all(layer.keys is None for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"prefill_chunk_size": 8}])
def test_a_cache_that_is_not_to_be_used_is_refused(family, masked, more, tiny):
    """transformers reads the text again at each step, into the cache: other tokens come out."""
    model = tiny.build(family, max_position_embeddings=256)
    ids, mask = padded(tiny, 24) if masked else (tiny.tokens(1, 24), None)
    cache = ls.kv.cache(model, "everything()")
    options = {"attention_mask": mask, **GREEDY}
    with pytest.raises(InputError, match=r"use_cache=False .* Pass use_cache=True, or leave"):
        model.generate(ids, past_key_values=cache, use_cache=False, **options, **more)
    assert untouched(cache)
    # The same cache may go on, and has no part in calls that leave it out.
    got = model.generate(ids, past_key_values=cache, **options, **more)
    assert torch.equal(got, model.generate(ids, **options, **more))
    more.pop("prefill_chunk_size", None)
    assert torch.equal(got, model.generate(ids, use_cache=False, **options, **more))


def test_settings_that_leave_the_cache_out_are_refused(llama, tiny):
    ids, cache = tiny.tokens(1, 24), ls.kv.cache(llama, POLICIES[0])
    settings = transformers.GenerationConfig(use_cache=False, **GREEDY)
    with pytest.raises(InputError, match="of the generation settings"):
        llama.generate(ids, past_key_values=cache, generation_config=settings)
    # Not said in the call: the model's default of what it returns, and the cache is filled.
    llama.config.use_cache = False
    with torch.no_grad():
        llama(ids, past_key_values=cache)
    assert cache.get_seq_length() == 24


@pytest.mark.parametrize("length", [8, 11, 12])
@pytest.mark.parametrize("pad", [0, PAD])
def test_text_that_the_cache_holds_is_refused(length, pad, llama, tiny):
    """generate read it a second time, behind itself."""
    ids, mask = padded(tiny, 24, pad)
    cache = ls.kv.cache(llama, "everything()")
    with torch.no_grad():
        places = (mask[:, :12].cumsum(1) - 1).clamp(min=0)
        llama(ids[:, :12], attention_mask=mask[:, :12], position_ids=places, past_key_values=cache)
        with pytest.raises(InputError, match=AGAIN):
            llama.generate(
                ids[:, :length], attention_mask=mask[:, :length], past_key_values=cache, **GREEDY
            )
    assert cache.get_seq_length() == 12
    got = llama.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(got, llama.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("attention", ["cache", "MoBA"])
def test_rows_without_new_tokens_are_not_read_again(attention, more, llama, tiny):
    """generate gives position 0 to the padding at their end."""
    ids, mask = tiny.tokens(2, 24), torch.ones(2, 24, dtype=torch.int64)
    mask[1, 12:] = 0
    if attention == "cache":
        cache = ls.kv.cache(llama, "everything()")
    else:
        ls.hf.apply(llama, attention, block=8, top=2)
        cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids[:, :12], past_key_values=cache)
    options = {"attention_mask": mask, **GREEDY}
    got = llama.generate(ids, past_key_values=cache, **options, **more)
    # What follows padding in the other row is no continuation of it.
    assert torch.equal(got[0], llama.generate(ids, **options)[0])


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("before", [0, 12])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_of_which_some_layers_read_more_is_refused(family, before, stopped, tiny):
    """As memory runs out in the middle of a model: the next call gave other tokens."""
    changes = {"num_hidden_layers": 4}
    if family == "gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    model = tiny.build(family, max_position_embeddings=256, **changes)
    ids, cache = tiny.tokens(1, 24), ls.kv.cache(model, "everything()")

    def stop(*_):
        raise MemoryError

    with torch.no_grad():
        if before:
            model(ids[:, :before], past_key_values=cache)
        hook = model.model.layers[stopped].mlp.register_forward_pre_hook(stop)
        with pytest.raises(MemoryError):
            model(ids[:, before:18], past_key_values=cache)
        hook.remove()
    for _ in range(2):
        with pytest.raises(InputError, match=rf"have read 18 tokens, others {before}\. .* reset"):
            model.generate(ids, past_key_values=cache, **GREEDY)
    cache.reset()
    got = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(got, model.generate(ids, **GREEDY))


def test_new_tokens_alone_need_a_mask_of_all(llama, tiny):
    ids = tiny.tokens(1, 24)
    caches = [ls.kv.cache(llama, "everything()") for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            llama(ids[:, :12], past_key_values=cache)
    # Without one, generate counts positions from 0.
    with pytest.raises(InputError, match=AGAIN):
        llama.generate(ids[:, 12:], past_key_values=caches[0], **GREEDY)
    with pytest.raises(InputError, match=AGAIN):
        llama(ids[:, 12:], attention_mask=torch.ones(1, 12), past_key_values=caches[0])
    got = llama.generate(
        ids[:, 12:], attention_mask=torch.ones_like(ids), past_key_values=caches[1], **GREEDY
    )
    assert torch.equal(got[:, 12:], llama.generate(ids, **GREEDY)[:, 24:])


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_return_sequences": 3}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_another_number_of_rows_is_refused_before_any_layer(family, more, tiny):
    model = tiny.build(family, max_position_embeddings=256)
    ids, cache = tiny.tokens(1, 24), ls.kv.cache(model, "everything()")
    options = {**GREEDY, "do_sample": "num_beams" not in more, **more}
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
    with pytest.raises(InputError, match="holds 1 sequences, got 3; use batch_repeat_interleave"):
        model.generate(ids, past_key_values=cache, **options)
    cache.batch_repeat_interleave(3)
    torch.manual_seed(0)
    got = model.generate(ids, past_key_values=cache, **options)
    torch.manual_seed(0)
    assert torch.equal(got, model.generate(ids, **options))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_is_refused_before_any_work(family, how, tiny):
    model = tiny.build(family, max_position_embeddings=256)
    small = tiny.build(family, max_position_embeddings=256)
    cache = ls.kv.cache(model, POLICIES[0])
    more = {how: 3 if how.startswith("prompt") else small}
    with pytest.raises(Refusal, match="assisted and prompt-lookup decoding"):
        model.generate(tiny.tokens(1, 24), past_key_values=cache, **GREEDY, **more)
    assert untouched(cache)


@pytest.mark.parametrize("text", ["everything()", POLICIES[0], POLICIES[10], "quest(16, 4, 0)"])
def test_a_search_that_tries_candidates_and_keeps_one(text, llama, tiny):
    """As contrastive search does: every row tries three tokens, and one of them goes on."""

    ids = found = tiny.tokens(2, 24)
    cache, first = ls.kv.cache(llama, text), torch.tensor([0, 3])
    with torch.no_grad():
        logits = llama(ids, past_key_values=cache).logits[:, -1]
        for _ in range(6):
            best = logits.topk(3).indices
            cache.batch_repeat_interleave(3)
            tried = llama(best.flatten()[:, None], past_key_values=cache).logits[:, -1]
            cache.batch_select_indices(first)
            logits, found = tried[first], torch.cat([found, best[:, :1]], 1)
    wanted = llama.generate(ids, past_key_values=ls.kv.cache(llama, text), **GREEDY)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("wrong", [{"output_attentions": True}, {"attention_mask": "pairs"}])
def test_a_cache_goes_on_after_a_call_that_was_refused(wrong, llama, tiny):
    """Its keys passed for unread, and the next call was refused for that."""
    ids, cache = tiny.tokens(1, 24), ls.kv.cache(llama, "everything()")
    if "attention_mask" in wrong:
        wrong = {"attention_mask": torch.ones(1, 1, 24, 24)}
    with torch.no_grad():
        with pytest.raises(InputError, match=r"weights are never formed|masks of pairs"):
            llama(ids, past_key_values=cache, **wrong)
        found = llama(ids, past_key_values=cache).logits
        assert torch.equal(found, llama(ids).logits)


def test_two_kinds_of_cache_are_refused(llama, tiny):
    cache = ls.kv.cache(llama, POLICIES[0])
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        llama.generate(
            tiny.tokens(1, 24), past_key_values=cache, cache_implementation="static", **GREEDY
        )
    assert untouched(cache)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_of_another_number_of_layers_is_refused(layers, llama, tiny):
    cache = ls.kv.cache(llama, "everything()")
    other = tiny.build("llama", num_hidden_layers=layers, max_position_embeddings=256)
    ls.hf.apply(other, ls.Causal())
    with pytest.raises(Refusal, match="made for another model than that of the LlamaAttention"):
        other.generate(tiny.tokens(1, 24), past_key_values=cache, **GREEDY)
    got = llama.generate(tiny.tokens(1, 24), past_key_values=cache, **GREEDY)
    assert torch.equal(got, llama.generate(tiny.tokens(1, 24), **GREEDY))


def test_a_mechanism_reads_no_text_twice(llama, tiny):
    ids, cache = tiny.tokens(1, 24), transformers.DynamicCache(config=llama.config)
    with ls.hf.apply(llama, "MoBA", block=8, top=2), torch.no_grad():
        llama(ids[:, :12], past_key_values=cache)
        with pytest.raises(InputError, match=AGAIN):
            llama.generate(ids[:, :12], past_key_values=cache, **GREEDY)
        got = llama.generate(ids, past_key_values=cache, **GREEDY)
        assert torch.equal(got, llama.generate(ids, **GREEDY))
        with pytest.raises(InputError, match="The cache has read 24 tokens"):
            llama.generate(
                ids,
                past_key_values=transformers.DynamicCache(config=llama.config),
                use_cache=False,
                **GREEDY,
            )


def test_the_hook_goes_with_the_pattern_and_survives_copies(llama, tiny):
    ids = tiny.tokens(1, 12)
    ls.kv.cache(llama, "everything()")
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        with pytest.raises(InputError, match="use_cache=False"):
            other(ids, past_key_values=ls.kv.cache(other, "everything()"), use_cache=False)
        ls.hf.remove(other)
        assert not other._forward_pre_hooks
    assert len(llama._forward_pre_hooks) == 1
    ls.hf.remove(llama)
    assert not llama._forward_pre_hooks
