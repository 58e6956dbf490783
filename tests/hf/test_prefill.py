"""Sparse prefill in models: against masked eager attention, under generate, and its refusals."""

from __future__ import annotations

import pytest
import torch

import longspan as ls
from longspan.errors import InputError, PolicyError, Refusal
from longspan.hf import prefill as public
from longspan.hf.sparse_prefill import Prefilled
from longspan.select import measure

TEXTS = (
    "vertical_slash(5, 6, probe=8, first=2, last=3, block=8)",
    "block_topk(3, block=8) + every(11)",
    "flex_prefill(0.5, 0.2, least=2, block=8)",
    "xattention(0.5, stride=4, block=8)",
)
EVERYTHING = "block_topk(1.0, block=8)"


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_budget_for_everything_changes_nothing(tiny, family):
    model, ids = tiny.build(family), tiny.tokens(2, 41)
    before = logits(model, ids)
    with public(model, EVERYTHING, dense_below=0, report=True) as applied:
        torch.testing.assert_close(logits(model, ids), before, atol=2e-5, rtol=0)
    # Gemma's first layer has a window of its own and attends exactly.
    assert {row["layer"] for row in applied.report()} == ({1} if family == "gemma3" else {0, 1})
    assert all(abs(row["density"] - 1) < 1e-9 for row in applied.report())
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("text", TEXTS)
def test_layers_compute_attention_over_what_is_selected(tiny, text):
    """Each layer's output is that of ``select.prefill`` on the queries and keys it was given."""
    model, ids = tiny.build("qwen3"), tiny.tokens(2, 45)
    attention = torch.ones_like(ids)
    attention[0, :13] = 0
    seen = []
    with public(model, text, dense_below=0, report=True) as applied:
        plain = Prefilled.attend

        def watch(self, module, rows, q, k, v, scaling):
            out, lse = plain(self, module, rows, q, k, v, scaling)
            seen.append((q, k, v, out, scaling))
            return out, lse

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Prefilled, "attend", watch)
            logits(model, ids, attention_mask=attention)
    assert len(seen) == 2
    for q, k, v, out, scale in seen:
        wanted = ls.select.prefill(q, k, v, text, mask=attention, scale=scale)
        torch.testing.assert_close(out, wanted, atol=1e-6, rtol=0)
    report = applied.report()
    assert [row["layer"] for row in report] == [0, 1]
    assert all(0.1 < row["density"] < 1 for row in report)
    assert all(row["worst"] <= row["recall"] <= 1 + 1e-6 for row in report)


@pytest.mark.parametrize("text", TEXTS)
def test_a_left_padded_row_generates_what_it_does_alone(tiny, text):
    model = tiny.build("llama")
    ids, attention = tiny.tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    ids[1, :9], attention[1, :9] = 0, 0
    steps = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with public(model, text, dense_below=0):
        both = model.generate(ids, attention_mask=attention, **steps)
        alone = model.generate(ids[1:, 9:], attention_mask=attention[1:, 9:], **steps)
    assert both[1, 40:].tolist() == alone[0, 31:].tolist()


def test_decoding_is_exact_over_the_whole_cache(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, 40)
    with public(model, TEXTS[0], dense_below=0, report=True) as applied, torch.no_grad():
        first = model(ids, use_cache=True)
        noted = len(applied.report())
        step = model(ids[:, :1], past_key_values=first.past_key_values).logits
        assert len(applied.report()) == noted == 2
        kept = first.past_key_values
    # The same cache, one token shorter, read by the model's own attention.
    kept.crop(-1) if _takes_negative(kept) else kept.crop(40)
    with torch.no_grad():
        wanted = model(ids[:, :1], past_key_values=kept).logits
    torch.testing.assert_close(step, wanted, atol=2e-5, rtol=0)


def _takes_negative(cache):
    import inspect

    return "tokens_to_remove" in inspect.signature(type(cache).crop).parameters


def test_chunks_of_whole_blocks_give_what_the_whole_prompt_gives(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, 48)
    with public(model, "xattention(0.6, stride=4, block=8)", dense_below=0), torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :24], use_cache=True)
        second = model(ids[:, 24:], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(found, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_give_the_same_text(tiny, cache):
    model, ids = tiny.build("llama"), tiny.tokens(1, 40)
    steps = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    more = {} if cache == "dynamic" else {"cache_implementation": "static"}
    with public(model, TEXTS[1], dense_below=0):
        with torch.no_grad():
            first = model(ids).logits[0, -1].argmax()
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **steps, **more)
    assert text[0, 40] == first


def test_a_cache_policy_goes_with_it(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, 40)
    steps = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    with public(model, EVERYTHING, dense_below=0, report=True) as applied:
        cache = ls.kv.cache(model, "sinks(2) + recent(4) + snapkv(6, window=4)")
        sparse = model.generate(ids, attention_mask=mask, past_key_values=cache, **steps)
        assert len(applied.report()) == 2
        assert cache.report().layers[0].most < 40
    with ls.hf.apply(model, "causal()"):
        cache = ls.kv.cache(model, "sinks(2) + recent(4) + snapkv(6, window=4)")
        dense = model.generate(ids, attention_mask=mask, past_key_values=cache, **steps)
    assert torch.equal(sparse, dense)


def test_short_prompts_and_packed_documents_attend_exactly(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, 40)
    before = logits(model, ids)
    with public(model, TEXTS[0], dense_below=41, report=True) as applied:
        torch.testing.assert_close(logits(model, ids), before, atol=2e-5, rtol=0)
        assert applied.report() == []
    place = torch.cat([torch.arange(25), torch.arange(15)])[None]
    packed = logits(model, ids, position_ids=place, use_cache=False)
    with public(model, TEXTS[0], dense_below=0, report=True) as applied:
        found = logits(model, ids, position_ids=place, use_cache=False)
        assert applied.report() == []
    torch.testing.assert_close(found, packed, atol=2e-5, rtol=0)


def test_the_length_from_which_it_pays_is_measured_when_it_is_needed(tiny, monkeypatch):
    model = tiny.build("llama", max_position_embeddings=2048)
    asked = []
    monkeypatch.setattr(
        "longspan.hf.sparse_prefill.break_even", lambda *what, **sizes: asked.append(sizes) or 1500
    )
    with public(model, "sinks(4) + recent(64)", report=True) as applied:
        logits(model, tiny.tokens(1, 300))
        assert not asked
        assert applied.dense_below is None
        logits(model, tiny.tokens(1, 1100))
        assert applied.report() == []
        logits(model, tiny.tokens(1, 1600))
        assert len(applied.report()) == 2
        assert applied.dense_below == 1500
    assert public(model, "sinks(4)", dense_below=7).dense_below == 7
    assert asked[0] | {"device": None} == {
        "heads": 4,
        "kv_heads": 2,
        "width": 8,
        "dtype": torch.float32,
        "device": None,
    }
    assert measure.SHORTEST == 1024


def test_it_is_put_in_and_taken_out(tiny):
    model = tiny.build("llama")
    first = public(model, TEXTS[0], dense_below=0, report=True)
    second = public(model, TEXTS[1], dense_below=0)
    assert "block_topk" in str(second.pattern)
    logits(model, tiny.tokens(1, 40))
    # The first one watches no more.
    assert first.report() == []
    with pytest.raises(InputError, match="Nothing was noted"):
        second.report()
    ls.hf.remove(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_is_refused(tiny):
    model = tiny.build("llama")
    with pytest.raises(PolicyError, match="no prefill method is called 'window'"):
        public(model, "window(64)")
    with pytest.raises(InputError, match="dense_below"):
        public(model, TEXTS[0], dense_below=-1)
    with pytest.raises(InputError, match="number of tokens from 0, got '64'"):
        public(model, TEXTS[0], dense_below="64")
    with pytest.raises(Refusal, match="Unknown impl"):
        public(model, TEXTS[0], impl="fastest")
    assert model.config._attn_implementation == "sdpa"
    one, other = (Prefilled(method=ls.select.parse(text)) for text in TEXTS[:2])
    assert one != other
    assert one != ls.Causal()
