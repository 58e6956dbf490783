"""``longspan generate`` from outside, with the embedded model."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import longspan
from longspan.cli.app import main
from longspan.eval.answers import answer
from longspan.hf.generate import generate, read_prompt

MODEL = f"{longspan.__path__[0]}/assets/demo_model"


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["longspan", "generate", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        else:
            code = 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("def first(items):\n    return items[0]\n\n\n" * 25)
    return path


def test_a_prompt_longer_than_the_model_knows_is_said(call, prompt):
    prompt.write_text("x = 1\n" * 300)
    code, _, err = call(MODEL, "--prompt-file", prompt, "--tokens", 2, "--device", "cpu")
    assert code == 0
    assert "more than the 512 positions" in err
    assert "indexing errors" not in err


def test_text_goes_to_stdout_and_figures_to_stderr(call, prompt):
    options = ("--prompt-file", prompt, "--tokens", 6, "--device", "cpu")
    code, dense, figures = call(MODEL, *options)
    assert code == 0
    assert "everything()" in figures
    kv = "sinks(4) + recent(32) + heavy(32)"
    code, text, figures = call(MODEL, *options, "--kv", kv)
    assert code == 0
    assert text.strip()
    assert dense.strip()
    assert kv in figures
    assert "kept     68 of" in figures
    assert "tokens/s" in figures


def test_json_says_everything(call, prompt):
    code, out, _ = call(
        MODEL, "--prompt-file", prompt, "--kv", "snapkv(16, 8)", "--tokens", 5, "--json",
        "--device", "cpu", "--pattern", "window(128) | sink(4)",
    )  # fmt: skip
    assert code == 0
    made = json.loads(out)
    assert made["new_tokens"] == 5
    assert made["tokens_per_second"] > 0
    cache = made["cache"]
    assert cache["policy"] == "snapkv(16, 8)"
    assert cache["seen"] == made["prompt_tokens"] + 4
    # Sinks, window and recent, what was chosen, and the tokens since.
    assert {row["most"] for row in cache["layers"]} == {4 + 32 + 16 + 4}
    assert cache["bytes"] < cache["dense_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either as --prompt-file or as --prompt"),
        (["--prompt", "a", "--kv", "hevy(3)"], "did you mean 'heavy'"),
        (["--prompt-file", "nowhere.txt"], "cannot be read"),
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt", "a\udcff"], "half of a character, or bytes that are no UTF-8"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt", "a", "--tokens", "0"], "at least 1 token"),
        (["--prompt", "a", "--temperature", "nan"], "temperature from 0"),
        (["--prompt", "a", "--prefill", "sinks(4)", "--dense-below", "-1"], "tokens from 0"),
        (["--prompt", "a", "--seed", "-1"], "from 0 and below 2^63, got -1"),
        (["--prompt", "a", "--seed", str(10**20)], "from 0 and below 2^63, got 1000"),
        (["--prompt", "a", "--positions", "rolled"], "original or packed"),
        (["--prompt", "a", "--pattern", "windw(3)"], "did you mean 'window'"),
    ],
)
def test_errors_are_one_paragraph(call, options, message):
    code, out, error = call(MODEL, *options, "--device", "cpu")
    assert code == 2
    assert message in error
    assert not out
    assert "Traceback" not in error


def test_a_byte_order_mark_is_no_part_of_a_prompt(call, monkeypatch, tmp_path):
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbfdef f(x):")

    def asked(*options):
        code, out, _ = call(MODEL, *options, "--tokens", 1, "--json", "--device", "cpu")
        assert code == 0
        return json.loads(out)["prompt_tokens"]

    wanted = asked("--prompt", "def f(x):")
    assert asked("--prompt-file", marked) == wanted
    with marked.open(encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert asked("--prompt-file", "-") == wanted


def test_bytes_on_standard_input_that_are_no_text_are_said(call, monkeypatch, tmp_path):
    wrong = tmp_path / "wrong.txt"
    wrong.write_bytes(b"a\xff")
    with wrong.open(encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, out, error = call(MODEL, "--prompt-file", "-", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "The prompt - cannot be read" in error


@pytest.mark.parametrize(
    "saved",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"stop_strings": ["no such text"]},
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"exponential_decay_length_penalty": [1, 9.0]},
        {"sequence_bias": [[[300], 99.0]]},
        {"forced_eos_token_id": 5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"force_words_ids": [[300]]},
        {"prompt_lookup_num_tokens": 3},
        {"token_healing": True},
        {"is_assistant": True},
        {"max_time": 1e-9},
        {"use_cache": False},
        {"max_new_tokens": 3},
        {"max_length": 3, "min_new_tokens": 2},
    ],
)
def test_saved_generation_settings_change_no_greedy_text(call, prompt, tmp_path, saved):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **saved}))
    options = ("--prompt-file", prompt, "--tokens", 8, "--device", "cpu", "--json")
    (_, wanted, _), (code, out, _) = call(MODEL, *options), call(folder, *options)
    assert code == 0
    assert json.loads(out)["text"] == json.loads(wanted)["text"]

    (plain, tokenizer), (other, _) = longspan.hf.load_model(MODEL), longspan.hf.load_model(folder)
    ids = read_prompt(tokenizer, prompt.read_text(), chat=False)
    for make in (None, lambda: longspan.kv.cache(other, "recent(16)")):
        same = None if make is None else lambda: longspan.kv.cache(plain, "recent(16)")
        assert answer(other, tokenizer, ids, 8, make) == answer(plain, tokenizer, ids, 8, same)


def test_a_text_goes_nowhere_without_a_standard_output(call, monkeypatch):
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        code, _, error = call(MODEL, "--prompt", "def f", "--tokens", 2, "--device", "cpu")
    assert code == 0
    assert "decoding 2 tokens" in error


def test_what_ends_a_text_and_what_it_is_drawn_from_stay(prompt):
    model, tokenizer = longspan.hf.load_model(MODEL)
    ids = read_prompt(tokenizer, prompt.read_text(), chat=False)
    plain = answer(model, tokenizer, ids, 8)
    first = tokenizer.encode(plain)[0]
    model.generation_config.suppress_tokens = [first]
    assert not answer(model, tokenizer, ids, 8).startswith(str(tokenizer.decode([first])))
    model.generation_config.suppress_tokens = None
    model.generation_config.eos_token_id = first
    assert answer(model, tokenizer, ids, 8) == tokenizer.decode([first])
    model.generation_config.eos_token_id = None
    model.generation_config.top_k = 1
    made = generate(model, tokenizer, ids, longspan.kv.cache(model, "sinks(4)"), tokens=8)
    for temperature in (0.5, 9.0):
        cache = longspan.kv.cache(model, "sinks(4)")
        drawn = generate(model, tokenizer, ids, cache, tokens=8, temperature=temperature)
        assert drawn.text == made.text


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_said(call, prompt, tmp_path, temperature):
    folder = tmp_path / "broken"
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = ("--prompt-file", prompt, "--tokens", 3, "--device", "cpu")
    code, out, error = call(folder, *options, "--temperature", temperature)
    assert (code, out) == (1, "")
    assert "logits are not finite" in error


def test_a_prompt_can_be_read_sparsely(call, prompt):
    options = ("--prompt-file", prompt, "--tokens", 4, "--device", "cpu", "--json")
    code, out, _ = call(MODEL, *options, "--prefill", "block_topk(0.5)", "--kv", "sinks(4)")
    assert code == 0
    assert json.loads(out)["new_tokens"] >= 1
    plain = options[:-1]
    for least, how in ((1, "sparse"), (9999, "exact")):
        code, _, err = call(MODEL, *plain, "--prefill", "sinks(4)", "--dense-below", least)
        assert code == 0
        assert f"prefill  {how}: sinks(4) from {least:,} tokens on, as asked" in err
        made = json.loads(
            call(MODEL, *options, "--prefill", "sinks(4)", "--dense-below", least)[1]
        )
        assert made["prefill"] == {
            "method": "sinks(4)",
            "dense_below": least,
            "sparse": how == "sparse",
        }
    code, _, err = call(MODEL, *options, "--dense-below", 9)
    assert code == 2
    assert "goes with --prefill" in err
    code, _, err = call(MODEL, *options, "--prefill", "block_tpk(3)")
    assert code == 2
    assert "did you mean 'block_topk'" in err
    code, _, err = call(MODEL, *options, "--prefill", "block_topk(3)", "--pattern", "window(9)")
    assert code == 2
    assert "not both" in err
