"""LongBench: published scores, files of its format, prompts cut in the middle, and the command."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from string import Formatter

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.eval.fakes import Knows, Letters  # noqa: E402

from longspan.cli.app import main  # noqa: E402
from longspan.errors import DataError, InputError  # noqa: E402
from longspan.eval import longbench_scores as scores  # noqa: E402
from longspan.eval.longbench import Example, Form, form_of, published, read_files  # noqa: E402
from longspan.eval.longbench_run import cut, longbench, rooms  # noqa: E402
from longspan.eval.records import Records  # noqa: E402

TEXT = "Ada wrote the notes. " * 12


def line(dataset, **changes):
    return {
        "input": "Who wrote the notes?",
        "context": TEXT,
        "answers": ["Ada", "Ada Lovelace"],
        "length": 48,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": "0a",
        **changes,
    }


def write(path, *lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("metric", "said", "answer", "classes", "expected"),
    [
        ("qa_f1", "The cat, a CAT!", "cat", (), 2 / 3),
        ("qa_f1", "It was Ada Lovelace.", "Ada Lovelace", (), 2 * 0.5 * 1 / 1.5),
        ("qa_f1", "it's", "its", (), 1.0),
        ("qa_f1", "the", "an", (), 0.0),
        ("qa_f1", "", "cat", (), 0.0),
        ("classification", "Type: Person", "Person", ("Person", "Date"), 1.0),
        ("classification", "Person or Date", "Person", ("Person", "Date"), 0.5),
        ("classification", "Date", "Person", ("Person", "Date"), 0.0),
        ("classification", "nothing", "Person", ("Person", "Date"), 0.0),
        # A class name inside the right one does not count as a second guess ...
        ("classification", "city state", "city state", ("state", "x", "city state"), 1.0),
        # ... but the one behind it is skipped, as published.
        ("classification", "city state", "city state", ("state", "city", "city state"), 0.5),
        ("retrieval", "Paragraph 3", "Paragraph 3", (), 1.0),
        ("retrieval", "Paragraphs 3, 4 or 13", "Paragraph 3", (), 1 / 3),
        ("retrieval", "the third", "Paragraph 3", (), 0.0),
        ("count", "7 of 10, so 7", "7", (), 2 / 3),
        ("count", "seven", "7", (), 0.0),
        ("code_sim", "\n\n# a\n```py\nreturn x + 1\nmore", "return x+1", (), 0.91),
        ("code_sim", "for i in range(10):", "for j in range(n):", (), 0.86),
        ("code_sim", "x // 2", "x", (), 0.0),
        ("code_sim", "", "", (), 1.0),
    ],
)
def test_scores_by_hand(metric, said, answer, classes, expected):
    assert scores.METRICS[metric](said, answer, classes) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    # What the package rouge 1.0.1 gives.
    [
        ("the cat sat. on the mat", "the mat sat on. the cat", 0.7999999950000002),
        ("a b c d e f", "f e a b d", 0.5454545404958678),
        (
            "one two. three four five . six",
            " three two one.. six five four. seven",
            0.6153846104142012,
        ),
        ("x", "x", 0.999999995),
        ("b a. c", "a b c. d", 0.5714285665306124),
        ("same words same words", "words same", 0.999999995),
        ("", "x", 0.0),
        ("...", "x", 0.0),
    ],
)
def test_rouge_is_that_of_the_published_package(said, answer, expected):
    assert scores.rouge_l(said, answer) == pytest.approx(expected, abs=1e-15)


def test_rouge_of_long_sentences_is_no_accident():
    """Where the published recursion overflows and scores 0."""
    text = " ".join(f"w{i}" for i in range(1500))
    assert scores.rouge_l(text, text) == pytest.approx(1, abs=1e-6)


def sayings(count):
    """Random sentences of few words, so that much is shared; empty ones and odd dots too."""
    rng = random.Random(5)
    words = ["the", "a", "Ada", "3", "Paragraph 3", "city", "state", "city state", "x.", ".", "#"]
    for _ in range(count):
        yield tuple(" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(2))


@pytest.mark.filterwarnings("ignore")
def test_scores_equal_those_of_the_packages():
    rouge = pytest.importorskip("rouge", reason="the published ROUGE is not installed").Rouge()
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz", reason="fuzzywuzzy is not installed")
    for said, answer in sayings(400):
        expected = 0.0
        if said.strip(".") and answer.strip("."):
            expected = rouge.get_scores([said], [answer], avg=True)["rouge-l"]["f"]
        assert scores.rouge_l(said, answer) == expected
        if "#" not in said:
            assert scores.code_sim(said, answer) == fuzz.ratio(said, answer) / 100


@pytest.mark.filterwarnings("ignore")
def test_scores_equal_those_of_the_evaluation_harness():
    theirs = pytest.importorskip(
        "lm_eval.tasks.longbench.metrics", reason="lm-eval with jieba, rouge is not installed"
    )
    for said, answer in sayings(400):
        assert scores.qa_f1(said, answer) == theirs.qa_f1_score(said, answer)
        assert scores.count(said, "3") == theirs.count_score(said, "3")
        assert scores.retrieval(said, "Paragraph 3") == theirs.retrieval_score(said, "Paragraph 3")
        for right in ("city state", "city"):
            classes = ["state", "city", "city state", "x."]
            expected = theirs.classification_score(said, right, all_classes=classes)
            assert scores.classification(said, right, classes) == expected


def test_the_best_answer_counts_and_only_the_first_line_of_few_shot_tasks():
    assert scores.best("qa_f1", "Ada Lovelace", ["Ada", "Ada Lovelace"]) == 1
    said = "\n\nAda\nDialogue: Ada met Bob"
    assert scores.best("qa_f1", said, ["Ada"], first_line=True) == 1
    assert scores.best("qa_f1", said, ["Ada"]) < 1


def test_published_forms_are_whole():
    forms = published()
    assert len(forms) == 16
    by_tokens = {n: [x for x, form in forms.items() if form.tokens == n] for n in (512, 128, 64)}
    assert by_tokens == {
        512: ["gov_report", "qmsum", "multi_news"],
        128: ["narrativeqa", "qasper", "samsum"],
        64: ["multifieldqa_en", "trec", "lcc", "repobench-p"],
    }
    assert {form.tokens for form in forms.values()} == {512, 128, 64, 32}
    for form in forms.values():
        fields = {name for _, name, _, _ in Formatter().parse(form.prompt) if name}
        assert "context" in fields
        assert fields <= {"context", "input"}
        assert form.metric in scores.METRICS
    assert [name for name, form in forms.items() if form.one_line] == ["samsum"]
    assert {name for name, form in forms.items() if not form.chat} == {
        "trec",
        "triviaqa",
        "samsum",
        "lcc",
        "repobench-p",
    }


def test_published_forms_are_those_of_the_evaluation_harness():
    """Up to white space, which the harness has changed here and there."""
    package = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    yaml = pytest.importorskip("yaml")
    for name, form in published().items():
        path = Path(package.__path__[0]) / "tasks" / "longbench" / f"{name}.yaml"
        lines = path.read_text().splitlines()
        (asked,) = [one for one in lines if one.startswith("doc_to_text:")]
        prompt = yaml.safe_load(asked)["doc_to_text"]
        for theirs, ours in (("{{context}}", "{context}"), ("{{question}}", "{input}")):
            prompt = prompt.replace(theirs, ours)
        assert form.prompt.split() == prompt.split(), name
        assert f"  max_gen_toks: {form.tokens}" in lines


def test_files_are_read_by_dataset(tmp_path):
    write(tmp_path / "b.jsonl", line("qasper"), line("trec", all_classes=["a"], length=5000))
    write(tmp_path / "qasper_e.jsonl", line("qasper", _id="9", answers=["{x}"]))
    (tmp_path / "notes.txt").write_text("no")
    windows = "\ufeff" + json.dumps(line("lcc")) + "\r\n\r\n"
    (tmp_path / "c.jsonl").write_text(windows, encoding="utf-8", newline="")
    found = read_files([tmp_path])
    assert list(found) == ["lcc", "qasper", "qasper_e", "trec"]
    assert found["trec"][0].classes == ("a",)
    assert found["trec"][0].words == 5000
    assert found["qasper_e"][0].answers == ("{x}",)
    assert form_of("qasper_e") == form_of("qasper")
    assert read_files([tmp_path / "b.jsonl"])["qasper"] == found["qasper"]
    # Named twice, read once.
    assert read_files([tmp_path, tmp_path / "b.jsonl"]) == found


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("{", "line 1 is no JSON"),
        ("[1]", "no example of LongBench: context, input, answers, dataset missing"),
        (json.dumps(line("qasper", answers="Ada")), "answers missing or of another kind"),
        (json.dumps(line("qasper", answers=[])), "answers not empty"),
        (json.dumps(line("qasper", answers=[3])), "lists of texts"),
        (json.dumps(line("trec", all_classes="Person")), "lists of texts"),
        ("\n\n", "There are no examples"),
        (json.dumps(line("qasper", context="a \ud800 b")), "line 1 holds half of a character"),
        ("[" * 200_000, "line 1 is no JSON"),
    ],
)
def test_lines_that_are_no_examples_are_named(tmp_path, written, words):
    (tmp_path / "x.jsonl").write_text(written)
    with pytest.raises(DataError, match=words):
        read_files([tmp_path])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "no published prompt here: give --template"),
        ({"template": "{context} {question}"}, r"got \{context\}, \{question\}"),
        ({"template": "nothing"}, "got no field"),
        ({"template": "{context"}, "cannot be read"),
        ({"template": "{context}\udcff"}, "no UTF-8 text"),
        ({"template": "{context:d}"}, "stand alone"),
        ({"template": "{context:{}}"}, "stand alone"),
        ({"metric": "bleu"}, "Unknown metric 'bleu'"),
        ({"tokens": 0}, "at least one token"),
    ],
)
def test_forms_that_cannot_be_asked_are_refused(given, words):
    with pytest.raises(InputError, match=words):
        form_of("mine", **given)
    mine = form_of("mine", template="{{{context}}}", metric="count", tokens=3)
    assert mine == Form(prompt="{{{context}}}", metric="count", tokens=3)


def test_long_prompts_lose_their_middle():
    text = "".join(chr(97 + i % 26) for i in range(101))
    for length, kept in ((101, text), (100, text[:50] + text[-50:]), (9, text[:4] + text[-4:])):
        got, whole = cut(Characters(), text, length)
        assert (got, whole) == (kept, 101)


class Characters(Letters):
    """As ``Letters``, and a token is its character again."""

    def __call__(self, text, return_tensors=None, **_):
        ids = [ord(c) for c in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}


def example(**changes):
    values = {"id": "1", "input": "Who?", "context": TEXT, "answers": ("Ada",), "words": 10}
    return Example(**{**values, **changes})


def test_scores_are_means_over_examples_and_datasets(tmp_path):
    """A model that knows two of three answers, whose answers are there when it is asked again."""
    asked = {
        "qasper": [example(words=10), example(answers=("Bob",), words=7999)],
        "trec": [example(answers=("Ada",), classes=("Ada", "Bob"), words=8000)],
    }
    forms = {name: form_of(name) for name in asked}
    room = rooms(forms, None, 400)
    assert room == {"qasper": 272, "trec": 336}
    model = Knows(lambda ids: "Ada")
    records = Records(tmp_path / "r.jsonl", {})
    progress: list[tuple[str, int, int, str]] = []
    result = longbench(
        model,
        Characters(),
        asked,
        forms,
        room,
        records=records,
        progress=lambda *told: progress.append(told),
    )
    assert result["datasets"]["qasper"]["score"] == 0.5
    assert result["datasets"]["qasper"]["by_words"] == {"0-4k": 1.0, "4-8k": 0.0}
    assert result["datasets"]["qasper"]["cut"] == 2
    assert result["datasets"]["trec"]["by_words"] == {"8k+": 1.0}
    assert result["mean"] == 0.75
    assert progress[-1] == ("longbench", 3, 3, "trec")
    assert [records[f"qasper/{i}"]["tokens"] for i in range(2)] == [272, 272]

    def fails(ids):
        raise AssertionError("asked again")

    again = Records(tmp_path / "r.jsonl", {})
    assert longbench(Knows(fails), Characters(), asked, forms, room, records=again) == result


def test_a_line_break_ends_summaries_of_dialogues_only():
    asked = {"samsum": [example()], "qasper": [example()]}
    model = Knows(lambda ids: "Ada\nmore")
    model.generation_config.eos_token_id = 7
    forms = {name: form_of(name) for name in asked}
    longbench(model, Characters(), asked, forms, rooms(forms, 5000, None))
    first, second = model.asked
    assert (first["eos_token_id"], first["min_new_tokens"]) == ([7, 10], 1)
    assert "eos_token_id" not in second


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("trec", {}, "names no all_classes"),
        ("passage_retrieval_en", {}, "expects 'Paragraph N'"),
    ],
)
def test_examples_that_cannot_be_scored_are_found_first(name, change, words):
    asked, forms = {name: [example(**change)]}, {name: form_of(name)}
    with pytest.raises(DataError, match=words):
        longbench(Knows(lambda ids: ""), Characters(), asked, forms, {name: 9})


def test_empty_prompts_are_found_first():
    asked = {"qasper": [example(context=" ", input="")]}
    forms = {"qasper": form_of("qasper", template="{context}{input}")}
    with pytest.raises(DataError, match="of qasper gives an empty prompt"):
        longbench(Knows(lambda ids: ""), Characters(), asked, forms, {"qasper": 9})


def test_prompts_need_room():
    forms = {"gov_report": form_of("gov_report")}
    with pytest.raises(InputError, match="give --length"):
        rooms(forms, None, None)
    for length, context in ((1, 99), (None, 512)):
        with pytest.raises(InputError, match="tokens are left for a prompt of gov_report"):
            rooms(forms, length, context)


@pytest.fixture
def call(monkeypatch, capfd, tiny_model):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        told = ["longspan", "eval", "longbench", str(tiny_model), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", told)
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "qasper.jsonl", line("qasper"), line("qasper", length=9000, _id="0b"))
    write(tmp_path / "samsum.jsonl", line("samsum"))
    return tmp_path


def test_the_command_lists_without_asking(call, data):
    code, out, _ = call("--data", data, "--dry-run", "--length", 60, "--kv", "tova(9)", "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["kv"] == "tova(9)"
    qasper = plan["datasets"]["qasper"]
    assert (qasper["examples"], qasper["cut"], qasper["room"]) == (2, 2, 60)
    assert qasper["tokens"]["least"] == qasper["tokens"]["most"] > 200
    code, out, _ = call("--data", data / "samsum.jsonl", "--dry-run", "--length", 9000)
    assert code == 0
    assert "samsum" in out
    assert "Nothing was asked" in out


@pytest.mark.parametrize(
    "way",
    [
        ("--pattern", "window(16) | sink(2)"),
        ("--kv", "recent(16) + sinks(2)", "--prefill", "sinks(4)", "--dense-below", 16),
        ("--rope", "yarn"),
    ],
)
def test_the_command_answers_and_goes_on(call, data, way):
    out = data / "records.out"
    asked = ("--data", data, "--length", 70, "--answer", 4, "--out", out, "--json", *way)
    code, text, _ = call(*asked, "--limit", 1)
    assert code == 0
    assert json.loads(text)["datasets"]["qasper"]["examples"] == 1
    first = out.read_text().splitlines()
    code, text, _ = call(*asked)
    found = json.loads(text)
    assert code == 0
    assert {name: one["examples"] for name, one in found["datasets"].items()} == {
        "qasper": 2,
        "samsum": 1,
    }
    lines = out.read_text().splitlines()
    assert len(first) == 3
    assert set(first) < set(lines)
    assert len(lines) == 4
    rows = [json.loads(one) for one in lines[1:]]
    expected = sum(one["score"] for one in rows if one["key"].startswith("qasper")) / 2
    assert found["datasets"]["qasper"]["score"] == expected
    assert all(one["tokens"] <= 75 < one["prompt_tokens"] for one in rows)
    code, _, error = call(*asked, "--answer", 5)
    assert code == 2
    assert "answer was 4, is 5" in error


def test_the_command_prints_a_table(call, data):
    code, out, error = call("--data", data, "--length", 70, "--answer", 2, "--limit", 1)
    assert code == 0
    assert "mean" in out
    assert "more than the 64 positions" in error


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--data", "gone"), "gone does not exist"),
        (("--data", "/dev/null"), "/dev/null is neither a file nor a folder"),
        (("--data", "DATA", "--datasets", "trec"), "hold no dataset trec; they hold qasper"),
        (("--data", "DATA", "--limit", 0), "limit is at least 1"),
        (("--data", "DATA", "--rope", "yarn"), "give --length"),
        (("--data", "DATA"), "tokens are left for a prompt"),
        (("--data", "DATA", "--length", 60, "--kv", "tovo(3)"), "did you mean 'tova'"),
        (
            ("--data", "DATA", "--length", 60, "--prefill", "sinks(4)", "--pattern", "causal()"),
            "not both",
        ),
        (("--data", "DATA", "--length", 60, "--dense-below", 4), "goes with --prefill"),
        (("--data", "DATA", "--length", 60, "--chat"), "no chat template"),
        (("--data", "DATA", "--length", 60, "--template", "{x}"), "A template has the fields"),
        (("--data", "DATA", "--length", 60, "--rope-factors", "gone"), "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_said_before_any_work(call, data, asked, words):
    code, out, error = call(*(data if part == "DATA" else part for part in asked))
    assert code == 2
    assert not out
    assert words in error
