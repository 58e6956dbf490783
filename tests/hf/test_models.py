"""Loading local folders: what works, and one clear error for each thing that can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

import longspan as ls
from longspan.errors import DataError, InputError
from longspan.hf.build import build_llama, save_model, train_tokenizer
from longspan.hf.models import contents_hash


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer(["def f(x): return x"] * 3, 280)
    torch.manual_seed(0)
    model = build_llama(
        vocab_size=len(tokenizer),
        hidden=16,
        layers=1,
        heads=2,
        kv_heads=1,
        intermediate=16,
        context=32,
    )
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(saved, tmp_path / "model")


def test_a_saved_folder_loads(saved):
    model, tokenizer = ls.hf.load_model(saved)
    assert not model.training
    assert model.dtype == torch.float32
    ids = tokenizer("def f(x)", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    again, _ = ls.hf.load_model(str(saved), dtype="bfloat16", device="cpu")
    assert again.dtype == torch.bfloat16


def test_loading_and_saving_draw_no_bars_and_leave_the_switch(saved, tmp_path, capfd):
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    model, tokenizer = ls.hf.load_model(saved)
    save_model(model, tokenizer, tmp_path)
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(saved, device):
    with pytest.raises(InputError, match=f"Device '{device}' cannot be used here"):
        ls.hf.load_model(saved, device=device)


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(InputError, match=r"float8.*float32, bfloat16"):
        ls.hf.load_model(saved, dtype="float8")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no/such/folder/here", "does not exist"),
        ("meta-llama/Llama-3.2-1B", "hf download meta-llama/Llama-3.2-1B --local-dir"),
    ],
)
def test_what_is_no_folder(path, words):
    with pytest.raises(DataError, match=words):
        ls.hf.load_model(path)


def test_a_file(saved):
    with pytest.raises(DataError, match="is a file"):
        ls.hf.load_model(saved / "config.json")


def test_a_folder_without_config(tmp_path):
    with pytest.raises(DataError, match=r"no config.json.*holds nothing"):
        ls.hf.load_model(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds notes.txt"):
        ls.hf.load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="is an adapter"):
        ls.hf.load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "t5"}, "not a causal language model"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "no_such_type"}, "cannot be read"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_another_kind_of_model(folder, change, words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=words):
        ls.hf.load_model(folder)


def test_broken_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        ls.hf.load_model(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        ls.hf.load_model(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"weights in .* cannot be loaded"):
        ls.hf.load_model(folder)


def test_incomplete_weights(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lack 1 tensors, first .*q_proj"):
        ls.hf.load_model(folder)


def test_weights_of_another_shape(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 24}))
    with pytest.raises(DataError, match=r"weights in .* cannot be loaded"):
        ls.hf.load_model(folder)


def test_no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        ls.hf.load_model(folder)


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer in .* cannot be loaded"):
        ls.hf.load_model(folder)


def test_nothing_is_fetched(saved, monkeypatch):
    """Loading a local folder opens no connection."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    ls.hf.load_model(saved)
    with pytest.raises(DataError):
        ls.hf.load_model("meta-llama/Llama-3.2-1B")


def test_scaled_models_load_scaled(folder):
    model, _ = ls.hf.load_model(folder)
    ls.hf.extend(model, 128, "window(8)")
    model.save_pretrained(folder)
    again, _ = ls.hf.load_model(folder)
    assert isinstance(again, transformers.LlamaForCausalLM)
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert again.config._attn_implementation == "sdpa"


def test_contents_are_told_apart_by_weights_and_configuration_alone(saved, folder):
    same = contents_hash(saved)
    assert contents_hash(folder) == same
    (folder / "README.md").write_text("words")
    assert contents_hash(folder) == same
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    other = contents_hash(folder)
    assert other != same
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert contents_hash(folder) not in (same, other)


def test_contents_of_large_weights_are_sampled(tmp_path):
    file = tmp_path / "model.safetensors"
    weights = torch.zeros(2**20, dtype=torch.int32)
    hashes = set()
    for changed in (slice(0), slice(1), slice(-1, None), slice(400_000, 410_000)):
        weights[changed] = 1
        file.write_bytes(weights.numpy().tobytes())
        hashes.add(contents_hash(tmp_path))
    assert len(hashes) == 4
