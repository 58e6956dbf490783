"""What a cache with a policy notes and reads: statistics, moments, packed positions, pages."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.hf.caches import PAD, feed, padded  # noqa: E402

import longspan as ls  # noqa: E402
from longspan.errors import Refusal  # noqa: E402
from longspan.hf.routes import routed  # noqa: E402


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


SCALED = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_packed_positions_use_the_frequencies_that_the_model_uses(kind, tiny):
    scaled = {"rope_type": kind, "rope_theta": 1e4, **SCALED[kind]}
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 256}
    model = tiny.build("llama", rope_parameters=scaled, **sizes)
    plain = tiny.build("llama", **sizes)
    own, default = (m.model.rotary_emb.inv_freq for m in (model, plain))
    assert not torch.allclose(own, default)
    ids = tiny.tokens(1, 40)
    cache = ls.kv.cache(model, "sinks(3) + recent(6)", positions="packed")
    got = feed(model, ids, torch.ones_like(ids), [30, *range(31, 41)], cache)
    for end in (32, 40):
        short = torch.cat([ids[:, :3], ids[:, end - 7 : end]], 1)
        with torch.no_grad():
            expected = model(short, use_cache=False).logits[:, -1]
        assert (got[:, end - 1] - expected).abs().max() < 1e-5


def test_frequencies_that_change_with_the_length_are_refused(tiny):
    changing = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny.build("llama", rope_parameters=changing)
    for policy, positions in (("recent(6)", "packed"), ("expected_attention(6)", "original")):
        with pytest.raises(Refusal, match="dynamic frequencies change with the length"):
            ls.kv.cache(model, policy, positions=positions)
    # Original positions turn nothing.
    ids = tiny.tokens(1, 12)
    cache = ls.kv.cache(model, "recent(6)")
    feed(model, ids, torch.ones_like(ids), [10, 11, 12], cache)
    assert cache.report().layers[0].most == 10


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
    reader = layer.held.reader
    grown, reader.bounds = reader.bounds, None
    reader._pages(layer.store, torch.randn(2, 4, 1, 8))
    assert torch.equal(grown.low, reader.bounds.low)
    assert torch.equal(grown.high, reader.bounds.high)
    first = ls.kv.cache(llama, "quest(24, 4, 2)")
    same = feed(llama, ids, mask, [50, *range(51, 61)], first)
    assert torch.allclose(same, expected, atol=1e-5)
