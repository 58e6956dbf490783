"""Quality against budget: forms, figures that equal those of plain caches, and the tables."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

import longspan as ls
from longspan.errors import DataError, InputError, PolicyError
from longspan.eval import kv_report as report
from longspan.eval.kv_forms import METHODS, POLICIES, forms
from longspan.eval.kv_gates import streaming_gates
from longspan.eval.kv_measure import run
from longspan.eval.kv_sweep import DENSE, Sweep
from longspan.eval.records import Records
from longspan.eval.ruler import score
from longspan.eval.ruler_run import fitting
from longspan.eval.suite import spread
from longspan.hf.fork import waiting

FOLDER = f"{ls.__path__[0]}/assets/demo_model"
GATES = [[0.1, 0.2, 0.3, 0.4]] * 4


@pytest.fixture(scope="module")
def loaded():
    return ls.hf.load_model(FOLDER)


@pytest.fixture(scope="module")
def text(loaded, some_text):
    words = (some_text / "textwrap.py").read_text() + (some_text / "string.py").read_text()
    return [torch.tensor(loaded[1].encode(words))]


def sweep(*names, prefill=(), **more):
    asked = {
        "budgets": (0.3, 1.0),
        "length": 200,
        "new": 24,
        "steps": 6,
        "tasks": ("passkey.code",),
        "samples": 3,
        "batch": 2,
        "answer": 6,
    }
    chosen = forms(names) + forms(prefill, prefill=True)
    return Sweep(forms=chosen, **{**asked, **more})


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("share", [0.1, 0.37, 1.0])
def test_policies_keep_what_the_budget_says(loaded, name, share):
    (form,) = forms([name])
    model, _ = loaded
    assert form.fits(share, 400) == ((name, share) != ("quest", 0.1))
    if not form.fits(share, 400):
        return
    policy = form.at(share, 400, GATES)
    cache = ls.kv.cache(model, policy)
    ids = torch.randint(0, 2000, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    cache.compress()
    kept = sum(row.tokens for row in cache.report().layers) / (4 * 4)
    wanted = 400 if name == "quest" else share * 400
    # Whole heads and halves cannot meet every number.
    assert abs(kept - wanted) <= {"duo": 12, "heavy.half": 1}.get(name, 0) + 1e-9
    if name == "quest":
        assert policy.parts[0].tokens == share * 400


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_dense_at_the_whole_budget(loaded, name):
    (form,) = forms([name], prefill=True)
    q, k, v = ls.select.sample(256, 4, 2, 32, dtype=torch.float32, device="cpu")
    norms = torch.rand(1, 256)
    found = ls.select.select(q, k, v, form.at(1.0, 256), norms=norms)
    least = 0.98 if "norm" in name else 1.0
    assert float(found.density().min()) >= least
    less = ls.select.select(q, k, v, form.at(0.3, 4096), norms=norms)
    assert float(less.density().mean()) <= 1.0


def test_templates_and_names_are_checked():
    assert [form.name for form in forms(["recent, tova", "snapkv({c}, kernel=7)"])] == [
        "recent",
        "tova",
        "snapkv({c}, kernel=7)",
    ]
    assert len(forms(["all", "recent"])) == len(POLICIES)
    for bad, error, words in (
        ("recentt", InputError, "Unknown policy 'recentt'"),
        ("recent(4)", InputError, "where the budget goes"),
        ("recent({q})", InputError, "found {q}"),
        ("recent({n)", PolicyError, "expected '}'"),
        ("recant({n})", PolicyError, "no cache policy is called 'recant'"),
    ):
        with pytest.raises(error, match=words):
            forms([bad])
    with pytest.raises(InputError, match="Unknown method 'snapkv'"):
        forms(["snapkv"], prefill=True)
    with pytest.raises(InputError, match=r"choose\. Give budgets from 19%"):
        sweep("tova", budgets=(0.1,))
    with pytest.raises(PolicyError, match="48 tokens, got 44"):
        sweep("quest", budgets=(0.2, 0.22))


@pytest.mark.parametrize(
    "more",
    [
        {"budgets": ()},
        {"budgets": (0.0,)},
        {"budgets": (1.2,)},
        {"samples": 0},
        {"batch": 0},
        {"answer": 0},
        {"length": 1},
        {"new": 1},
        {"steps": -1},
        {"new": 0, "steps": 0, "tasks": ()},
        {"tasks": ("nonsense",)},
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(more):
    with pytest.raises(InputError):
        sweep("recent", **more)


@torch.inference_mode()
def test_a_budget_below_the_least_of_a_policy_has_no_figure(loaded, text):
    """At 20 % Quest has two pages; at 24 % three of a text, and two of a question."""
    model, tokenizer = loaded
    asked = sweep("quest", "tova", budgets=(0.2, 0.24, 0.5), samples=1, new=0, steps=2)
    records = run(model, tokenizer, text, asked)
    own = [cell for cell in asked.cells() if cell.form.name == "quest"]
    assert {cell.share for cell in own} == {0.24, 0.5}
    assert {(cell.measure, cell.share) for cell in own if cell.key in records} == {
        ("steps", 0.24),
        *((measure, 0.5) for measure in asked.measures),
    }
    table = report.markdown(asked, report.summary(asked, records), "Quest")
    assert report.NO_FIGURE in table
    steps = next(line for line in table.splitlines() if line.startswith("| quest |"))
    assert steps.startswith("| quest | - | ")
    assert steps.count(" - ") == 1


@torch.inference_mode()
def test_perplexities_are_those_of_a_cache_of_the_policy(loaded, text):
    model, tokenizer = loaded
    asked = sweep("heavy.age", "snapkv", "quest", tasks=())
    records = run(model, tokenizer, text, asked)
    pieces = torch.stack(spread(text, 224, 3))
    for form in (DENSE, *asked.forms):
        policy = "everything()" if form is DENSE else form.at(0.3, 200)
        share = 1 if form is DENSE else 0.3
        for row, ids in enumerate(pieces):
            start = row // 2 * 2
            for measure in ("once", "steps"):
                if form.name == "quest" and measure == "once":
                    assert not any(f"once/{start}/quest" in cell.key for cell in asked.cells())
                    continue
                cache = ls.kv.cache(model, policy)
                model(ids[None, :200], past_key_values=cache)
                if measure == "once":
                    cache.compress()
                    logits = model(ids[None, 200:224], past_key_values=cache).logits[0, :-1]
                    target = ids[201:224]
                else:
                    logits = torch.cat(
                        [
                            model(ids[None, i : i + 1], past_key_values=cache).logits[0]
                            for i in range(200, 205)
                        ]
                    )
                    target = ids[201:206]
                nll = torch.nn.functional.cross_entropy(logits, target).item()
                found = records[f"{measure}/{start}/{form.key}/{share}"]["nll"][row - start]
                assert found == pytest.approx(nll, abs=2e-4), (form.name, measure)


@torch.inference_mode()
def test_answers_are_those_that_generate_gives(loaded):
    model, tokenizer = loaded
    asked = sweep("tova", "adakv", new=0, steps=0, later=False)
    records = run(model, tokenizer, [], asked)
    drawn = [fitting(tokenizer, "passkey.code", 200, f"0/passkey.code/{i}") for i in range(3)]
    said_by_dense = []
    for form in (DENSE, *asked.forms):
        for number, sample in enumerate(drawn):
            ids = [*tokenizer.encode(sample.context), *tokenizer.encode(sample.question)]
            start = number // 2 * 2
            record = records[f"passkey.code/{start}/{form.key}/{1 if form is DENSE else 0.3}"]
            # The budget is that of the longest prompt of a batch.
            longest = max(
                len(tokenizer.encode(s.context)) for s in drawn[start : start + 2]
            ) + max(len(tokenizer.encode(s.question)) for s in drawn[start : start + 2])
            policy = "everything()" if form is DENSE else form.at(0.3, longest)
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                past_key_values=ls.kv.cache(model, policy),
                max_new_tokens=6,
                do_sample=False,
            )
            said = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
            ours = record["said"][number - start]
            # A batch stops as soon as all its answers are there.
            assert said.startswith(ours)
            assert record["score"][number - start] == score(said, sample.answers)
            said_by_dense += [said] * (form is DENSE)
    assert len(set(said_by_dense)) == 3


def test_asked_later_a_policy_cannot_know_the_question(loaded):
    model, tokenizer = loaded
    asked = sweep("tova.bare", "duo", new=0, steps=0, samples=2)
    records = run(model, tokenizer, [], asked)
    figures = report.summary(asked, records)
    assert list(figures) == ["passkey.code", "passkey.code later"]
    for rows in figures.values():
        assert rows["dense"]["1"]["value"] == 1.0
        assert rows["tova.bare"]["1"]["value"] == 1.0
        assert rows["duo"]["0.3"]["kept"] == pytest.approx(0.3, abs=0.04)
    assert records["gates"]["task"] == "passkey.code"
    assert len(records["gates"]["gates"]) == 4


@torch.inference_mode()
def test_gates_are_the_attention_between_sinks_and_recent_tokens(loaded):
    model, _ = loaded
    ids = torch.randint(0, 2000, (2, 150), generator=torch.Generator().manual_seed(2))
    cache = ls.kv.cache(model, waiting(["snapkv(1, window=64)"]))
    model(ids, past_key_values=cache)
    gates = torch.tensor(streaming_gates(cache))
    ls.hf.remove(model)
    kept = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        weights = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(kept)
    for layer, weight in enumerate(weights):
        between = weight[:, :, 86:, 4 : 86 - 32].sum(-1).mean((0, 2))
        expected = between.view(4, 2).mean(1)
        torch.testing.assert_close(gates[layer], expected, rtol=0, atol=1e-4)


def test_sparse_prefill_is_measured_with_its_density(loaded, text):
    model, tokenizer = loaded
    asked = sweep(prefill=["block_topk"], samples=1, later=True)
    figures = report.summary(asked, run(model, tokenizer, text, asked))
    assert "block_topk" not in str(figures["steps"])
    assert "block_topk" not in str(figures["passkey.code later"])
    rows = figures["once"]["prefill block_topk"]
    assert rows["1"]["value"] == pytest.approx(figures["once"]["dense"]["1"]["value"], rel=1e-4)
    assert rows["1"]["density"] == 1.0
    assert 0.2 < rows["0.3"]["density"] < 0.5
    assert rows["0.3"]["value"] != rows["1"]["value"]
    written = report.markdown(asked, figures, "Title")
    assert f"({rows['0.3']['density']:.0%})" in written


def test_records_are_continued_and_grow(loaded, text, tmp_path):
    model, tokenizer = loaded
    path = tmp_path / "kv.jsonl"

    def measured(asked, limit=None):
        before = path.read_text().count("\n") if path.exists() else 1
        run(
            model,
            tokenizer,
            text,
            asked,
            limit=limit,
            records=Records(path, asked.settings()),
        )
        return path.read_text().count("\n") - before

    small = sweep("recent", budgets=(0.3,), tasks=(), steps=0)
    assert measured(small, limit=1) == 1
    assert measured(small) == 3
    assert measured(small) == 0
    assert measured(sweep("recent", "tova", budgets=(0.3, 0.5), tasks=(), steps=0)) == 6
    with pytest.raises(DataError, match="seed was 0, is 1"):
        measured(sweep("recent", budgets=(0.3,), tasks=(), steps=0, seed=1))
    with pytest.raises(InputError, match="limit is at least 1"):
        measured(small, limit=0)
    with pytest.raises(DataError, match="The text gives 0 of 3 pieces"):
        run(model, tokenizer, [text[0][:50]], small)


def test_tables_say_from_which_budget_on_it_is_enough():
    asked = sweep("recent", "tova", budgets=(0.3, 0.5, 1.0), tasks=(), steps=0)
    values = {"dense": {"1": 10.0}, "recent": {"0.3": 11.0, "0.5": 10.4, "1": 10.0}}
    values["tova"] = {"0.3": 10.1, "0.5": 12.0, "1": 11.0}
    figures = {
        "once": {
            form: {share: {"value": value, "bytes": 0.5} for share, value in row.items()}
            for form, row in values.items()
        }
    }
    written = report.markdown(asked, figures, "Title")
    assert "| dense | 10.00 | 10.00 | 10.00 |" in written
    assert "| recent | 11.00 | 10.40 | 10.00 |" in written
    assert "| recent | 50% |" in written
    assert "| tova | not here |" in written
    assert "| recent | 50% | 50% | 50% |" in written
    assert math.isclose(report._mean([{"nll": [1.0, 3.0]}, {"nll": [2.0]}])["value"], math.exp(2))
