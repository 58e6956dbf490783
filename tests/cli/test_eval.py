"""``longspan eval kv`` and ``eval ppl --kv`` from outside, with the embedded model."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import longspan
from longspan.cli.app import main
from longspan.cli.eval_options import table

MODEL = f"{longspan.__path__[0]}/assets/demo_model"


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["longspan", "eval", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        else:
            code = 0
        return code, *capfd.readouterr()

    return run


def test_a_narrow_terminal_cuts_no_name(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    names = ("passage_retrieval_en", "passage_count")
    table(
        "Scores",
        ("dataset", "examples", "score", "0-4k", "4-8k", "8k+"),
        [(n, *"12345") for n in names],
    )
    out = capsys.readouterr().out
    first = "".join(line.split("│")[1].strip() for line in out.splitlines() if "│" in line)
    assert first == "".join(names)


def test_kv_writes_tables_and_goes_on_where_it_stopped(call, some_text, tmp_path):
    out = tmp_path / "out"
    asked = (
        "kv",
        MODEL,
        "--data",
        some_text,
        "--policies",
        "recent",
        "--budgets",
        "50",
        "--length",
    )
    asked = (
        *asked,
        120,
        "--samples",
        2,
        "--new",
        8,
        "--steps",
        0,
        "--tasks",
        "none",
        "--out",
        out,
    )
    code, text, _ = call(*asked, "--limit", 1, "--device", "cpu")
    assert code == 0
    assert "| recent | - |" in text
    code, text, _ = call(*asked, "--device", "cpu", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["figures"] == json.loads((out / "kv.json").read_text())
    assert found["figures"]["once"]["recent"]["0.5"]["kept"] == 0.5
    assert "| dense |" in (out / "kv.md").read_text()
    records = (out / "kv.jsonl").read_text()
    assert call(*asked, "--device", "cpu")[0] == 0
    assert (out / "kv.jsonl").read_text() == records
    code, _, error = call(*asked, "--seed", 1, "--device", "cpu")
    assert code == 2
    assert "seed was 0, is 1" in error


def test_kv_lists_without_measuring(call, some_text):
    asked = ("kv", MODEL, "--data", some_text, "--length", 400, "--prefill", "all", "--dry-run")
    code, text, _ = call(*asked)
    assert code == 0
    assert "snapkv: snapkv(4)" in text
    assert "prefill xattention: xattention(0.1, block=16)" in text
    assert "Nothing was measured" in text
    code, text, _ = call(*asked, "--json")
    assert json.loads(text)["measures"][:2] == ["once", "steps"]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_kv_measures_nothing_where_a_later_prompt_cannot_be_made(call, some_text, tmp_path, more):
    few = tmp_path / "few.txt"
    few.write_text("too few words")
    asked = ("kv", MODEL, "--policies", "recent", "--budgets", 90, "--samples", 2)
    asked = (*asked, "--new", 8, "--steps", 4)
    code, out, err = call(*asked, "--data", few, "--length", 120, "--tasks", "none", *more)
    assert code == 2
    assert not out
    assert "pieces of 120 tokens" in err
    asked = (*asked, "--data", some_text, "--length", 60, "--tasks", "passkey.code,vt")
    code, out, err = call(*asked, *more)
    assert code == 2
    assert not out
    assert "A question of passkey.code, vt and its answer need more than 60 tokens" in err
    assert "kv 1/" not in err
    assert call(*asked, "--limit", 1, "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("kv", MODEL), "There is no text"),
        (("kv", "nowhere", "--python-stdlib"), "nowhere does not exist"),
        (("kv", MODEL, "--budgets", "0"), "above 0 and up to 100, got 0"),
        (("kv", MODEL, "--limit", "0"), "limit is at least 1"),
        (("kv", MODEL, "--policies", "recent(4)"), "where the budget goes"),
        (("ppl", MODEL, "--lengths", "64", "--chunk", "4"), "belong to --kv"),
        (("ppl", "gone", "--lengths", "64", "--kv", "tova(8)", "--chunk", "0"), "at least"),
        (
            ("ppl", "no-model", "--lengths", "64", "--kv", "tova(8)", "--prompt", "63"),
            "two tokens",
        ),
        (("ppl", MODEL, "--lengths", "64", "--kv", "recint(4)"), "did you mean 'recent'"),
        (
            ("ppl", MODEL, "--lengths", "64", "--kv", "recent(4)", "--protocol", "sliding"),
            "side by side",
        ),
    ],
)
def test_what_makes_no_sense_is_said_before_any_work(call, asked, words):
    code, _, error = call(*asked)
    assert code == 2
    assert words in error


def test_perplexity_through_a_cache(call, some_text):
    asked = ("ppl", MODEL, "--data", some_text, "--lengths", "48", "--limit", 1, "--json")
    whole = json.loads(call(*asked)[1])["lengths"][0]
    dense = json.loads(call(*asked, "--kv", "everything()", "--chunk", 7)[1])["lengths"][0]
    assert dense["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)
    short = json.loads(call(*asked, "--kv", "recent(4) + sinks(0)", "--prompt", 8)[1])
    assert short["kv"] == "recent(4) + sinks(0)"
    assert short["lengths"][0]["tokens"] == 39
    assert short["lengths"][0]["perplexity"] > 1.2 * whole["perplexity"]


KV = "--policies recent --budgets 50 --length 160 --samples 1 --new 8 --steps 4 --tasks none"


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.fixture
def broken_model(tmp_path):
    """A folder with a model whose logits are NaN."""
    folder = tmp_path / "broken"
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("asked", "at"),
    [
        (("ppl", "--lengths", "48", "--limit", 2), ("lengths", 0, "perplexity")),
        (("ppl", "--lengths", "48", "--limit", 2, "--kv", "recent(9)"), ("lengths", 0, "nll")),
        (("passkey", "--lengths", "200", "--depths", "0.5", "--trials", 2), ("nll", 0, 0)),
        (
            ("kv", *KV.split()),
            ("figures", "once", "recent", "0.5", "value"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_figures_that_are_not_finite_are_null(call, broken_model, some_text, tmp_path, asked, at):
    name, *more = asked
    more += () if name == "passkey" else ("--data", some_text)
    out = tmp_path / "out"
    # The second time from the records.
    for _ in range(2):
        code, said, error = call(name, broken_model, *more, "--out", out, "--json")
        assert code == 0, error
        found = json.loads(said, parse_constant=no_constant)
        for step in at:
            found = found[step]
        assert found is None
        files = [out] if out.is_file() else [*out.glob("*.json*")]
        assert files
        for file in files:
            text = file.read_text()
            for line in [text] if file.suffix == ".json" else text.splitlines():
                json.loads(line, parse_constant=no_constant)
    code, said, error = call(name, broken_model, *more, "--out", out)
    assert code == 0, error
    assert "nan" in said or name == "passkey"


def test_headings_say_what_a_limit_left_out(call, some_text, tmp_path):
    asked = ("ruler", MODEL, "--tasks", "passkey,passkey", "--samples", 3, "--lengths", "300,300")
    code, out, error = call(*asked, "--limit", 1)
    assert code == 0, error
    assert out.startswith("RULER, the first 1 of 3 questions (--limit)\n")
    assert out.count("300") == 1
    assert call(*asked, "--limit", 3)[1].startswith("RULER, 3 questions each\n")
    asked = ("passkey", MODEL, "--lengths", "200,200", "--depths", "0.5,0.5", "--trials", 2)
    out = call(*asked, "--limit", 1)[1]
    assert out.startswith("Passkey retrieval, the first 1 of 2 probes (--limit)\n")
    assert out.count("200") == out.count("depth") == 1
    call("kv", MODEL, "--data", some_text, *KV.split(), "--limit", 1, "--out", tmp_path)
    said = (tmp_path / "kv.md").read_text()
    assert "up to 1 for every figure, as only the first 1 of 4 were measured (--limit)" in said


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize("name", ["passkey", "ruler", "kv"])
def test_seeds_out_of_range_are_refused(call, some_text, name, seed):
    more = ("--data", some_text, *KV.split()) if name == "kv" else ("--lengths", "300")
    code, out, error = call(name, MODEL, *more, "--seed", seed)
    assert (code, out) == (2, "")
    assert f"from 0 and below 2^63, got {seed}." in error


def test_ruler_lists_without_asking(call):
    asked = ("ruler", MODEL, "--tasks", "passkey.code,vt", "--lengths", "600,800", "--samples", 3)
    code, out, _ = call(*asked, "--kv", "tova(9)", "--prefill", "sinks(4)", "--dry-run")
    assert code == 0
    assert "passkey.code, vt at 600, 800 tokens: 12 questions" in out
    assert "prefill sinks(4), cache tova(9). Nothing was asked." in out
    code, out, _ = call(*asked, "--limit", 5, "--dry-run", "--json")
    assert code == 0
    plan = json.loads(out)
    assert (plan["questions"], plan["prefill"], plan["kv"]) == (5, None, None)
    code, _, err = call(*asked[:-1], 0, "--dry-run")
    assert code == 2
    assert "At least one question" in err


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_ruler_asks_nothing_where_a_later_question_has_no_room(call, tmp_path, more):
    asked = ("ruler", MODEL, "--lengths", "300", "--samples", 1, "--tasks", "passkey.code,vt")
    code, out, err = call(*asked, "--out", tmp_path / "r.jsonl", *more)
    assert code == 2
    assert not out
    assert "A question of vt and its answer need more than 300 tokens" in err
    assert "ruler 1/2" not in err
    assert call(*asked, "--limit", 1, "--dry-run")[0] == 0


def test_lengths_are_checked_without_words_about_a_cache(call, some_text):
    code, _, err = call("ppl", MODEL, "--data", some_text, "--lengths", "0")
    assert code == 2
    assert "--chunk" not in err
    assert "0" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dense-below", 5], "goes with --prefill"),
        (["--dense-below", -5, "--prefill", "sinks(4)"], "a number of tokens from 0, got -5"),
        (["--kv", "hevy(3)"], "did you mean 'heavy'"),
        (["--tasks", "nosuch"], "Unknown task 'nosuch'"),
    ],
)
def test_ruler_says_what_is_wrong_before_a_model_is_read(call, options, message):
    code, out, error = call("ruler", MODEL, "--lengths", 256, *options)
    assert code == 2
    assert message in error
    assert not out
