"""LoRA: what is trained, what is saved, and that a merged folder equals the adapter."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import longspan as ls
from longspan.errors import DataError, InputError

PATTERN = ls.Window(6) | ls.Sink(2)


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def trained(model, tokens, **options):
    """A PEFT model after two real steps."""
    torch.manual_seed(3)
    adapted = ls.hf.add_lora(model, rank=4, alpha=8, **options).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):
        ids = tokens(2, 29, seed=step)
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def test_default_targets_are_the_attention_projections(model):
    adapted = ls.hf.add_lora(model, rank=4, alpha=8)
    names = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".")[-4] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    # Two matrices for each of four projections in two layers.
    assert len(names) == 16


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_layers_elsewhere_with_the_name_of_a_projection_are_left_out(tiny):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    adapted = ls.hf.add_lora(GPT2LMHeadModel(config), rank=4, alpha=8)
    names = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".")[-5] for name in names} == {"attn"}
    # Two matrices for each of c_attn and c_proj in two layers.
    assert len(names) == 8


def test_embeddings_and_norms_are_trained_on_request(model):
    adapted = ls.hf.add_lora(model, rank=4, alpha=8, embeddings_and_norms=True)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("embed_tokens.modules_to_save" in name for name in names)
    base = adapted.get_base_model()
    norms = [
        name for name, part in base.named_modules() if type(part).__name__.endswith("RMSNorm")
    ]
    full = [name for name in names if ".modules_to_save." in name and "norm" in name]
    # Each norm is wrapped once; the walk above finds the original and its trained copy.
    assert len(full) == len(norms) // 2
    assert not any("mlp" in name or "lm_head" in name for name in names)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_adapter_and_merged_folder_equal_the_trained_model(tiny, tmp_path, family, full, tied):
    ids = tiny.tokens(2, 29, seed=7)
    model = tiny.build(family, tie_word_embeddings=tied)
    ls.hf.set_rope(model, "linear", 128)
    model.save_pretrained(tmp_path / "base")
    untouched = logits(model, ids)
    ls.hf.apply(model, PATTERN)
    adapted = trained(model, tiny.tokens, embeddings_and_norms=full)
    expected = logits(adapted, ids)
    assert (expected - untouched).abs().max() > 0.01
    ls.hf.save_adapter(adapted, tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ls.hf.apply(base, PATTERN)
    loaded = ls.hf.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), expected)
    assert not any(p.requires_grad for p in loaded.parameters())

    merged = ls.hf.merge_and_save(adapted, None, tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids), expected, atol=2e-5, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ls.hf.apply(plain, PATTERN)
    torch.testing.assert_close(logits(plain, ids), expected, atol=2e-5, rtol=1e-4)


def test_a_pattern_goes_through_the_peft_wrapper(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, 29)
    adapted = ls.hf.add_lora(model, rank=4, alpha=8).eval()
    before = logits(adapted, ids)
    expected = logits(tiny.oracle(model, PATTERN), ids)
    handle = ls.hf.apply(adapted, PATTERN)
    torch.testing.assert_close(logits(adapted, ids), expected, atol=1e-5, rtol=1e-5)
    assert ls.hf.inspect(adapted).routes
    handle.remove()
    assert torch.equal(logits(adapted, ids), before)


def test_training_continues_from_a_loaded_adapter(tiny, tmp_path):
    adapted = trained(tiny.build("llama"), tiny.tokens)
    ls.hf.save_adapter(adapted, tmp_path)
    loaded = ls.hf.load_adapter(tiny.build("llama"), tmp_path, trainable=True)
    names = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert len(names) == 16


def test_wrong_arguments(tiny):
    model = tiny.build("llama")
    with pytest.raises(InputError, match="at least 1, got 0"):
        ls.hf.add_lora(model, rank=0, alpha=8)
    with pytest.raises(InputError, match=r"named qq_proj.*k_proj, o_proj, q_proj, v_proj"):
        ls.hf.add_lora(model, rank=4, alpha=8, targets=["q_proj", "qq_proj"])
    adapted = ls.hf.add_lora(model, rank=4, alpha=8)
    for again in (adapted, model):
        with pytest.raises(InputError, match="has an adapter already"):
            ls.hf.add_lora(again, rank=4, alpha=8)


def test_models_without_attention_that_is_known_ask_for_targets():
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(InputError, match=r"no attention of the kind.*give targets"):
        ls.hf.add_lora(FalconForCausalLM(config), rank=4, alpha=8)


def test_targets_that_peft_misreads_are_said(tiny):
    from transformers import AfmoeConfig, AfmoeForCausalLM

    config = AfmoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_dense_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = AfmoeForCausalLM(config)
    with pytest.raises(InputError, match=r"self_attn.gate_proj.*fused into gate_up_proj.*Give"):
        ls.hf.add_lora(model, rank=4, alpha=8)
    ls.hf.add_lora(model, rank=4, alpha=8, targets=["q_proj", "k_proj", "v_proj", "o_proj"])


def test_folders_that_hold_no_fitting_adapter(tiny, tmp_path):
    with pytest.raises(DataError, match=r"adapter_config.json"):
        ls.hf.load_adapter(tiny.build("llama"), tmp_path)
    ls.hf.save_adapter(trained(tiny.build("llama"), tiny.tokens), tmp_path)
    wider = tiny.build("llama", hidden_size=64)
    with pytest.raises(DataError, match="does not fit"):
        ls.hf.load_adapter(wider, tmp_path)
    for changed, message in (
        ({"num_hidden_layers": 3}, r"does not fit.*layers\.2"),
        ({"num_hidden_layers": 1}, r"no place for 8 of its 16 tensors, first .*layers\.1"),
        ({"hidden_size": 64, "intermediate_size": 96}, r"does not fit"),
    ):
        model = tiny.build("llama", **changed)
        before = {name: (x, x.requires_grad) for name, x in model.named_parameters()}
        # A second try finds the model as it was, too.
        for _ in range(2):
            with pytest.raises(DataError, match=message):
                ls.hf.load_adapter(model, tmp_path)
            after = {name: (x, x.requires_grad) for name, x in model.named_parameters()}
            assert after.keys() == before.keys()
            assert all(
                x is y and a == b
                for (x, a), (y, b) in zip(after.values(), before.values(), strict=True)
            )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"{", "describes no adapter"),
        ("adapter_config.json", b"[]", "describes no adapter"),
        ("adapter_config.json", b"{}", "does not fit this model"),
        ("adapter_config.json", b'{"peft_type": "LORE"}', "describes no adapter"),
        ("adapter_model.safetensors", b"\x09", "does not fit this model"),
        ("adapter_model.safetensors", None, "no weights of an adapter"),
    ],
)
def test_damaged_adapters_are_said(tiny, tmp_path, name, content, message):
    ls.hf.save_adapter(trained(tiny.build("llama"), tiny.tokens), tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        ls.hf.load_adapter(tiny.build("llama"), tmp_path)
