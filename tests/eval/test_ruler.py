"""RULER's texts by their invariants, the run by models that know the answers, and the command."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.eval.fakes import Knows, Letters  # noqa: E402

import longspan as ls  # noqa: E402
from longspan.errors import DataError, InputError  # noqa: E402
from longspan.eval.records import Records  # noqa: E402
from longspan.eval.ruler import TASKS, check_tasks, score  # noqa: E402
from longspan.eval.ruler_run import fitting, ruler  # noqa: E402
from longspan.eval.stepwise import stepwise  # noqa: E402


def make(task, size, seed=0):
    return TASKS[task].make(random.Random(seed), size)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [1, 7, 200])
def test_texts_are_repeatable_and_hold_their_answers(task, size):
    sample, again = make(task, size), make(task, size)
    assert sample == again
    assert make(task, size, seed=1).prompt != sample.prompt
    assert all(answer in sample.prompt for answer in sample.answers)
    assert len(set(sample.answers)) == len(sample.answers)
    assert score(" ".join(sample.answers).upper(), sample.answers) == 1.0
    assert score("nothing of this", sample.answers) == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_texts_grow_with_the_size(task):
    assert len(make(task, 400).prompt) > 1.5 * len(make(task, 100).prompt)


@pytest.mark.parametrize(
    ("task", "needles", "answers"),
    [
        ("niah.single", 1, 1),
        ("niah.multikey", 4, 1),
        ("niah.needles", 50, 1),
        ("niah.multivalue", 4, 4),
        ("niah.multiquery", 4, 4),
    ],
)
def test_needles_stand_once_and_a_reader_finds_them(task, needles, answers):
    for seed in range(5):
        sample = make(task, 50, seed)
        found = re.findall(r"magic numbers for (\w+) is: (\d+)\.", sample.prompt)
        assert len(found) == needles
        assert len(sample.answers) == answers
        question = sample.prompt.rsplit("for ", 1)[1].split(" mentioned")[0]
        asked = re.findall(r"\w+", question.replace(" and ", " "))
        assert sorted(v for k, v in found if k in asked) == sorted(sample.answers)
        assert all(sample.prompt.count(value) == 1 for _, value in found)


def test_a_chain_of_variables_can_be_followed():
    for seed in range(5):
        sample = make("vt", 60, seed)
        text = sample.prompt.split("hidden in the following text.")[-1].split("Question")[0]
        value = re.findall(r"the value (\d+) in the text", sample.prompt)[-1]
        held = {}
        for name, right in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            held[name] = held.get(right, right)
        assert sorted(n for n, v in held.items() if v == value) == sorted(sample.answers)
        assert len(sample.answers) == 5


@pytest.mark.parametrize("size", [5, 50, 300])
def test_common_and_frequent_words_can_be_counted(size):
    from collections import Counter

    sample = make("cwe", size)
    text = sample.prompt.split("appear most often.")[-1].split("Question")[0]
    counts = Counter(re.findall(r"\d+\. (\w+)", text)).most_common()
    assert {word for word, _ in counts[:10]} == set(sample.answers)
    assert counts[9][1] > counts[10][1]
    sample = make("fwe", size)
    text = sample.prompt.split("coded words. ")[-1].split("\nQuestion")[0]
    counts = Counter(word for word in text.split() if word != "...").most_common()
    assert {word for word, _ in counts[:3]} == set(sample.answers)
    assert len(counts) == 3 or counts[2][1] > counts[3][1]


def test_key_values_are_json():
    sample = make("kv", 30)
    pairs = json.loads(re.search(r"\{.*\}", sample.prompt).group())
    assert len(pairs) == 30
    assert pairs[re.search(r'Key: "(.*)"', sample.prompt).group(1)] == sample.answers[0]


@pytest.mark.parametrize("task", TASKS)
def test_a_question_fills_its_length(task):
    length = 6000
    sample = fitting(Letters(), task, length, "a")
    used = len(sample.prompt) + TASKS[task].tokens
    assert 0.85 * length < used <= length
    with pytest.raises(DataError, match="give longer lengths"):
        fitting(Letters(), task, 200, "a")


def test_a_run_counts_names_the_worst_and_goes_on(tmp_path):
    settings = {"seed": 0}
    tasks, lengths = ("niah.single", "kv"), (1500, 2500)
    right = {
        tuple(Letters()(s.prompt)["input_ids"]): s.answers[0]
        for n in lengths
        for task in tasks
        for i in range(3)
        for s in [fitting(Letters(), task, n, f"0/{task}/{n}/{i}")]
        if not (task == "kv" and i == 2)
    }
    model = Knows(lambda ids: right.get(ids, "I do not know"))
    path = tmp_path / "ruler.jsonl"
    first = ruler(
        model, Letters(), tasks, lengths, samples=3, limit=4, records=Records(path, settings)
    )
    assert first["tasks"] == {"niah.single": {"1500": 1.0}, "kv": {"1500": 1.0}}
    assert len(model.caches) == 4
    told = []
    found = ruler(
        model,
        Letters(),
        tasks,
        lengths,
        samples=3,
        make_cache=object,
        records=Records(path, settings),
        progress=lambda *what: told.append(what),
    )
    # Four were measured before; each of the others got a cache of its own.
    assert len(model.caches) == 12
    assert len({id(c) for c in model.caches[4:]}) == 8
    assert found["tasks"]["niah.single"] == {"1500": 1.0, "2500": 1.0}
    assert found["worst"]["2500"]["task"] == "kv"
    assert found["worst"]["2500"]["score"] < 1
    assert found["mean"]["2500"] == pytest.approx((1 + found["worst"]["2500"]["score"]) / 2)
    assert [what[1] for what in told] == list(range(1, 13))


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(InputError, match=r"Unknown task 'niah\.none'"):
        check_tasks(["niah.none"])
    with pytest.raises(InputError, match="none given"):
        check_tasks([])
    with pytest.raises(InputError, match="At least one question"):
        ruler(None, None, ["kv"], [100], samples=0)


@pytest.fixture(scope="module")
def tiny_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_stepwise_with_everything_kept_is_the_loss_of_one_pass(tiny_model):
    ids = torch.randint(1, 97, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = tiny_model(ids[None]).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    for chunk, prompt in ((1, 0), (7, 0), (1, 11), (6, 11)):
        found = stepwise(
            tiny_model, ids, lambda: ls.kv.cache(tiny_model), chunk=chunk, prompt=prompt
        )
        torch.testing.assert_close(
            torch.tensor(found["losses"]), wanted[prompt:], atol=1e-4, rtol=0
        )
        assert found["tokens"] == 39 - prompt
    ls.hf.remove(tiny_model)


def test_stepwise_under_a_policy_is_attention_to_what_was_kept(tiny_model):
    """Sinks and a window, kept after every token, are the pattern of sinks and a window."""
    ids = torch.randint(1, 97, (40,), generator=torch.Generator().manual_seed(2))
    # What is kept after a token is one less than the next token sees, itself included.
    found = stepwise(
        tiny_model, ids, lambda: ls.kv.cache(tiny_model, "each_step(sinks(2) + recent(8))")
    )
    ls.hf.remove(tiny_model)
    with ls.hf.apply(tiny_model, "window(9) | sink(2)"), torch.no_grad():
        logits = tiny_model(ids[None]).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    torch.testing.assert_close(torch.tensor(found["losses"]), wanted, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="stepwise needs"):
        stepwise(tiny_model, ids[:1], dict)


def test_the_command_answers_with_a_method_and_a_policy(tiny_model, tmp_path, monkeypatch):
    import contextlib

    from typer.testing import CliRunner

    from longspan.cli.eval import app
    from longspan.eval.losses import TokenLoss
    from longspan.eval.subject import Subject

    tokenizer = Letters()
    # Its characters must be known to the model.
    read = tokenizer.__call__

    class Small(Letters):
        def __call__(self, text, return_tensors=None, **_):
            ids = [i % 90 + 1 for i in read(text)["input_ids"]]
            return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    @contextlib.contextmanager
    def opened(self):
        yield TokenLoss(tiny_model), Small()

    monkeypatch.setattr(Subject, "open", opened)
    path = tmp_path / "r.jsonl"
    arguments = ["ruler", "nowhere", "--lengths", "500", "--tasks", "niah.single,kv", "--json"]
    arguments += ["--samples", "1", "--out", str(path), "--device", "cpu", "--dense-below", "0"]
    arguments += ["--prefill", "block_topk(3)", "--kv", "sinks(4) + recent(40)"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["prefill"] == "block_topk(3)"
    assert set(found["tasks"]) == {"niah.single", "kv"}
    assert len(path.read_text().splitlines()) == 3
    shown = CliRunner().invoke(app, [a for a in arguments if a != "--json"])
    assert "niah.single" in shown.stdout
    assert "worst" in shown.stdout
    both = CliRunner().invoke(app, [*arguments, "--pattern", "window(64)"])
    assert isinstance(both.exception, InputError)
    # Nothing stays in the model but what the cache needs.
    assert "prefill" not in str(ls.hf.inspect(tiny_model))
    ls.hf.remove(tiny_model)
