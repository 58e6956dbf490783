"""Plans mean what their patterns say, in every layout of rows, and cost O(N m)."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest

import longspan as ls
from longspan.errors import PatternError, PlanError

TEXTS = [
    "causal()",
    "dense()",
    "window(4) | sink(2)",
    "window(5, causal=false)",
    "chunk(4, offset=1)",
    "shifted_chunk(4)",
    "scca.fixed(4)",
    "scca.fixed(4, shift=4)",
    "scca.flow(4)",
    "scca.flow(4, wrap=none)",
    "scca.flow(4, causal=false)",
    "document(3, 4) & causal()",
    "causal() | prefix(3)",
    "heads(window(2), scca.flow(3)) - sink(1)",
    "window(9) - window(3) | sink(1)",
]


def tiles_by_hand(mask, block):
    return sum(
        bool(head[i : i + block, j : j + block].any())
        for head in mask
        for i in range(0, mask.shape[1], block)
        for j in range(0, mask.shape[2], block)
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("n", [1, 5, 13])
def test_plan_equals_predicate(text, n):
    pattern = ls.parse(text)
    plan, mask = ls.plan(pattern, n, heads=4), pattern.mask(n, heads=4)
    np.testing.assert_array_equal(plan.mask()[0], mask)
    assert plan.pairs == mask.sum()
    assert plan.density == pytest.approx(mask.mean())
    assert plan.tiles(block=3) == tiles_by_hand(mask, 3)
    assert plan.flops(head_dim=64) == 4 * 64 * mask.sum()


@pytest.mark.parametrize("text", TEXTS)
def test_padding_and_packing_equal_separate_runs(text):
    pattern = ls.parse(text)
    segments = np.array(
        [
            [-1, -1, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, -1, -1],
            [0, 0, 0, 5, 5, 5, 5, 5, 2],
            [-1, 1, 1, -1, 0, 0, 0, -1, -1],
            [0, 0, 0, -1, -1, 0, 0, 0, 0],
        ]
    )
    found = ls.plan(pattern, 9, heads=4, segments=segments).mask()
    for row, mask in zip(segments, found, strict=True):
        for segment in set(row[row >= 0].tolist()):
            rows = np.flatnonzero(row == segment)
            alone = pattern.mask(len(rows), heads=4)
            np.testing.assert_array_equal(mask[:, rows][:, :, rows], alone)
        same = (row[:, None] == row[None, :]) & (row[:, None] >= 0)
        assert not (mask & ~same).any()


@pytest.mark.parametrize("text", [t for t in TEXTS if ls.parse(t).is_causal])
def test_decoding_equals_the_last_row(text):
    pattern = ls.parse(text)
    for n in range(1, 14):
        last = pattern.mask(n, heads=4)[:, -1:]
        np.testing.assert_array_equal(ls.plan(pattern, 1, heads=4, keys=n).mask()[0], last)


def test_a_cache_with_holes_and_a_shard_are_other_positions():
    pattern = ls.parse("scca.flow(4) | sink(1)")
    whole = pattern.mask(20, heads=3)
    kept = np.array([0, 3, 4, 9, 10, 11, 15, 17, 18])
    holes = ls.plan(pattern, 2, heads=3, keys=len(kept), positions=[18, 19], key_positions=kept)
    np.testing.assert_array_equal(holes.mask()[0], whole[:, 18:20][:, :, kept])
    shard = ls.plan(
        pattern, 5, heads=3, keys=7, positions=range(10, 15), key_positions=range(3, 10)
    )
    np.testing.assert_array_equal(shard.mask()[0], whole[:, 10:15, 3:10])


def test_heads_of_one_class_share_their_ranges():
    assert ls.plan(ls.Window(8), 64, heads=32).passes[0].lo.shape[1] == 1
    assert ls.plan(ls.ShiftedChunk(8), 64, heads=32).passes[0].lo.shape[1] == 2
    assert ls.plan(ls.SCCA.flow(8), 64, heads=32).passes[0].lo.shape[1] == 32


def test_print_explains():
    text = str(ls.plan(ls.Window(512) | ls.Sink(4), 4096, heads=8))
    for word in ("window(512) | sink(4)", "4,096 queries", "pairs", "FLOP", "tiles", "ranges"):
        assert word in text
    share = float(re.search(r"([\d.]+)% of causal", text).group(1))
    mask = (ls.Window(512) | ls.Sink(4)).mask(4096)
    assert share == pytest.approx(100 * mask.sum() / (4096 * 4097 / 2), abs=0.001)


def test_print_says_no_share_of_causal_where_there_is_none():
    more_queries = ls.plan("causal()", 4, positions=[0, 0, 1, 1], key_positions=[0, 1], keys=2)
    assert "% of causal" not in str(more_queries)
    assert "100.000% of causal" in str(ls.plan("causal()", 3, keys=8))


@pytest.mark.parametrize("how", [{"n": None}, {"n": 4, "heads": None}, {"n": True}, {"n": 2.0}])
def test_lengths_that_are_none(how):
    with pytest.raises(PlanError, match="must be a whole number from 1 to"):
        ls.plan("window(4)", **how)


def test_segments_that_would_wrap():
    with pytest.raises(
        PlanError, match=r"segments must be below 2\*\*63, got 18446744073709551615"
    ):
        ls.plan("window(4)", 3, segments=np.full(3, 2**64 - 1, np.uint64))


def test_a_million_tokens_stay_under_a_gigabyte():
    code = (
        "import longspan as ls;"
        "p = ls.plan(ls.SCCA.flow(4096), 1 << 20, heads=32);"
        "status = open('/proc/self/status').read();"
        "print(p.nbytes, status.split('VmHWM:')[1].split()[0])"
    )
    # Not getrusage, whose peak a process inherits from the one that starts it.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ranges, peak_kib = map(int, run.stdout.split())
    assert ranges == 2 * 32 * (1 << 20) * 4
    assert peak_kib < 1 << 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, ["n must be", "0"]),
        ({"n": 4, "heads": 2.5}, ["heads", "2.5"]),
        ({"n": 5, "keys": 3}, ["5 query rows", "3 key rows", "positions="]),
        ({"n": 4, "positions": [0, 1, 2]}, ["positions", "[4]", "[3]"]),
        ({"n": 4, "positions": [0.0, 1, 2, 3]}, ["whole numbers", "float64"]),
        ({"n": 4, "positions": [0, 1, 0, 1]}, ["rise", "segments="]),
        ({"n": 4, "positions": [-1, 0, 1, 2]}, ["-1"]),
        ({"n": 4, "segments": [0, 1, 0, 1]}, ["two places"]),
        ({"n": 2, "keys": 4, "segments": [0, 0]}, ["key_segments="]),
        ({"n": 4, "segments": [[0] * 4] * 2, "positions": [[0, 1, 2, 3]] * 3}, ["batch sizes"]),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(PlanError) as caught:
        ls.plan(ls.Window(2), **arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_pattern_in_text_form():
    assert ls.plan("window(3) | sink(1)", 9).mask().tolist() == (
        ls.plan(ls.Window(3) | ls.Sink(1), 9).mask().tolist()
    )
    with pytest.raises(PatternError, match="did you mean 'window'"):
        ls.plan("windw(3)", 4)
    with pytest.raises(PatternError, match=r"its text form, got 3 \(int\)"):
        ls.plan(3, 4)


def test_an_order_is_not_chosen_anew_for_each_token(monkeypatch):
    planning = importlib.import_module("longspan.planning.plan")
    planning._choice_for_few.cache_clear()
    calls = []
    choose = planning.choose
    monkeypatch.setattr(planning, "choose", lambda *given: calls.append(given) or choose(*given))
    for keys in range(1000, 1100):
        ls.plan("ssa(64, 8)", 1, 8, keys=keys)
    ls.plan("ssa(64, 8)", np.int64(1), np.int64(8), keys=np.int64(1000))
    assert len(calls) == 2
    # Of few keys each number has its own.
    for keys in range(1, 9):
        assert ls.plan("ssa(4, 2)", 1, 8, keys=keys).mask().any(-1).all()
    assert len(calls) == 10
