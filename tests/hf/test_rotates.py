"""Layers without positions: found in every family that has them, and never turned."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.hf.caches import feed  # noqa: E402
from tests.hf.conftest import COMMON  # noqa: E402

import longspan as ls  # noqa: E402
from longspan.errors import Refusal  # noqa: E402
from longspan.hf.rotates import rotates  # noqa: E402
from longspan.hf.routes import routed  # noqa: E402

LAST_FULL = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
# Which layers rotate.
FAMILIES = {
    "Llama": ({}, [True, True]),
    "SmolLM3": ({"no_rope_layers": [1, 0]}, [True, False]),
    "Cohere2": (LAST_FULL, [True, False]),
    "Exaone4": (LAST_FULL, [True, False]),
    "Exaone4 all": ({"sliding_window": None, "layer_types": ["full_attention"] * 2}, [True, True]),
    "Cohere2Moe": ({**LAST_FULL, **EXPERTS}, [True, False]),
    "Afmoe": ({**LAST_FULL, **EXPERTS, "num_dense_layers": 2}, [True, False]),
}
HAVE = [name for name in FAMILIES if hasattr(transformers, f"{name.split()[0]}Config")]
NOPE = [name for name in HAVE if not FAMILIES[name][1][1]]


def build(name, **changes):
    kind = name.split()[0]
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **FAMILIES[name][0], **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", HAVE)
def test_rotates_says_what_forward_does(name):
    """Attention moves with the angles that it is handed, or it does not."""
    model = build(name)
    x = torch.randn(1, 5, 32)
    moved = []
    for _, module in routed(model):
        first, second = (
            module(
                x,
                position_embeddings=model.model.rotary_emb(x, torch.arange(5)[None] * step),
                attention_mask=None,
            )[0]
            for step in (1, 3)
        )
        moved.append(not torch.equal(first, second))
    assert moved == FAMILIES[name][1]
    assert [rotates(module) for _, module in routed(model)] == moved


@pytest.mark.parametrize("name", [name for name in NOPE if name != "SmolLM3"])
def test_packed_positions_change_nothing_where_nothing_rotates(name, tiny):
    """The sliding layers keep a cache of transformers'; the other one has no positions."""
    model, ids = build(name), tiny.tokens(1, 40)
    got = [
        feed(
            model,
            ids,
            torch.ones_like(ids),
            [30, *range(31, 41)],
            ls.kv.cache(model, "sinks(2) + recent(6)", positions=positions),
        )
        for positions in ("original", "packed")
    ]
    assert torch.equal(*got)


@pytest.mark.parametrize("policy", ["sinks(2) + recent(6)", "recent(3) + expected_attention(4)"])
def test_angles_that_nobody_uses_do_not_matter(policy, tiny):
    config, ids = {"layer_types": ["full_attention"] * 2}, tiny.tokens(1, 40)
    got = []
    for base in (1e4, 1e1):
        model = build(
            "Cohere2", **config, rope_parameters={"rope_type": "default", "rope_theta": base}
        )
        cache = ls.kv.cache(model, policy, positions="packed")
        got.append(feed(model, ids, torch.ones_like(ids), [30, *range(31, 41)], cache))
    assert torch.equal(*got)


def test_layers_with_and_without_positions_side_by_side(tiny):
    """The layer that rotates is packed, the other one is left alone."""
    model, ids = build("SmolLM3"), tiny.tokens(1, 40)
    caches = [
        ls.kv.cache(model, "sinks(2) + recent(6)", positions=positions)
        for positions in ("original", "packed")
    ]
    first, second = (feed(model, ids, torch.ones_like(ids), [30, 40], c) for c in caches)
    assert (first - second).abs().max() > 1e-4
    keys = [layer.view().keys for layer in caches[1].layers]
    assert not torch.equal(keys[0], caches[1].layers[0].keys)
    assert torch.equal(keys[1], caches[1].layers[1].keys)


@pytest.mark.parametrize("name", ["SmolLM3", "Cohere2", "Exaone4"])
def test_dual_chunk_refuses_layers_without_positions(name):
    none = {"layer_types": ["full_attention"] * 2}
    model = build(name, **({"no_rope_layers": [0, 0]} if name == "SmolLM3" else none))
    with pytest.raises(Refusal, match=r"layers\.0\.self_attn does not rotate its queries"):
        ls.hf.apply(model, ls.DualChunk(chunk=32, local=8))


def test_a_condition_on_more_than_the_module_is_not_guessed():
    model = build("Llama")
    kind = type(model.model.layers[0].self_attn)

    class LlamaAttention(kind):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            ALL_ATTENTION_FUNCTIONS = apply_rotary_pos_emb = None
            if attention_mask is not None:
                apply_rotary_pos_emb(ALL_ATTENTION_FUNCTIONS)

    LlamaAttention.__module__ = kind.__module__
    for layer in model.model.layers:
        layer.self_attn.__class__ = LlamaAttention
    assert rotates(model.model.layers[0].self_attn) is None
    with pytest.raises(Refusal, match="does not show whether it rotates"):
        ls.kv.cache(model, "recent(6)", positions="packed")
    LlamaAttention.__module__ = "a module that is not there"
    assert rotates(model.model.layers[0].self_attn) is None


def test_a_condition_on_the_angles_is_that_there_are_any():
    model = build("Llama")
    kind = type(model.model.layers[0].self_attn)

    class LlamaAttention(kind):
        def forward(self, hidden_states, position_embeddings=None, **kwargs):
            apply_rotary_pos_emb = None
            if position_embeddings is not None:
                apply_rotary_pos_emb()

    LlamaAttention.__module__ = kind.__module__
    model.model.layers[0].self_attn.__class__ = LlamaAttention
    assert rotates(model.model.layers[0].self_attn) is True
