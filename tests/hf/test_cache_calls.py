"""A cache with a policy under ``generate``: padding, beams, chunks, early ends, several calls."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.hf.caches import PAD, POLICIES, feed, padded  # noqa: E402

import longspan as ls  # noqa: E402
from longspan.errors import InputError, Refusal  # noqa: E402


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("text", [POLICIES[0], POLICIES[3], POLICIES[6]])
def test_a_padded_row_equals_the_same_row_alone(family, text, tiny):
    model = tiny.build(family, max_position_embeddings=256)
    ids, mask = padded(tiny, 24)
    options = {"max_new_tokens": 12, "do_sample": False}
    both = model.generate(
        ids, attention_mask=mask, past_key_values=ls.kv.cache(model, text), **options
    )
    for row, pad in ((0, 0), (1, PAD)):
        alone = model.generate(
            ids[row : row + 1, pad:],
            attention_mask=mask[row : row + 1, pad:],
            past_key_values=ls.kv.cache(model, text),
            **options,
        )
        assert torch.equal(alone[0], both[row, pad:])


@pytest.mark.parametrize(
    "text", [POLICIES[0], POLICIES[2], POLICIES[4], POLICIES[9], "quest(16, 4, 0)"]
)
def test_beams_carry_everything_along(text, llama, tiny):
    """Rows reordered in the middle equal a batch that was in that order from the beginning."""
    ids, mask = padded(tiny, 30)
    order = torch.tensor([1, 0, 1])
    cache = ls.kv.cache(llama, text)
    feed(llama, ids[:, :22], mask[:, :22], [18, 19, 20, 21, 22], cache)
    cache.reorder_cache(order[:2])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 1]))
    cuts = range(1, 9)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    other = ls.kv.cache(llama, text)
    expected = feed(llama, ids[order], mask[order], [18, *range(19, 31)], other)[:, 22:]
    got = []
    with torch.no_grad():
        for step in cuts:
            at = slice(21 + step, 22 + step)
            out = llama(
                ids[order][:, at],
                attention_mask=mask[order][:, : 22 + step],
                position_ids=places[order][:, at],
                past_key_values=cache,
            )
            got.append(out.logits)
    assert (torch.cat(got, 1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("text", ["everything()", POLICIES[0]])
def test_beam_search_runs(text, llama, tiny):
    ids, mask = padded(tiny, 24)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    got = llama.generate(
        ids, attention_mask=mask, past_key_values=ls.kv.cache(llama, text), **options
    )
    if text == "everything()":
        assert torch.equal(got, llama.generate(ids, attention_mask=mask, **options))
    # A beam of one is greedy search through the same cache.
    options["num_beams"] = 1
    greedy = llama.generate(
        ids, attention_mask=mask, past_key_values=ls.kv.cache(llama, text), **options
    )
    assert got.shape == greedy.shape


@pytest.mark.parametrize(
    "text", [POLICIES[3], POLICIES[6], POLICIES[9], "after_prefill(heavy(6))"]
)
def test_a_prompt_in_chunks_keeps_what_a_whole_prompt_keeps(text, llama, tiny):
    ids, mask = padded(tiny, 50)
    caches = []
    for cuts in ([49, 50], [17, 34, 49, 50]):
        caches.append(ls.kv.cache(llama, text))
        feed(llama, ids, mask, cuts, caches[-1])
    for whole, pieces in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(whole.positions, pieces.positions)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    once = llama.generate(ids, past_key_values=ls.kv.cache(llama, text), **options)
    chunked = llama.generate(
        ids, past_key_values=ls.kv.cache(llama, text), prefill_chunk_size=16, **options
    )
    assert torch.equal(once, chunked)


def test_early_stop_does_not_touch_the_other_row(llama, tiny):
    ids, mask = padded(tiny, 24)
    text = POLICIES[0]
    options = {"max_new_tokens": 12, "do_sample": False}
    free = llama.generate(
        ids, attention_mask=mask, past_key_values=ls.kv.cache(llama, text), **options
    )
    stop = int(free[0, 26])
    stopped = llama.generate(
        ids,
        attention_mask=mask,
        past_key_values=ls.kv.cache(llama, text),
        eos_token_id=stop,
        **options,
    )
    other = free[1, 24:].tolist()
    end = other.index(stop) + 1 if stop in other else len(other)
    assert stopped[1, 24 : 24 + end].tolist() == other[:end]


def test_a_second_generate_goes_on(llama, tiny):
    ids = tiny.tokens(1, 20)
    options = {"max_new_tokens": 6, "do_sample": False}
    cache = ls.kv.cache(llama, "everything()")
    first = llama.generate(ids, past_key_values=cache, **options)
    second = torch.cat([first, tiny.tokens(1, 7, seed=5)], 1)
    got = llama.generate(second, past_key_values=cache, **options)
    assert torch.equal(got, llama.generate(second, **options))
    small = ls.kv.cache(llama, POLICIES[0])
    first = llama.generate(ids, past_key_values=small, **options)
    llama.generate(
        torch.cat([first, tiny.tokens(1, 7, seed=5)], 1), past_key_values=small, **options
    )
    assert small.get_seq_length() == 20 + 6 + 7 + 5
    assert small.report().layers[0].most == 11
    small.reset()
    assert torch.equal(llama.generate(ids, past_key_values=small, **options), first)


def test_another_model_is_refused_and_its_own_goes_on(llama, tiny):
    ids = tiny.tokens(1, 40)
    plain = copy.deepcopy(llama)
    cache, wanted = (ls.kv.cache(llama, "sinks(2) + recent(8)") for _ in range(2))
    twin = copy.deepcopy(llama)
    with torch.no_grad():
        for one in (cache, wanted):
            llama(ids[:, :30], past_key_values=one)
        with pytest.raises(Refusal, match="another model than that of the LlamaAttention"):
            twin(ids[:, 30:31], past_key_values=cache)
        # Its attention is not longspan's: noticed in the second layer of the first call.
        with pytest.raises(Refusal, match="read by longspan's attention"):
            plain(ids[:, 30:31], past_key_values=cache)
        found, expected = (
            llama(ids[:, 30:], past_key_values=one).logits for one in (cache, wanted)
        )
    assert torch.equal(found, expected)
    assert cache.report() == wanted.report()


@pytest.mark.parametrize("text", [POLICIES[0], POLICIES[9], "quest(48, 16, 0)"])
def test_a_cache_filled_in_inference_mode_goes_on_outside(text, llama, tiny):
    ids, mask = tiny.tokens(1, 60), torch.ones(1, 60, dtype=torch.int64)
    cuts = [50, 51, 52, 55, 60]
    wanted = feed(llama, ids, mask, cuts, ls.kv.cache(llama, text))
    cache = ls.kv.cache(llama, text)
    with torch.inference_mode():
        feed(llama, ids, mask, cuts[:2], cache)
    with torch.no_grad():
        rest = [
            llama(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in pairwise(cuts[1:])
        ]
    assert (torch.cat(rest, 1) - wanted[:, 51:]).abs().max() < 1e-5


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("text", ["everything()", *POLICIES[3:7:3], POLICIES[5]])
def test_what_a_row_was_fed_after_its_end_is_gone_in_the_next_turn(text, positions, llama, tiny):
    """generate() marks as tokens what a finished row is fed; the next mask says what it was."""
    ids, mask = padded(tiny, 34)
    # The second row ends after 24 rows; three more are fed to it.
    told = mask.clone()
    told[1, 24:27] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0), (told.cumsum(1) - 1).clamp(min=0)
    cache = ls.kv.cache(llama, text, positions=positions)
    alone = ls.kv.cache(llama, text, positions=positions)
    with torch.no_grad():
        for begin, end in ((0, 18), *((i, i + 1) for i in range(18, 27)), (27, 33), (33, 34)):
            stated, at = (mask, places[0]) if end <= 27 else (told, places[1])
            out = llama(
                ids[:, begin:end],
                attention_mask=stated[:, :end],
                position_ids=at[:, begin:end],
                past_key_values=cache,
            ).logits
            if begin in range(24, 27):
                continue
            one = llama(ids[1:, max(begin, PAD) : end], past_key_values=alone).logits
            assert (out[1, -one.shape[1] :] - one[0]).abs().max() < 1e-5
    held, wanted = cache.layers[0].store, alone.layers[0].store
    assert torch.equal(held.length[1], wanted.length[0])


@pytest.mark.parametrize("text", [*POLICIES[:2], POLICIES[5], POLICIES[9], "quest(32, 4, 0)"])
def test_one_row_of_a_mask_stands_for_the_batch(text, llama, tiny):
    ids, mask = tiny.tokens(2, 34), torch.ones(1, 34, dtype=torch.int64)
    mask[0, :PAD] = 0
    got = []
    for given in (mask, mask.expand(2, -1)):
        told, cache = given.clone(), ls.kv.cache(llama, text)
        logits = []
        with torch.no_grad():
            for begin, end in ((0, 18), *((i, i + 1) for i in range(18, 27)), (27, 33)):
                if begin == 27:
                    # What the rows were fed last was padding.
                    told[:, 25:27] = 0
                out = llama(ids[:, begin:end], attention_mask=told[:, :end], past_key_values=cache)
                logits.append(out.logits)
            cache.batch_select_indices(torch.tensor([1]))
            out = llama(ids[1:, 33:], attention_mask=told[:1], past_key_values=cache)
        got.append([torch.cat(logits, 1)[:, PAD:], out.logits])
    for one, other in zip(*got, strict=True):
        assert torch.equal(one, other)


def test_a_mask_that_contradicts_the_calls_before_is_refused(llama, tiny):
    ids, mask = padded(tiny, 24)
    cache = ls.kv.cache(llama, "recent(7)")
    with torch.no_grad():
        llama(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        for changed in (torch.ones_like(mask), mask.index_fill(1, torch.tensor([9]), 0)):
            with pytest.raises(InputError, match="earlier calls"):
                llama(ids[:, 20:], attention_mask=changed, past_key_values=cache)
            cache.reset()
            llama(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("text", [POLICIES[0], POLICIES[9], POLICIES[10], "everything()"])
def test_a_cache_is_copied_but_not_pickled(text, positions, llama, tiny):
    ids = tiny.tokens(1, 30)
    cache = ls.kv.cache(llama, text, positions=positions)
    for _ in range(2):
        for write in (pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())):
            with pytest.raises(Refusal, match=r"cannot be pickled: .* copy.deepcopy\(cache\)"):
                write(cache)
        other = copy.deepcopy(cache)
        with torch.no_grad():
            found = [llama(ids, past_key_values=held).logits for held in (cache, other)]
        assert torch.equal(*found)
        assert cache.report() == other.report()


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("text", [POLICIES[0], POLICIES[3], POLICIES[5], "snapkv(6, 4, 3)"])
def test_padding_between_two_prompts_is_absent(text, positions, llama, tiny):
    """Packed keys lay one place too far back, and observed queries were pushed out by padding."""
    ids = tiny.tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.int64)
    # The second row's prompts have 14, 2 and 3 tokens, with padding on either side of the first.
    mask[1, [0, 1, *range(16, 18), *range(18, 23), *range(25, 33)]] = 0
    cuts = [18, 25, 36, 37, 38, 39, 40]
    cache = ls.kv.cache(llama, text, positions=positions)
    found = feed(llama, ids, mask, cuts, cache)
    real = mask[1].bool()
    alone = ls.kv.cache(llama, text, positions=positions)
    own = torch.cumsum(mask[1], 0)[torch.tensor(cuts) - 1].tolist()
    expected = feed(llama, ids[1:, real], mask[1:, real], own, alone)
    torch.testing.assert_close(found[1:, real], expected, atol=1e-5, rtol=1e-5)
    for both, single in zip(cache.layers, alone.layers, strict=True):
        kept = [[head[head >= 0].tolist() for head in one.positions[-1]] for one in (both, single)]
        assert kept[0] == kept[1]
