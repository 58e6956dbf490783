"""Advice: candidates fit, ranks follow from the rule, needs filter, nothing wrong is timed."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

import longspan as ls
from longspan.analysis import kept_tokens
from longspan.bench import admit
from longspan.bench.advise import Advise, Budget, advise, measure
from longspan.bench.advise.candidates import Candidate, Sizes, fitted, given
from longspan.bench.advise.facts import Facts, facts
from longspan.bench.advise.families import FAMILIES
from longspan.bench.advise.rank import SLACK, Standing, beats, ranked
from longspan.bench.advise.resize import Sought
from longspan.bench.advise.words import cannot, note, unmet
from longspan.bench.memory import in_fresh_process
from longspan.bench.setting import Setting
from longspan.cli.app import main
from longspan.errors import InputError, LongspanError
from longspan.eval.records import Records

SMALL = Setting(n=192, heads=4, key_heads=2, width=16)
FEW = ("window(16)", "window(16) | sink(4)", "strided(4)")


def ask(**changed) -> Advise:
    usual = {
        "lengths": (192,),
        "setting": SMALL,
        "layers": 4,
        "candidates": FEW,
        "rounds": 2,
        "memory": False,
        "budget": Budget(kind="keys", amount=64),
    }
    return Advise(**{**usual, **changed})


def call(asked: Advise, **options):
    (found,) = advise(asked, Records(None, {}), **options)
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "heads", "keys"), [(1024, 8, 100), (2048, 4, 301), (700, 1, 64)])
def test_candidates_fit_the_budget(n, heads, keys, causal):
    made = 0
    for family in FAMILIES:
        if causal not in family.ways:
            continue
        one = fitted(family, Sizes(keys=keys, n=n, heads=heads, causal=causal))
        if isinstance(one, str):
            assert "no form of it" in one
            continue
        made += 1
        assert one.pattern == ls.parse(one.text)
        assert one.pattern.is_causal == causal
        period = 2 if family.name == "swin" else 1
        pairs = np.mean([ls.plan(one.pattern, n, heads, layer=at).pairs for at in range(period)])
        assert pairs <= keys * heads * n
        assert one.keys == pytest.approx(pairs / (heads * n))
        # What is far below it was not scaled from it.
        assert one.keys > 0.3 * keys, one.text
    assert made >= (8 if heads > 1 else 5)


def test_every_family_is_offered():
    names = {True: set(), False: set()}
    for family in FAMILIES:
        for causal in family.ways:
            one = fitted(family, Sizes(keys=300, n=2048, heads=8, causal=causal))
            assert isinstance(one, Candidate), one
            names[causal].add(family.name)
    assert len(names[True]) == 16
    assert len(names[False]) >= 11


def test_what_does_not_fit_is_named():
    said = fitted(FAMILIES[0], Sizes(keys=1, n=100, heads=2, causal=True))
    assert "no form of it has at most 1 keys" in str(said)


@pytest.mark.parametrize("n", [300, 3000])
@pytest.mark.parametrize("w", [51, 100])
def test_layers_until_all_is_reached_by_a_window(n, w):
    """Each layer reaches w - 1 tokens further, whether pairs are followed or sampled."""
    found = ls.coverage(ls.Window(w), n, heads=2, layers=64, samples=8)
    assert found.complete == math.ceil((n - 1) / (w - 1))
    assert ls.coverage(ls.Window(w), n, layers=2, samples=8).complete is None


@pytest.mark.parametrize(
    "text", ["window(9) | sink(2)", "scca.flow(16)", "strided(4)", "chunk(8)"]
)
def test_kept_tokens_are_those_that_later_queries_see(text):
    pattern, n = ls.parse(text), 60
    later = pattern.mask(2 * n, 4)[:, n:, :n].any(axis=1)
    each = later.reshape(2, 2, n).any(axis=1).sum(axis=1)
    assert kept_tokens(pattern, n, 4, 2) == each.mean()


def test_facts_are_those_of_the_mask():
    pattern, n, heads = ls.parse("ssa(8, 4)"), 200, 4
    mask = pattern.mask(n, heads)
    known = facts(pattern, n, heads, heads, 3)
    assert known.keys == pytest.approx(mask.sum() / (heads * n))
    assert known.one_layer == pytest.approx(mask.any(axis=0).sum() / np.tri(n).sum())
    assert known.drop_in
    assert not facts(ls.Window(8), n, heads, heads, 3).drop_in
    chunks = facts(ls.Chunk(8), n, heads, heads, 3)
    assert chunks.blind == n // 8 - 1
    assert chunks.complete is None
    near = np.triu(np.tri(n, dtype=bool), -31)
    window = facts(ls.Window(8), n, heads, heads, 3)
    exact = ls.Window(8).mask(n)[0].sum() / near.sum()
    assert window.near == pytest.approx(exact, rel=0.05)


def standing(text: str, time: float | None, one: float, near: float, complete=None, keys=9.0):
    known = Facts(
        keys=keys,
        keys_max=9,
        one_layer=one,
        near=near,
        reached=one if complete is None else 1.0,
        complete=complete,
        blind=0,
        drop_in=False,
        growth=1.0,
        cache_tokens=1.0,
        samples=0,
    )
    return Standing(text=text, facts=known, time=time)


def test_fronts_then_what_is_preferred():
    a = standing("a", 0.50, 1.0, 0.5, 1)
    b = standing("b", 0.20, 0.3, 1.0, 8)
    c = standing("c", 0.30, 0.3, 1.0, 8)
    d = standing("d", 0.10, 0.2, 0.9)
    slow = standing("slow", 1.2, 0.9, 0.4, 2)
    dense = standing("dense", 1.0, 1.0, 1.0, 1)
    order = ranked([slow, d, c, b, a, dense], "sight")
    assert [one.text for one, _ in order] == ["dense", "a", "b", "d", "slow", "c"]
    assert [place.front for _, place in order] == [1, 1, 1, 1, 2, 2]
    assert [place.beaten_by for _, place in order[-2:]] == ["dense", "b"]
    quick = [one.text for one, _ in ranked([slow, d, c, b, a, dense], "time")]
    assert quick == ["d", "b", "a", "dense", "c", "slow"]


def test_times_within_the_slack_are_equal():
    a, b = standing("a", 0.20, 0.5, 1.0, 3), standing("b", 0.20 * (1 + 0.9 * SLACK), 0.5, 1.0, 3)
    assert not beats(a, b)
    assert not beats(b, a)
    more = standing("more", 0.20 * (1 + 0.9 * SLACK), 0.6, 1.0, 3)
    assert beats(more, a)
    assert beats(a, standing("c", 0.20 * (1 + 1.1 * SLACK), 0.5, 1.0, 3))


def test_nothing_of_a_front_is_beaten_in_it():
    draw = np.random.default_rng(0)
    some = [
        standing(f"{at}", *draw.choice([0.2, 0.4, 0.41, 0.8, 1.0], 3), int(draw.integers(1, 5)))
        for at in range(60)
    ]
    order = ranked(some, "sight")
    assert sorted(one.text for one, _ in order) == sorted(one.text for one in some)
    for one, place in order:
        rivals = [other for other, where in order if where.front >= place.front]
        assert not any(beats(other, one) for other in rivals)
        assert (place.front == 1) == (place.beaten_by is None)


def test_without_times_keys_count():
    few, many = standing("few", None, 0.5, 1.0, 2, 5.0), standing("many", None, 0.5, 1.0, 2, 50.0)
    assert [one.text for one, _ in ranked([many, few], "sight")] == ["few", "many"]


def test_needs_filter_and_say_why():
    asked = ask(within=2, previous=True, drop_in=True, layers=4)
    left = {one["pattern"]: one["why"] for one in call(asked, dry_run=True)["left_out"]}
    assert "after 2 layers" in left["window(16)"]
    assert "needs fine-tuning" in left["strided(4)"]
    assert "after 2 layers" in left["window(16) | sink(4)"]
    assert "fine-tuning" not in left["window(16) | sink(4)"]
    chunks = facts(ls.Chunk(16), 192, 4, 2, 4)
    assert any("never see" in one for one in unmet(chunks, ask(previous=True)))
    kept = call(ask(drop_in=True), dry_run=True)
    assert [one["pattern"] for one in kept["ranked"]] == ["window(16) | sink(4)"]
    assert kept["recommended"]["drop_in"]
    assert any("ls.hf.apply" in one["line"] for one in kept["recommended"]["use"])


def test_what_is_not_seen_is_said():
    said = cannot(facts(ls.Chunk(16), 192, 4, 2, 4), 4, True)
    assert "4 layers still hide" in said
    assert "more layers add nothing" in said
    assert cannot(facts(ls.Causal(), 192, 4, 2, 4), 4, True).startswith("Nothing")


def test_a_size_is_sought_between_what_fits_and_what_does_not():
    def entry(keys, taken):
        return {"keys": keys, "of_dense_time": taken}

    one = Sought(0.25)
    assert one.wanted(entry(100.0, 0.5)) == 50.0
    assert one.wanted(entry(50.0, 0.10)) == pytest.approx(math.sqrt(5000))
    assert one.wanted(entry(70.0, 0.24)) is None
    assert one.best is not None
    assert one.best["keys"] == 70.0
    # A stall of the machine makes nothing tiny.
    assert Sought(0.25).wanted(entry(100.0, 5.0)) == 50.0
    never = Sought(0.25)
    never.wanted(entry(100.0, 0.5))
    never.wanted(entry(50.0, 0.4))
    assert never.best == entry(50.0, 0.4)


def test_a_share_of_time_decides_by_measured_times(monkeypatch):
    right = measure._time

    def clock(asked, setting, rows, calls):
        right(asked, setting, rows, calls)
        for text, row in rows.items():
            # Twice the share of the keys: everything has to become half as large.
            row["of_dense_time"] = 2 * given(text, setting.n, setting.heads).keys / 96.5

    monkeypatch.setattr(measure, "_time", clock)
    budget = Budget(kind="time", amount=0.5)
    found = call(ask(budget=budget, candidates=("generated",), rounds=1))
    assert len(found["ranked"]) > 4
    for one in found["ranked"]:
        assert one["of_dense_time"] <= 0.5
        assert one["keys"] <= 0.25 * 96.5
    assert any(one["keys"] > 0.15 * 96.5 for one in found["ranked"])


def test_advice_is_measured_and_ranked():
    found = call(ask(train=True))
    assert found["timed"]
    assert found["n"] == 192
    assert {one["pattern"] for one in found["ranked"]} == set(FEW)
    for at, one in enumerate(found["ranked"], start=1):
        assert one["rank"] == at
        assert one["seconds"] > 0
        assert one["of_dense_time"] > 0
        assert one["kernels"]
        assert set(one["errors"][0]) == {"out", "dq", "dk", "dv"}
    assert found["recommended"]["pattern"] == found["ranked"][0]["pattern"]
    assert f'"{found["ranked"][0]["pattern"]}")' in found["recommended"]["use"][0]["line"]
    assert found["left_out"] == [
        {
            "family": "dense",
            "pattern": "causal()",
            "why": "over the budget (96.5; at most 64 keys per query)",
        }
    ]


def test_patterns_that_differ_between_layers_are_timed_in_each():
    records = Records(None, {})
    asked = ask(candidates=("layers(window(8), chunk(24))",))
    (found,) = advise(asked, records)
    (one,) = found["ranked"]
    assert one["layers"] == ["window(8)", "chunk(24)"]
    each = [records[f"{text} | 192 | forward"] for text in one["layers"]]
    assert one["seconds"] == pytest.approx(np.mean([row["seconds"] for row in each]))


def test_both_directions_are_held_against_dense_in_both():
    both = replace(SMALL, causal=False)
    assert both.dense_pairs == 4 * 192 * 192
    counted = call(ask(setting=both, candidates=("generated",), budget=None), dry_run=True)
    assert counted["budget"]["amount"] == 48
    assert {"window", "chunk", "swin"} <= {one["family"] for one in counted["ranked"]}
    found = call(ask(setting=both, candidates=("window(32, causal=false)", "swin(32)")))
    assert found["dense"]["pattern"] == "dense()"
    assert found["ranked"][0]["dense_seconds"] > 0
    assert any("ls.nn.Attention" in one["line"] for one in found["recommended"]["use"])
    assert in_fresh_process(None, replace(both, n=64), "forward") is not None


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(admit.oracle, "wrong", lambda found, dtype: {"out": 0.5})
    found = call(ask())
    assert found["ranked"] == []
    assert found["recommended"] is None
    assert found["note"].startswith("Nothing fits")
    assert sum("not equal to the oracle" in one["why"] for one in found["left_out"]) == 3


def test_dense_attention_is_recommended_where_it_fits():
    found = call(ask(lengths=(32,), candidates=("generated",)))
    assert found["recommended"]["family"] == "dense"
    assert "no pattern is needed" in found["note"]
    assert "scaled_dot_product_attention" in found["recommended"]["use"][0]["line"]
    slow = {"family": "window", "of_dense_time": 1.1}
    assert "no faster than dense" in str(note([slow]))
    assert note([{**slow, "of_dense_time": 0.5}]) is None


def test_what_is_recorded_is_not_measured_again(tmp_path, monkeypatch):
    asked, path = ask(), tmp_path / "advice.jsonl"
    (first,) = advise(asked, Records(path, asked.settings()))
    monkeypatch.setattr(measure, "in_turns", lambda *_, **__: pytest.fail("measured"))
    (again,) = advise(asked, Records(path, asked.settings()))
    assert again == first


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lengths": ()}, "at least one length"),
        ({"lengths": (1,)}, "at least 2"),
        ({"layers": 0}, "layers must be"),
        ({"rounds": 0}, "rounds must be"),
        ({"within": 5}, "from 1 to the model's 4"),
        ({"prefer": "beauty"}, "sight, time"),
        ({"candidates": ("windo(3)",)}, "windo"),
        ({"candidates": ("window(8, causal=false)",)}, "not causal"),
        ({"setting": replace(SMALL, causal=False)}, "not two-sided"),
        ({"budget": Budget(kind="memory", amount=5)}, "memory to be measured"),
        ({"budget": Budget(kind="cache", amount=5), "train": True}, "decoding"),
    ],
)
def test_wrong_questions_are_refused(changed, said):
    with pytest.raises(LongspanError, match=said):
        ask(**changed)


@pytest.mark.parametrize(
    ("kind", "amount"), [("keys", 0.5), ("time", 0), ("time", 1.5), ("luck", 1), ("keys", np.nan)]
)
def test_wrong_budgets_are_refused(kind, amount):
    with pytest.raises(InputError):
        Budget(kind=kind, amount=amount)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["longspan", "advise", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    return run


SIZES = ("--n", 128, "--heads", 2, "--head-dim", 16, "--layers", 4, "--quick", "--device", "cpu")


def test_the_command(command, tmp_path):
    picture = tmp_path / "advice.png"
    code, out, _ = command(*SIZES, "--out", tmp_path, "--picture", picture)
    assert code == 0
    for said in ("128 tokens, at most 16 keys per query; forward", "Does not see:", "Good for:"):
        assert said in out
    assert "Quality on text" in out
    assert "out = ls.attend(q, k, v," in out
    assert picture.stat().st_size > 1000
    again = command(*SIZES, "--out", tmp_path, "--json")[1]
    told = json.loads(again)
    assert set(told) == {"settings", "rule", "advice"}
    (one,) = told["advice"]
    keys = {"n", "budget", "train", "timed", "dense", "ranked", "left_out", "recommended", "note"}
    assert set(one) == keys
    entry = {"rank", "front", "why", "family", "pattern", "keys", "one_layer", "near", "complete"}
    entry |= {"reached", "drop_in", "cache_bytes", "seconds", "of_dense_time", "memory_bytes"}
    entry |= {"kernels", "good_for", "cannot_see", "growth", "dense_seconds", "spread"}
    for row in one["ranked"]:
        assert entry <= set(row)
        assert row["keys"] <= 16
    assert one["recommended"]["use"]


def test_a_dry_run_times_nothing(command, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "in_turns", lambda *_, **__: pytest.fail("measured"))
    code, out, _ = command(*SIZES, "--dry-run", "--out", tmp_path / "new")
    assert code == 0
    assert "window(16)" in out
    assert not (tmp_path / "new").exists()
    code, out, _ = command(*SIZES, "--bidirectional", "--dry-run", "--json")
    assert json.loads(out)["advice"][0]["timed"] is False


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--budget", 16, "--time-share", 0.5), "expected one budget"),
        (("--must-see", "everything"), "all and previous"),
        (("--within", 2), "--must-see all"),
        (("--picture", "a.gif"), "ends in .png"),
        (("--picture", "a.png", "--dry-run"), "give one of them"),
        (("--kv-heads", 3), "divide heads"),
        (("--budget", 0), "number from 1"),
        (("--picture", "no/such/a.png"), "cannot write"),
    ],
)
def test_wrong_options_are_named(command, asked, said):
    code, _, err = command(*SIZES, *asked)
    assert code == 2
    assert said in " ".join(err.split())
