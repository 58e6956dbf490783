"""A cache with a policy in real models: equal to dense attention over the same kept tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.hf.caches import PAD, POLICIES, Watch, feed, oracle, padded  # noqa: E402

import longspan as ls  # noqa: E402

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
    model = tiny.build("gpt-oss", initializer_range=0.2)
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
