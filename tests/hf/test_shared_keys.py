"""Layers that read the keys of an earlier layer, and layers that read their own keys twice."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tests.hf.conftest import COMMON, HEADS

import longspan as ls
from longspan.errors import Refusal
from longspan.hf.routes import routed
from longspan.hf.rows import Rows

SHARING = {
    "Gemma3n": {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 97},
    "Gemma4": {
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 97,
        "global_head_dim": 8,
    },
}


@pytest.fixture(params=[name for name in SHARING if hasattr(transformers, f"{name}TextConfig")])
def sharing(request):
    """Four layers, the last two of which read the keys of the first two."""
    name = request.param
    config = getattr(transformers, f"{name}TextConfig")(
        **{**COMMON, **SHARING[name], "num_hidden_layers": 4, "intermediate_size": 48},
        sliding_window=10,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_layers_for_the_wanted_logits_alone_equal_all_rows(sharing, tiny, keep):
    """Gemma 4 takes the last rows of its mask there."""
    ids, mask = tiny.tokens(2, 29), torch.ones(2, 29, dtype=torch.int64)
    mask[1, :6] = 0
    pattern = ls.PerLayer(ls.Window(7), ls.Window(5) | ls.Sink(2), ls.Chunk(6), ls.Window(3))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    eager = copy.deepcopy(sharing)
    eager.set_attn_implementation("eager")
    for layer, (_, module) in enumerate(routed(eager)):
        own = ls.Causal() if layer % 2 else ls.Window(10)
        seen = torch.from_numpy((pattern.at_layer(layer) & own).mask(29, heads=HEADS))
        seen = torch.stack([seen[:, at][..., at] for at in places])
        seen = (seen & mask[:, None, None].bool()) | torch.eye(29, dtype=torch.bool)
        bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)

        def masked(_, args, kwargs, bias=bias):
            return args, {**kwargs, "attention_mask": bias}

        module.register_forward_pre_hook(masked, with_kwargs=True)
    options = {"attention_mask": mask, "position_ids": places, "use_cache": False}
    with torch.no_grad():
        # What it collects keeps it from leaving rows out.
        expected = eager(ids, output_hidden_states=True, **options).logits[:, -keep:]
        ls.hf.apply(sharing, pattern)
        got = sharing(ids, logits_to_keep=keep, **options).logits
    real = mask.bool()[:, -keep:]
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_full_forwards(sharing, tiny, cache):
    ids = tiny.tokens(1, 20)
    options = {"do_sample": False, "cache_implementation": cache, "disable_compile": True}
    with torch.no_grad(), ls.hf.apply(sharing, "window(5) | sink(2)"):
        found, expected = sharing.generate(ids, max_new_tokens=8, **options), ids
        for _ in range(8):
            step = sharing(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, step], 1)
    assert torch.equal(found, expected)


def test_packed_documents_equal_each_document_alone(sharing, tiny):
    """The record of the last rows of packed documents has segments, and no positions."""
    ids = tiny.tokens(1, 29)
    places = torch.cat([torch.arange(12), torch.arange(17)])[None]
    with torch.no_grad(), ls.hf.apply(sharing, "window(5) | sink(2)"):
        got = sharing(ids, position_ids=places, use_cache=False, logits_to_keep=3).logits
        alone = sharing(ids[:, 12:], use_cache=False).logits[:, -3:]
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)


def test_a_policy_is_refused(sharing):
    with pytest.raises(Refusal, match=r"last 2 layers of .* read the keys of earlier ones"):
        ls.kv.cache(sharing, "sinks(2) + recent(4)")
    assert not sharing.config._attn_implementation.startswith("longspan")


def test_keys_that_are_read_twice_are_refused_by_a_policy(tiny):
    """DiffLlama attends twice to one set of keys: a cache took the second for later tokens."""
    torch.manual_seed(0)
    model = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**COMMON)).eval()
    ids = tiny.tokens(1, 12)
    with torch.no_grad():
        expected = model(ids).logits
        cache = ls.kv.cache(model, "recent(1000)")
        with pytest.raises(Refusal, match="attends twice to the same keys"):
            model(ids, past_key_values=cache)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index", [0, (slice(None), slice(2), slice(None)), "first", "some"])
def test_other_parts_of_the_record_are_refused(index):
    rows = Rows(attention="x", queries=5, keys=5, query_start=0, key_start=0, own=ls.Causal())
    whole = slice(None)
    taken = {"first": slice(2), "some": slice(0, 5, 2)}
    index = (whole, whole, taken[index], whole) if isinstance(index, str) else index
    with pytest.raises(Refusal, match=r"takes .* of its attention mask"):
        rows[index]
