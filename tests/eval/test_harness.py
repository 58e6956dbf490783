"""lm-evaluation-harness with the model ``longspan``: local tasks, end to end."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import longspan as ls
from longspan.errors import DataError, InputError, PatternError
from longspan.eval.harness import main, register
from longspan.position import LongFactors

# The harness moves white space at the end of a text into the choices: here there is none.
QUESTIONS = [
    {"text": "def first(x):\n    return x[0]\n" * 2 + "x", "choices": ["\ndef", " c"], "gold": 0},
    {"text": "import os\nimport sys\nfrom pathlib import", "choices": [" Path", " os"], "gold": 1},
    {"text": "for i in range(10):\n    print(i)", "choices": ["\n    x", "\ny"], "gold": 1},
]
GENERATE = """\
task: tiny_generate
output_type: generate_until
generation_kwargs: {until: ["@@"], max_gen_toks: 5}
doc_to_target: "{{choices[gold]}}"
metric_list: [{metric: exact_match}]
"""
CHOOSE = """\
task: tiny_choose
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
"""
COMMON = """\
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{text}}"
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with two tasks; the harness reaches no network and writes to this folder."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, own in (("generate", GENERATE), ("choose", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(own + COMMON.replace("DATA", str(data)))
    return tmp_path


needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'longspan[eval]'",
)
# The harness and what it imports warn of their own affairs.
quiet = pytest.mark.filterwarnings("ignore")


def evaluate(tasks, name, model, **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )


def scored(model, tokenizer, text, choice):
    """Log-likelihood of a choice behind a text, by one forward pass."""
    start, whole = tokenizer.encode(text), tokenizer.encode(text + choice)
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(len(start), len(whole))
    return sum(float(logits[i - 1, whole[i]]) for i in places)


@needs_harness
@quiet
@pytest.mark.parametrize("pattern", ["window(6) | sink(1)", "heads(causal(), window(4))", None])
def test_log_likelihoods_are_those_under_the_pattern(tasks, tiny_model, pattern):
    arguments = {"pretrained": str(tiny_model), "pattern": pattern, "dtype": "float32"}
    found = evaluate(tasks, "tiny_choose", "longspan", model_args=arguments, device="cpu")
    model, tokenizer = ls.hf.load_model(tiny_model)

    def all_scores():
        return [
            [scored(model, tokenizer, one["text"], choice) for choice in one["choices"]]
            for one in QUESTIONS
        ]

    dense = all_scores()
    if pattern is not None:
        ls.hf.apply(model, pattern)
    wanted = all_scores()
    samples = found["samples"]["tiny_choose"]
    got = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert np.allclose(wanted, dense, atol=1e-3) == (pattern is None)
    assert 0 <= found["results"]["tiny_choose"]["acc,none"] <= 1


@needs_harness
@quiet
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "how",
    [{"kv": "recent(4) + sinks(1)"}, {"prefill": "sinks(4) + recent(4)", "dense_below": 0}, {}],
)
def test_answers_are_those_of_the_cache_and_the_prefill(tasks, tiny_model, batch, how):
    from longspan.eval.answers import answer, reading

    model, tokenizer = ls.hf.load_model(tiny_model)
    lm = register()(pretrained=model, tokenizer=tokenizer, batch_size=batch, **how)
    found = evaluate(tasks, "tiny_generate", lm)
    lm.close()
    if "kv" not in how:
        assert model.config._attn_implementation == "sdpa"
    read = reading(how.get("prefill"), how.get("dense_below"), how.get("kv"))
    with read.open(model) as make_cache:
        for one, sample in zip(QUESTIONS, found["samples"]["tiny_generate"], strict=True):
            ids = tokenizer(one["text"], return_tensors="pt")["input_ids"]
            said = answer(model, tokenizer, ids, 5, make_cache)
            assert sample["resps"][0][0] == said


@needs_harness
@quiet
def test_positions_are_scaled_and_let_longer_texts_in(tasks, tiny_model):
    lists = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
    (tasks / "factors.json").write_text(json.dumps(lists))
    lm = register()(
        pretrained=str(tiny_model),
        device="cpu",
        rope="longrope",
        length=256,
        rope_factors=str(tasks / "factors.json"),
    )
    assert lm.max_length == 256
    assert lm.model.config.rope_parameters["long_factor"] == lists["long_factor"]


@needs_harness
@quiet
def test_an_adapter_brings_its_positions(tiny_model, tmp_path):
    pytest.importorskip("peft")
    model, _ = ls.hf.load_model(tiny_model)
    adapted = ls.hf.add_lora(model, rank=1, alpha=2.0, embeddings_and_norms=False)
    ls.hf.save_adapter(adapted, tmp_path)
    how = {"rope": "linear", "length": 128, "rope_factors": None}
    (tmp_path / "longspan.json").write_text(json.dumps(how))
    lm = register()(pretrained=str(tiny_model), device="cpu", peft=str(tmp_path))
    assert lm.max_length == 128
    text = lm.model.get_base_model().config
    assert (text.rope_parameters["rope_type"], text.max_position_embeddings) == ("linear", 128)


@needs_harness
@quiet
def test_a_cache_policy_refuses_what_reads_no_cache(tasks, tiny_model):
    arguments = f"pretrained={tiny_model},kv=recent(8)"
    with pytest.raises(InputError, match=r"kv=recent\(8\).* changes nothing in a log-likelihood"):
        evaluate(tasks, "tiny_choose", "longspan", model_args=arguments, device="cpu")


@needs_harness
@quiet
@pytest.mark.slow
def test_the_command_line_of_the_harness_knows_the_model(tasks, tiny_model, monkeypatch, capfd):
    def call(pattern):
        arguments = json.dumps({"pretrained": str(tiny_model), "pattern": pattern})
        told = ["harness", "run", "--model", "longspan", "--model_args", arguments]
        told += ["--tasks", "tiny_generate", "--include_path", str(tasks), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*told, "--limit", "1"])
        main()
        return capfd.readouterr().out

    assert "tiny_generate" in call("heads(causal(), window(8))")
    with pytest.raises(SystemExit) as end:
        call("windw(8)")
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert "longspan: " in error
    assert "windw" in error


@needs_harness
@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"pattern": "windw(3)"}, PatternError, "windw"),
        ({"rope": "yarn"}, InputError, "go together; got rope=yarn, length=None"),
        ({"length": 128}, InputError, "go together"),
        ({"rope_factors": "x"}, InputError, "go together"),
        ({"rope": "longrope", "length": 128, "rope_factors": "gone"}, DataError, "cannot be read"),
        ({"pattern": "causal()", "prefill": "sinks(4)"}, InputError, "not both"),
        ({"dense_below": 4}, InputError, "goes with --prefill"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(how, error, words):
    with pytest.raises(error, match=words):
        register()(pretrained="no/such-model", **how)


def test_without_the_harness_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.models.huggingface", raising=False)
    monkeypatch.delitem(sys.modules, "lm_eval.api.registry", raising=False)
    with pytest.raises(InputError, match=r"not installed .*pip install 'longspan\[eval\]'"):
        register.__wrapped__()


def test_cards_of_adapters_bring_factors_back(tmp_path):
    from longspan.eval.subject import trained_positions

    how = {"rope": "longrope", "length": 128, "rope_factors": {"short": [1.0], "long": [2.0]}}
    (tmp_path / "longspan.json").write_text(json.dumps(how))
    expected = ("longrope", 128, LongFactors(short=(1.0,), long=(2.0,)))
    assert trained_positions(tmp_path) == expected
    del how["rope_factors"]
    (tmp_path / "longspan.json").write_text(json.dumps(how))
    assert trained_positions(tmp_path) == ("longrope", 128, None)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"rope": "longrope", "length": 128, "rope_factors": [1.0]}',
        '{"rope": 5, "length": 128}',
        '{"rope": "yarn", "length": "x"}',
        '{"rope": "yarn", "length": -3}',
    ],
)
def test_damaged_cards_of_adapters_are_said(tmp_path, text):
    from longspan.eval.subject import trained_positions

    (tmp_path / "longspan.json").write_text(text)
    with pytest.raises(DataError, match="does not say the position scaling"):
        trained_positions(tmp_path)
