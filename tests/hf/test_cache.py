"""A cache with a policy in real models: equal to dense attention over the same kept tokens."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import longspan as ls  # noqa: E402
from longspan.errors import InputError, PolicyError, Refusal  # noqa: E402
from longspan.hf._cache_layer import KeptLayer  # noqa: E402
from longspan.hf.routes import routed  # noqa: E402
from longspan.kv.store import SPARE  # noqa: E402

PAD = 5
POLICIES = [
    "sinks(2) + recent(4) + heavy(5)",
    "every(3, sinks(1) + recent(3) + heavy(coverage(0.7), true))",
    "sinks(1) + recent(2) + tova(6)",
    "sinks(2) + recent(0) + snapkv(6, 4, 3)",
    "each_step(sinks(2) + snapkv(6, 3) + recent(3))",
    "sinks(1) + recent(2) + pyramidkv(6, 3, 3, max)",
    "sinks(1) + recent(2) + adakv(snapkv(6, 4, 3, max), 0.3)",
    "recent(3) + keydiff(6)",
    "recent(0.3) + sinks(0) + keynorm(0.2)",
    "sinks(2) + recent(4) + expected_attention(6)",
    "recent(7)",
    "duo([[0.1, 0.9], [0.8, 0.2]], sinks=2, recent=5)",
    "sinks(2) + recent(4) + heavy(5) + keydiff(2)",
]


@pytest.fixture
def llama(tiny):
    return tiny.build("llama", max_position_embeddings=256)


def padded(tiny, n, pad=PAD):
    """Token ids and mask [2, n]; the second row begins with padding."""
    ids, mask = tiny.tokens(2, n), torch.ones(2, n, dtype=torch.int64)
    ids[1, :pad], mask[1, :pad] = 0, 0
    return ids, mask


def feed(model, ids, mask, cuts, cache):
    """Logits of the tokens fed in pieces [0:cuts[0]], [cuts[0]:cuts[1]], ... through a cache."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits, begin = [], 0
    with torch.no_grad():
        for end in cuts:
            out = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=places[:, begin:end],
                past_key_values=cache,
            )
            logits.append(out.logits)
            begin = end
    return torch.cat(logits, 1)


class Watch:
    """Notes which positions each layer of a cache holds when its queries look: the kept sets."""

    def __init__(self, monkeypatch):
        self.seen = {}
        attend = KeptLayer.attend

        def watched(layer, query, *rest):
            held = None if layer.store is None else layer.positions.cpu()
            self.seen.setdefault(layer.layer, []).append((query.shape[2], held))
            return attend(layer, query, *rest)

        monkeypatch.setattr(KeptLayer, "attend", watched)

    def mask(self, layer, heads, n, pads):
        """bool [B, H, n, n]: what the queries of a layer could see, in columns of the batch."""
        batch = len(pads)
        seen = torch.zeros(batch, heads, n, n, dtype=torch.bool)
        begin = 0
        for count, held in self.seen[layer]:
            new = torch.ones(count, count, dtype=torch.bool).tril()
            seen[:, :, begin : begin + count, begin : begin + count] = new
            if held is not None:
                share = heads // held.shape[1]
                for b in range(batch):
                    for h in range(heads):
                        own = held[b, h // share]
                        columns = own[own >= 0] + pads[b]
                        seen[b, h, begin : begin + count, columns] = True
            begin += count
        for b, pad in enumerate(pads):
            seen[b, :, :, :pad] = False
        # Rows of padding see themselves, as a softmax needs something.
        return seen | torch.eye(n, dtype=torch.bool)


def oracle(tiny, model, watch, ids, mask, pads):
    """Logits of one eager pass, every layer masked by what the cache held."""
    eager = copy.deepcopy(model)
    ls.hf.remove(eager)
    eager.set_attn_implementation("eager")
    n, kept = ids.shape[1], 0
    for layer, (_, module) in enumerate(routed(eager)):
        own = torch.from_numpy(tiny.own(model, layer).mask(n))
        if type(model.model.layers[layer].self_attn).__name__.startswith("Gemma") and (
            model.config.layer_types[layer] == "sliding_attention"
        ):
            seen = own[None].expand(2, 4, n, n).clone()
            for b, pad in enumerate(pads):
                seen[b, :, :, :pad] = False
            seen = seen | torch.eye(n, dtype=torch.bool)
        else:
            seen = watch.mask(kept, 4, n, pads)
            kept += 1
        bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)

        def hook(_, args, kwargs, bias=bias):
            return args, {**kwargs, "attention_mask": bias}

        module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        return eager(ids, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits


# Gemma 3 has one layer that keeps everything, and two sets of frequencies.
CASES = [
    (family, text)
    for family, texts in {
        "llama": POLICIES,
        "qwen3": [POLICIES[0], POLICIES[6], POLICIES[9]],
        "gemma3": [POLICIES[0], POLICIES[4], POLICIES[5]],
    }.items()
    for text in texts
]


@pytest.mark.parametrize(("family", "text"), CASES)
def test_equals_dense_attention_over_the_kept_tokens(family, text, tiny, monkeypatch):
    model = tiny.build(family, max_position_embeddings=256)
    ids, mask = padded(tiny, 56)
    # A prompt in two pieces, single tokens, prompts shorter and longer than what is kept.
    cuts = [20, 24, *range(25, 29), 32, 33, 51, *range(52, 57)]
    cache = ls.kv.cache(model, text)
    watch = Watch(monkeypatch)
    got = feed(model, ids, mask, cuts, cache)
    expected = oracle(tiny, model, watch, ids, mask, [0, PAD])
    real = mask.bool()
    assert (got - expected)[real].abs().max() < 1e-5
    row = cache.report().layers[-1]
    assert row.tokens < 2 * (56 + 56 - PAD)
    assert cache.get_seq_length() == 56


@pytest.mark.parametrize("text", ["recent(9) + sinks(2)", "sinks(2) + recent(4) + heavy(5)"])
def test_the_applied_pattern_holds_over_kept_tokens(text, llama, tiny, monkeypatch):
    pattern = ls.parse("window(6) | sink(1)")
    ls.hf.apply(llama, pattern)
    ids, mask = padded(tiny, 30)
    cache = ls.kv.cache(llama, text)
    watch = Watch(monkeypatch)
    got = feed(llama, ids, mask, [18, 19, 20, 25, 26, 27, 28, 29, 30], cache)
    inner = watch.mask
    own = torch.from_numpy(pattern.mask(30, heads=4))

    def within(layer, heads, n, pads):
        seen = inner(layer, heads, n, pads)
        for b, pad in enumerate(pads):
            seen[b, :, pad:, pad:] &= own[:, : n - pad, : n - pad]
        return seen | torch.eye(n, dtype=torch.bool)

    monkeypatch.setattr(watch, "mask", within)
    expected = oracle(tiny, llama, watch, ids, mask, [0, PAD])
    assert (got - expected)[mask.bool()].abs().max() < 1e-5


@pytest.mark.parametrize(
    "text",
    [
        "everything()",
        "sinks(4) + recent(64) + heavy(256)",
        "tova(256)",
        "snapkv(1.0)",
        "adakv(256)",
        "pyramidkv(256)",
        "keydiff(256)",
        "expected_attention(256)",
        "quest(512)",
    ],
)
def test_a_budget_for_everything_is_no_policy(text, llama, tiny):
    ids, mask = padded(tiny, 24)
    plain = llama.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for positions in ("original",) if "quest" in text else ("original", "packed"):
        cache = ls.kv.cache(llama, text, positions=positions)
        got = llama.generate(
            ids, attention_mask=mask, max_new_tokens=10, do_sample=False, past_key_values=cache
        )
        assert torch.equal(got, plain)
        report = cache.report()
        assert (report.seen, report.layers[0].most, report.layers[0].least) == (33, 33, 33 - PAD)


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


def test_statistics_are_those_of_eager_attention(llama, tiny):
    ids, mask = padded(tiny, 30)
    eager = copy.deepcopy(llama)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        weights = eager(
            ids, attention_mask=mask, position_ids=places, output_attentions=True
        ).attentions
    cache = ls.kv.cache(llama, "recent(99) + heavy(99) + snapkv(99, 4)")
    feed(llama, ids, mask, [12, 29, 30], cache)
    for layer, weight in zip(cache.layers, weights, strict=True):
        view = layer.view()
        last, at = view.observed(4)
        assert at.tolist() == [[26, 27, 28, 29], [21, 22, 23, 24]]
        for row, pad in ((0, 0), (1, PAD)):
            own = weight[row, :, pad:, pad:]
            sums = own.sum(1).view(2, 2, -1).sum(1)
            length = 30 - pad
            assert torch.allclose(view.sums[row, :, :length], sums, atol=1e-5)
            assert torch.allclose(last[row, :, :length], own[:, -4:].sum(1), atol=1e-5)
        # Every query gives 1 to each of the group's heads.
        real = torch.tensor([30.0, 30.0 - PAD])
        assert torch.allclose(view.sums.sum(2), 2 * real[:, None].expand(2, 2), atol=1e-4)


def test_moments_are_those_of_queries_before_rotation(llama, tiny):
    ids = tiny.tokens(2, 20)
    plain = []
    for _, module in routed(llama):
        module.q_proj.register_forward_hook(lambda _, __, out: plain.append(out))
    cache = ls.kv.cache(llama, "expected_attention(99, sinks=3)")
    with torch.no_grad():
        llama(ids[:, :11], past_key_values=cache)
        llama(ids[:, 11:], past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        q = torch.cat(plain[index::2], 1).view(2, 20, 4, 8).transpose(1, 2)[:, :, 3:]
        moments = layer.view().moments
        assert moments.count.tolist() == [17, 17]
        assert torch.allclose(moments.first, q.sum(2), atol=1e-4)
        assert torch.allclose(moments.second, q.mT @ q, atol=1e-4)


def test_packed_positions_are_those_of_a_shorter_text(llama, tiny):
    """One layer, sinks and recent: as if the tokens in between had never been there."""
    model = tiny.build("llama", num_hidden_layers=1, max_position_embeddings=256)
    ids = tiny.tokens(1, 40)
    cache = ls.kv.cache(model, "sinks(3) + recent(6)", positions="packed")
    got = feed(model, ids, torch.ones_like(ids), [30, *range(31, 41)], cache)
    for end in range(32, 41):
        short = torch.cat([ids[:, :3], ids[:, end - 7 : end]], 1)
        with torch.no_grad():
            expected = model(short, use_cache=False).logits[:, -1]
        assert (got[:, end - 1] - expected).abs().max() < 1e-5
    more = feed(
        model,
        ids,
        torch.ones_like(ids),
        [30, 31, 36],
        ls.kv.cache(model, "sinks(3) + recent(6)", positions="packed"),
    )
    for end in range(32, 37):
        short = torch.cat([ids[:, :3], ids[:, 25:end]], 1)
        with torch.no_grad():
            expected = model(short, use_cache=False).logits[:, -1]
        assert (more[:, end - 1] - expected).abs().max() < 1e-5


def test_quest_reads_what_matters(llama, tiny):
    """A key that a query looks at almost alone is read however far back it is."""
    ids, mask = padded(tiny, 60)
    cache = ls.kv.cache(llama, "quest(24, 4, 0)")
    everything = ls.kv.cache(llama, "everything()")
    got = feed(llama, ids, mask, [50, *range(51, 61)], cache)
    expected = feed(llama, ids, mask, [50, *range(51, 61)], everything)
    assert torch.equal(got[:, :50], expected[:, :50])
    assert (got - expected)[:, 50:].abs().max() > 1e-4
    layer = cache.layers[0]
    assert layer.store.longest == 60
    # Bounds that grew by single tokens are those made anew.
    grown = layer._bounds
    layer._bounds = None
    layer._pages(torch.randn(2, 4, 1, 8))
    assert torch.equal(grown.low, layer._bounds.low)
    assert torch.equal(grown.high, layer._bounds.high)
    first = ls.kv.cache(llama, "quest(24, 4, 2)")
    same = feed(llama, ids, mask, [50, *range(51, 61)], first)
    assert torch.allclose(same, expected, atol=1e-5)


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
    ls.hf.apply(llama, ls.DualChunk(chunk=64, local=16))
    with pytest.raises(Refusal, match="in its own way"):
        ls.kv.cache(llama, "recent(3)")


def test_half_precision_and_autocast(tiny):
    model = tiny.build("llama", max_position_embeddings=256).to(torch.bfloat16)
    ids, mask = padded(tiny, 24)
    for text in (POLICIES[0], POLICIES[9], "quest(16, 4, 0)"):
        cache = ls.kv.cache(model, text)
        model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False
        )
        assert cache.layers[0].keys.dtype == torch.bfloat16
    wide = tiny.build("llama", max_position_embeddings=256)
    cache = ls.kv.cache(wide, POLICIES[0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wide(ids, past_key_values=cache)
        wide(ids[:, :1], past_key_values=cache)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert np.isfinite(cache.layers[0].values.float().numpy()).all()


def test_learned_sinks_take_their_share(tiny):
    """gpt-oss: a logit per head that takes weight and gives no value."""
    config = transformers.GptOssConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=10,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    model.set_attn_implementation("eager")
    ids, mask = padded(tiny, 24)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **options)
    for text in ("everything()", "heavy(200)", "quest(512)"):
        cache = ls.kv.cache(model, text)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("text", POLICIES)
def test_a_gpu_equals_dense_attention_over_what_it_kept(text, tiny, monkeypatch):
    model = tiny.build("llama", hidden_size=128, head_dim=32, max_position_embeddings=512).cuda()
    ids, mask = padded(tiny, 150)
    cuts = [100, 120, *range(121, 131), 140, *range(141, 151)]
    watch = Watch(monkeypatch)
    got = feed(model, ids.cuda(), mask.cuda(), cuts, ls.kv.cache(model, text)).cpu()
    expected = oracle(tiny, model.cpu(), watch, ids, mask, [0, PAD])
    real = mask.bool()
    assert (got - expected)[real].norm() / expected[real].norm() < 1e-2
