"""Which models take a pattern, and what is said of those that do not."""

from __future__ import annotations

import pytest
import torch
import transformers

import longspan as ls
from longspan.errors import InputError, Refusal

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

REFUSED = {
    "gptj": (
        lambda: transformers.GPTJForCausalLM(
            transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=2, rotary_dim=4, vocab_size=97)
        ),
        r"GPTJAttention \(2 modules, first transformer.h.0.attn\) does not route",
    ),
    "bloom": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=97)
        ),
        r"BloomAttention \(1 modules, first transformer.h.0.self_attention\) does not route",
    ),
    "mamba": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=97)
        ),
        r"MambaMixer \(1 modules, first backbone.layers.0.mixer\) does not route",
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=97
            )
        ),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "gemma2": (
        lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL)),
        "caps its logits",
    ),
    "qwen3_next": (
        lambda: transformers.Qwen3NextForCausalLM(
            transformers.Qwen3NextConfig(
                **{**SMALL, "num_hidden_layers": 4},
                linear_num_value_heads=2,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                num_experts=2,
                num_experts_per_tok=1,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=8,
            )
        ),
        r"Qwen3NextGatedDeltaNet \(3 modules",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_route_are_refused_by_name(name):
    build, words = REFUSED[name]
    model = build()
    before = model.config._attn_implementation
    with pytest.raises(Refusal, match=words):
        ls.hf.apply(model, ls.Window(4))
    assert model.config._attn_implementation == before
    report = ls.hf.inspect(model)
    assert not report.routes
    assert report.reasons
    assert type(model).__name__ in str(report)


def test_a_model_that_routes_is_listed(model):
    report = ls.hf.inspect(model)
    assert report.routes
    assert report.reasons == ()
    assert [path for path, _, state in report.rows() if state == "routes"] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    assert len(report.rows()) == 2
    assert report.attention == model.config._attn_implementation
    ls.hf.apply(model, "window(4)")
    assert ls.hf.inspect(model).attention.endswith("= window(4) (impl auto)")


def test_gemma2_without_the_cap_takes_patterns(tiny):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SMALL, attn_logit_softcapping=None, sliding_window=8, query_pre_attn_scalar=8
    )
    model, ids = transformers.Gemma2ForCausalLM(config).eval(), tiny.tokens(2, 29)
    with torch.no_grad():
        expected = model(ids).logits
        ls.hf.apply(model, ls.Causal())
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["GPT2", "Phi3", "Qwen2", "StableLm", "OPT", "GPTNeoX"])
def test_other_families_route_too(tiny, name):
    """No family is known by name: whatever asks the interface is taken."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **({"ffn_dim": 48, "word_embed_proj_dim": 32} if name == "OPT" else {}),
        **({"num_key_value_heads": 4} if name in ("StableLm", "Qwen2") else {}),
    )
    torch.manual_seed(0)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model, ids = getattr(transformers, name + head)(config).eval(), tiny.tokens(2, 29)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        ls.hf.apply(model, ls.Causal())
        got = model(ids, attention_mask=mask).logits
        # GPT-2, OPT and StableLM do not tell their layers.
        with pytest.raises(InputError, match="Attention weights are never formed"):
            model(ids, attention_mask=mask, output_attentions=True)
        assert model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


def test_a_model_that_computes_with_its_mask_says_so(tiny):
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**SMALL))
    ls.hf.apply(model, ls.Causal())
    with pytest.raises(AttributeError, match="computes with its attention mask"):
        model(tiny.tokens(1, 9))


def test_masks_made_for_layers_that_do_not_exist_are_harmless(tiny):
    """Qwen2-MoE builds a mask with a window of 0 even where no layer slides."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        **SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8
    )
    model, ids = transformers.Qwen2MoeForCausalLM(config).eval(), tiny.tokens(2, 29)
    with torch.no_grad():
        expected = model(ids).logits
        ls.hf.apply(model, ls.Causal())
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_takes_two_sided_patterns(tiny):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model, ids = transformers.BertForMaskedLM(config).eval(), tiny.tokens(2, 29)
    mask = torch.ones_like(ids)
    mask[0, -7:] = 0
    real = mask.bool()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        ls.hf.apply(model, ls.Dense())
        got = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)
        ls.hf.apply(model, ls.Window(5, causal=False))
        near = model(ids, attention_mask=mask).logits
        changed = ids.clone()
        # Two layers of two steps each reach four tokens to either side.
        changed[:, 20] = (changed[:, 20] + 1) % 97
        far = model(changed, attention_mask=mask).logits
    assert torch.equal(near[:, :16], far[:, :16])
    assert not torch.equal(near[1, 16], far[1, 16])


CROSSING = {
    "Bart": {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 16}
    | {"decoder_attention_heads": 4, "max_position_embeddings": 32},
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    | {"add_cross_attention": True},
    "Bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    | {"intermediate_size": 16, "is_decoder": True, "add_cross_attention": True},
}


@pytest.mark.parametrize("name", CROSSING)
@pytest.mark.parametrize("rows", [12, 7])
def test_rows_of_an_encoder_are_refused(tiny, name, rows):
    """The pattern would hold between two texts: as many rows or other numbers of them."""
    config = getattr(transformers, f"{name}Config")(vocab_size=97, **CROSSING[name])
    head = {"GPT2": "GPT2LMHeadModel", "Bert": "BertLMHeadModel"}.get(name, f"{name}ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, head)(config).eval()
    ids, other = tiny.tokens(2, 12), torch.randn(2, rows, 32)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        ls.hf.apply(model, "causal()")
        got = model(ids, use_cache=False).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        for mask in (None, torch.ones(2, rows, dtype=torch.int64)):
            with pytest.raises(Refusal, match=r"cross-attention.* patterns speak of one sequence"):
                model(ids, encoder_hidden_states=other, encoder_attention_mask=mask)


def test_something_else_than_a_model_is_refused():
    with pytest.raises(InputError, match="Linear"):
        ls.hf.inspect(torch.nn.Linear(2, 2))
