"""Norms of embeddings: what models note, and what caches and prompts make of them."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.hf.caches import PAD, feed, padded  # noqa: E402

import longspan as ls  # noqa: E402
from longspan.errors import Refusal  # noqa: E402

TEXT = "sinks(1) + recent(3) + embeddingnorm(6)"
SPARSE = "block_topk(1, block=8) + embeddingnorm(5)"


def longest(model, ids, first):
    """Positions of the longest embeddings of one row, from ``first`` on but not the last three."""
    norms = model.get_input_embeddings()(ids).norm(dim=-1).tolist()
    return sorted(range(first, len(ids) - 3), key=lambda j: -norms[j])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_keeps_the_tokens_of_longest_embedding(family, tiny):
    model = tiny.build(family, max_position_embeddings=256)
    ids, mask = padded(tiny, 40)
    cache = ls.kv.cache(model, TEXT)
    feed(model, ids, mask, [40], cache)
    for row, pad in ((0, 0), (1, PAD)):
        with torch.no_grad():
            best = longest(model, ids[row, pad:], 1)[:6]
        wanted = sorted({0, *best, *range(37 - pad, 40 - pad)})
        layer = cache.layers[-1]
        # Every head of every layer keeps the same.
        assert all(layer.positions[row, g].tolist() == wanted for g in range(2))


def test_a_cache_takes_embeddings_in_place_of_ids(llama, tiny):
    ids = tiny.tokens(2, 30)
    caches = [ls.kv.cache(llama, TEXT) for _ in range(2)]
    with torch.no_grad():
        llama(ids, past_key_values=caches[0])
        llama(inputs_embeds=llama.get_input_embeddings()(ids), past_key_values=caches[1])
    assert torch.equal(caches[0].layers[0].positions, caches[1].layers[0].positions)


def test_a_copied_cache_goes_on(llama, tiny):
    ids = tiny.tokens(1, 40)
    cache = ls.kv.cache(llama, TEXT)
    with torch.no_grad():
        llama(ids[:, :30], past_key_values=cache)
        other = copy.deepcopy(cache)
        for held in (cache, other):
            llama(ids[:, 30:], past_key_values=held)
    assert torch.equal(cache.layers[0].positions, other.layers[0].positions)


def test_a_cache_follows_rows_that_change_between_two_chunks(llama, tiny):
    ids, order = tiny.tokens(3, 40), torch.tensor([2, 0, 0])
    cache, wanted = (ls.kv.cache(llama, TEXT) for _ in range(2))
    with torch.no_grad():
        llama(ids[:, :20], past_key_values=cache)
        cache.reorder_cache(order)
        found = llama(ids[order][:, 20:], past_key_values=cache).logits
        llama(ids[order][:, :20], past_key_values=wanted)
        expected = llama(ids[order][:, 20:], past_key_values=wanted).logits
    torch.testing.assert_close(found, expected)
    for held, other in zip(cache.layers, wanted.layers, strict=True):
        assert torch.equal(held.positions, other.positions)


def test_a_prompt_sees_the_columns_of_longest_embedding(llama, tiny):
    ids, mask = padded(tiny, 45)
    seen = []
    plain = ls.select.Method.select

    def watch(self, prompt):
        seen.append(plain(self, prompt))
        return seen[-1]

    with ls.hf.prefill(llama, SPARSE, dense_below=0), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ls.select.Method, "select", watch)
        with torch.no_grad():
            llama(ids, attention_mask=mask)
    assert len(seen) == 2
    for row, pad in ((0, 0), (1, PAD)):
        norms = llama.get_input_embeddings()(ids[row, pad:]).norm(dim=-1)
        wanted = sorted(norms.topk(5).indices.tolist())
        for selection in seen:
            assert all(sorted(c.tolist()) == wanted for c in selection.columns[row])


@pytest.mark.parametrize("cache", ["whole", "chunks", "static"])
def test_chunks_know_the_norms_of_those_before(cache, llama, tiny, monkeypatch):
    """Columns are those of all tokens so far, whether one call or several brought them."""
    ids = tiny.tokens(2, 48)
    last = []
    plain = ls.select.Method.select

    def watch(self, prompt):
        found = plain(self, prompt)
        last.append((int(prompt.length[0]), found.columns.sort(-1).values))
        return found

    monkeypatch.setattr(ls.select.Method, "select", watch)
    more = {
        "whole": {},
        "chunks": {"prefill_chunk_size": 16},
        "static": {"cache_implementation": "static"},
    }[cache]
    with ls.hf.prefill(llama, SPARSE, dense_below=0):
        llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            **more,
        )
    lengths = [length for length, _ in last]
    assert lengths == ([16, 16, 32, 32, 48, 48] if cache == "chunks" else [48, 48])
    norms = llama.get_input_embeddings()(ids).norm(dim=-1)
    for length, columns in last:
        wanted = norms[:, :length].topk(5).indices.sort(-1).values
        assert torch.equal(columns, wanted[:, None].expand_as(columns))


def test_what_is_not_known_is_refused(llama, tiny):
    ids = tiny.tokens(1, 40)
    with torch.no_grad():
        first = llama(ids[:, :16], use_cache=True)
        with (
            ls.hf.prefill(llama, SPARSE, dense_below=0),
            pytest.raises(Refusal, match="Of 40 rows, the norms of 24 embeddings are known"),
        ):
            llama(ids[:, 16:], past_key_values=first.past_key_values)
        cache = ls.kv.cache(llama, TEXT)
        llama(ids, past_key_values=cache)
        ls.hf.remove(llama)
        ls.hf.apply(llama, ls.Causal())
        with pytest.raises(Refusal, match="not known"):
            llama(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("kind", "change", "given"),
    [
        ("dynamic", "reorder_cache", torch.tensor([1, 0])),
        ("dynamic", "batch_select_indices", torch.tensor([1, 1])),
        ("dynamic", "crop", -4),
        ("static", "reorder_cache", torch.tensor([1, 0])),
    ],
)
def test_rows_that_change_between_two_chunks_are_refused(kind, change, given, llama, tiny):
    """The second chunk chose by the norms of the rows that were there before."""
    ids = tiny.tokens(2, 40)
    caches = [
        transformers.DynamicCache(config=llama.config)
        if kind == "dynamic"
        else transformers.StaticCache(config=llama.config, max_cache_len=48)
        for _ in range(2)
    ]
    with ls.hf.prefill(llama, SPARSE, dense_below=0), torch.no_grad():
        for cache in caches:
            llama(ids[:, :24], past_key_values=cache)
        getattr(caches[0], change)(given)
        with pytest.raises(Refusal, match="no rows of the cache changed in between"):
            llama(ids[:, 24:40], past_key_values=caches[0])
        llama(ids[:, 24:40], past_key_values=caches[1])


@pytest.mark.parametrize("kind", ["dynamic", "policy"])
def test_a_cache_that_nobody_holds_is_gone(kind, llama, tiny):
    """The model held the last one, with all its keys, until the next call."""
    if kind == "dynamic":
        ls.hf.prefill(llama, SPARSE, dense_below=0)
        cache = transformers.DynamicCache(config=llama.config)
    else:
        cache = ls.kv.cache(llama, TEXT)
    with torch.no_grad():
        llama(tiny.tokens(1, 40), past_key_values=cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_hooks_go_with_the_pattern_and_survive_copies(llama, tiny):
    ids = tiny.tokens(1, 40)
    ls.hf.prefill(llama, SPARSE, dense_below=0)
    with torch.no_grad():
        wanted = llama(ids).logits
        for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
            assert torch.equal(other(ids).logits, wanted)
            ls.hf.remove(other)
            assert not other.get_input_embeddings()._forward_hooks
    assert llama.get_input_embeddings()._forward_hooks
    ls.hf.remove(llama)
    for module in llama.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_threads_that_share_a_model_keep_apart(llama, tiny):
    """A prompt waits behind its embedding until another thread has read one of the same size."""
    ids = [tiny.tokens(1, 30, seed=seed) for seed in (1, 2)]
    caches = [ls.kv.cache(llama, TEXT) for _ in ids]
    waits, read = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is first:
            waits.set()
            assert read.wait(60)

    def run(index):
        with torch.no_grad():
            llama(ids[index], past_key_values=caches[index])

    first = threading.Thread(target=run, args=(0,))
    with llama.model.layers[0].register_forward_pre_hook(wait):
        first.start()
        assert waits.wait(60)
        run(1)
        read.set()
        first.join()
    for index, cache in enumerate(caches):
        with torch.no_grad():
            wanted = sorted({0, *longest(llama, ids[index][0], 1)[:6], 27, 28, 29})
        assert cache.layers[0].positions[0, 0].tolist() == wanted


def test_a_copied_model_does_not_forget_for_the_first(llama, tiny):
    ids = tiny.tokens(1, 48)
    ls.hf.prefill(llama, SPARSE, dense_below=0)
    with torch.no_grad():
        wanted, held = (transformers.DynamicCache(config=llama.config) for _ in range(2))
        for cache in (wanted, held):
            llama(ids[:, :24], past_key_values=cache)
        other = copy.deepcopy(llama)
        other(tiny.tokens(1, 24, seed=3))
        ls.hf.remove(other)
        found = llama(ids[:, 24:], past_key_values=held).logits
        assert torch.equal(found, llama(ids[:, 24:], past_key_values=wanted).logits)
    assert llama.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_prompts_choose_by_their_own_norms(reentrant, llama, tiny):
    """Two forward passes of one size before the first backward pass."""
    ids = [tiny.tokens(1, 40, seed=seed) for seed in (1, 2)]
    ls.hf.prefill(llama, SPARSE, dense_below=0)
    llama.train()

    def gradients(together):
        llama.zero_grad()
        if together:
            for loss in [llama(x, labels=x, use_cache=False).loss for x in ids]:
                loss.backward()
        else:
            for x in ids:
                llama(x, labels=x, use_cache=False).loss.backward()
        return {name: p.grad for name, p in llama.named_parameters() if p.grad is not None}

    llama.enable_input_require_grads()
    wanted = gradients(together=False)
    ls.hf.recompute_layers(llama, reentrant=reentrant)
    found = gradients(together=True)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
