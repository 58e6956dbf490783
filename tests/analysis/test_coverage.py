"""Coverage against the published tables, brute force, and its own sampled form."""

from __future__ import annotations

import json

import numpy as np
import pytest

import longspan as ls
from longspan.analysis import reach
from longspan.analysis.reach import sampled_rows, share_and_error
from longspan.analysis.relation import Relation
from longspan.errors import PatternError, PlanError

FLOW_HALF = ls.PerHead(*(ls.SCCA.fixed(8, shift=4 * s) for s in range(1, 8)))


@pytest.mark.parametrize(
    ("pattern", "heads", "blind", "never", "depth"),
    [
        (ls.ShiftedChunk(8), 2, 0, 0, 15),
        (ls.SCCA.fixed(8), 4, 0, 0, 8),
        (ls.SCCA.fixed(8, shift=8), 4, 0, 0, 7),
        (ls.SCCA.flow(8, wrap="none"), 8, 0, 0, 1),
        (ls.SCCA.flow(8), 8, 0, 0, 1),
        (FLOW_HALF, 14, 0, 0, 2),
        (ls.SCCA.flow(8, wrap="none"), 4, 0, 0, 3),
        (ls.Chunk(8), 1, 7, 64 * 63 // 2 - 8 * 28, 1),
    ],
    ids=str,
)
def test_reach_table_of_64_tokens_in_chunks_of_8(pattern, heads, blind, never, depth):
    """Rows without predecessor, pairs never reached and layers to the fixpoint."""
    found = ls.coverage(pattern, 64, heads=heads, layers=2)
    assert (found.blind_rows, found.never, found.depth) == (blind, never, depth)


def test_shifted_chunk_reaches_a_chunk_then_half_a_chunk_further_per_layer():
    token = np.arange(64)
    one = Relation(ls.plan(ls.ShiftedChunk(8), n=64, heads=2))
    seen = token == 63
    first = []
    for _ in range(4):
        seen = seen | one.keys(seen)
        first.append(int(token[seen].min()))
    assert first == [56, 52, 48, 44]


def test_longnet_reaches_what_the_published_table_says_and_then_no_more():
    """192 tokens in segments of 12 to 192, 12 heads: shares after 1, 2, 3, 4 layers."""
    longnet = ls.LongNet((12, 24, 48, 96, 192), (1, 2, 4, 6, 12))
    found = ls.coverage(longnet, 192, heads=12, layers=5)
    shares = [one.share for one in found.reach]
    assert shares == pytest.approx([0.223, 0.842, 0.986, 0.993, 0.993], abs=5e-4)
    assert found.never == 130
    assert not np.linalg.matrix_power(longnet.mask(192, 12).any(axis=0).astype(float), 8)[12, 11]
    both = ls.coverage(
        ls.LongNet((12, 24, 48, 96, 192), (1, 2, 4, 6, 12), causal=False), 192, heads=12
    )
    assert [one.share for one in both.reach[:2]] == pytest.approx([0.219, 1.0], abs=5e-4)
    few = ls.coverage(
        ls.LongNet((8, 32, 128), (1, 4, 16), offsets="torchscale"), 128, heads=4, layers=1
    )
    assert 1 - few.never / (128 * 129 / 2) == pytest.approx(0.71, abs=5e-3)


def test_mixed_heads_cross_segments_sooner():
    """SCCA fixed in chunks of 8 takes 8 layers over 64 tokens; with SDA in other heads, 3."""
    mixed = ls.PerHead(ls.SCCA.fixed(8), ls.SDA(32, 4))
    assert ls.coverage(mixed, 64, heads=8).depth == 3


def test_window_figures_by_hand():
    found = ls.coverage(ls.Window(3), 6, layers=2)
    assert found.keys_min == 1
    assert found.keys_max == 3
    assert found.keys_mean == pytest.approx((1 + 2 + 3 * 4) / 6)
    assert found.density == pytest.approx(15 / 36)
    assert found.legal_density == found.union == pytest.approx(15 / 21)
    assert [one.share for one in found.reach] == pytest.approx([15 / 21, 20 / 21])
    assert found.depth == 3


def test_prefix_seen_by_all_still_looks_ahead_step_by_step():
    both = ls.Window(3, causal=False) | ls.Prefix(1)
    found = ls.coverage(both, 32, layers=1)
    assert not found.causal
    assert found.density == found.union
    assert found.never == 0
    # All see token 0, but it sees one token ahead only: 31 steps to the last one.
    assert found.depth == 31


def brute_force(pattern: ls.Pattern, n: int, heads: int, layers: int) -> list[np.ndarray]:
    """Reach by sets, one layer after another."""
    knows = [{i} for i in range(n)]
    found = []
    for layer in range(layers):
        sees = pattern.mask(n, heads, layer).any(axis=0)
        knows = [knows[i].union(*(knows[j] for j in range(n) if sees[i, j])) for i in range(n)]
        found.append(np.array([[j in knows[i] for j in range(n)] for i in range(n)]))
    return found


@pytest.mark.parametrize(
    "pattern",
    [
        ls.SCCA.flow(3),
        ls.PerLayer(ls.Chunk(5, causal=False), ls.Chunk(5, offset=2, causal=False)),
        ls.PerLayer(ls.Window(2), ls.Chunk(7), ls.Sink(2)),
        ls.Window(2) | ls.Document(9, 4) & ls.Causal(),
    ],
    ids=str,
)
def test_reach_equals_sets_passed_from_layer_to_layer(pattern):
    n, heads, layers = 23, 2, 5
    found = ls.coverage(pattern, n, heads=heads, layers=layers)
    legal = n * (n + 1) / 2 if found.causal else n * n
    steps = brute_force(pattern, n, heads, 40)
    assert [one.share for one in found.reach] == pytest.approx(
        [step.sum() / legal for step in steps[:layers]]
    )
    assert found.never == legal - steps[-1].sum()
    changes = [0] + [a.sum() for a in steps]
    assert found.depth == max(at for at in range(1, 41) if changes[at] != changes[at - 1])


@pytest.mark.parametrize("exact_up_to", [1024, 1])
@pytest.mark.parametrize(
    ("pattern", "enough"),
    [
        (ls.Window(2), 39),
        (ls.Window(1), 1),
        (ls.Chunk(8), 1),
        (ls.PerLayer(ls.Window(2), ls.Chunk(7), ls.Sink(2)), 17),
        (ls.PerLayer(ls.Chunk(5, causal=False), ls.Chunk(5, offset=2, causal=False)), 15),
    ],
    ids=str,
)
def test_layers_beyond_the_last_that_adds_something_take_no_walk(
    pattern, enough, exact_up_to, monkeypatch
):
    calls = []
    for kind, name in ((Relation, "keys"), (reach._Step, "times")):
        own = getattr(kind, name)

        def counted(self, mask, own=own):
            calls.append(mask)
            return own(self, mask)

        monkeypatch.setattr(kind, name, counted)
    few, many = (
        ls.coverage(pattern, 40, layers=layers, exact_up_to=exact_up_to, samples=2)
        for layers in (enough, 2000)
    )
    assert len(calls) < 1000
    assert [one.share for one in many.reach[:enough]] == [one.share for one in few.reach]
    assert {one.share for one in many.reach[enough:]} == {few.reach[-1].share}
    assert many.complete == few.complete
    assert (many.depth, many.never) == (few.depth, few.never)


@pytest.mark.parametrize("n", [23, 100])
@pytest.mark.parametrize("keys", [1, 3, 90])
def test_a_layer_joins_rows_as_a_product_does(n, keys):
    rng = np.random.default_rng(keys)
    sees = (rng.random((n, n)) < keys / n) | np.eye(n, dtype=bool)
    reached = rng.random((n, n)) < 0.2
    expected = (sees.astype(int) @ reached.astype(int)) > 0
    assert (reach._Step(sees).times(reached) == expected).all()


@pytest.mark.parametrize(
    "pattern",
    [
        ls.Window(16) | ls.Sink(2),
        ls.SCCA.flow(32),
        ls.ShiftedChunk(32),
        ls.PerLayer(ls.Chunk(32, causal=False), ls.Chunk(32, offset=16, causal=False)),
        ls.SSA(16, 8, anchors=(0, 40, 90, 200)),
        ls.Dilated(9, (1, 4)),
        ls.Neighborhood(9, dilation=4),
        ls.LongNet((32, 128, 512), (1, 4, 8)),
        ls.RandomBlocks(16, 2) | ls.Window(8),
    ],
    ids=str,
)
def test_sampled_agrees_with_exact_within_its_error(pattern):
    exact = ls.coverage(pattern, 512, heads=4, layers=3)
    sampled = ls.coverage(pattern, 512, heads=4, layers=3, exact_up_to=1)
    for name in ("density", "legal_density", "keys_min", "keys_mean", "keys_max", "blind_rows"):
        assert getattr(sampled, name) == pytest.approx(getattr(exact, name)), name
    assert sampled.samples == 256
    assert sampled.never is None
    pairs = [(sampled.union, sampled.union_error, exact.union)]
    pairs += [(s.share, s.error, e.share) for s, e in zip(sampled.reach, exact.reach, strict=True)]
    for share, error, truth in pairs:
        assert abs(share - truth) <= 4 * error + 1e-12
        assert error < 0.01


@pytest.mark.parametrize("kind", ["every seventh", "window", "strided", "both ways"])
def test_sampled_shares_hit_the_truth_and_their_error_is_honest(kind):
    """The mean of many runs is the truth, their spread the stated error, and seldom far off."""
    n = 2000
    row = np.arange(n)
    allowed = np.full(n, n) if kind == "both ways" else row + 1
    reached = {
        "every seventh": (row % 7 == 0) * 100.0,
        "window": np.minimum(allowed, 100.0),
        "strided": row // 8 + 1.0,
        "both ways": 101.0 - (50 - row).clip(0) - (row - (n - 51)).clip(0),
    }[kind]
    truth, runs = reached.sum() / allowed.sum(), []
    for seed in range(400):
        rows = sampled_rows(n, 64, seed)
        assert len(rows) == 66
        assert (np.diff(rows[1:-1].reshape(-1, 2).mean(1)) > 0).all()
        runs.append(share_and_error(reached[rows], allowed[rows], allowed.mean()))
    shares, errors = np.array(runs).T
    assert shares.mean() == pytest.approx(truth, abs=4 * shares.std() / 20)
    assert 0.85 < np.sqrt((errors**2).mean()) / shares.std() < 3
    assert (abs(shares - truth) > 2 * errors).mean() < 0.1


@pytest.mark.parametrize("samples", [8, 64, 256])
@pytest.mark.parametrize("seed", range(5))
def test_what_lies_on_a_line_over_the_legal_keys_is_exact(samples, seed):
    rows = sampled_rows(5000, samples, seed)
    allowed, mean = rows + 1, 2500.5
    assert share_and_error(1.0 * allowed, allowed, mean) == (pytest.approx(1, abs=1e-12), 0)
    share, error = share_and_error(300 + allowed / 4, allowed, mean)
    assert (share, error) == (pytest.approx(0.25 + 300 / mean, abs=1e-12), 0)


@pytest.mark.parametrize("samples", [2, 4, 6])
def test_few_samples_are_no_line(samples):
    """Shares between 0 and 1 that rise with the layers, and all of causal()."""
    for seed in range(10):
        few = {"samples": samples, "seed": seed, "heads": 4, "layers": 3, "exact_up_to": 0}
        found = ls.coverage(ls.LongNet((32, 128, 512), (1, 4, 8)), 2000, **few)
        shares = [found.union, *(one.share for one in found.reach)]
        assert shares == sorted(shares)
        assert ls.coverage(ls.Causal(), 2000, **few).union == pytest.approx(1, abs=1e-12)


def test_large_n_needs_no_dense_mask():
    found = ls.coverage(ls.Window(4096) | ls.Sink(4), 400_000, heads=32, layers=2, samples=4)
    assert found.keys_max == 4100
    assert found.samples == 4


def test_text_and_json():
    found = ls.coverage(ls.Chunk(4), 16, heads=2, layers=2)
    text = str(found)
    assert "coverage of chunk(4)" in text
    assert "never        96 pairs, such as token 4 to 0" in text
    assert "not seen by 3 tokens" in text
    assert "complete     after 15 layers" in str(ls.coverage(ls.Window(2), 16))
    again = json.loads(json.dumps(found.to_dict()))
    assert again["reach"][1] == {"layers": 2, "share": 40 / 136, "error": 0.0}
    assert again["never_examples"][0] == [4, 0]
    sampled = str(ls.coverage(ls.Chunk(4), 16, exact_up_to=8, samples=4))
    assert "from 4 sampled queries" in sampled


def test_errors_name_what_is_wrong():
    with pytest.raises(PlanError, match="layers must be a whole number of at least 1, got 0"):
        ls.coverage(ls.Causal(), 8, layers=0)
    with pytest.raises(PlanError, match="samples must be a whole number of at least 2, got 1"):
        ls.coverage(ls.Causal(), 8, samples=1)
    for name, value in (("seed", -1), ("seed", 1.5), ("exact_up_to", "all"), ("layers", True)):
        with pytest.raises(PlanError, match=f"{name} must be a whole number"):
            ls.coverage(ls.Causal(), 8, **{name: value})
    given = ls.coverage("window(3)", np.int64(8), heads=np.int64(2), layers=np.int64(2))
    assert json.loads(json.dumps(given.to_dict()))["n"] == 8
    with pytest.raises(PatternError, match="expected a pattern as text, got 3"):
        ls.coverage(3, 8)
    assert ls.coverage("window(3)", 8) == ls.coverage(ls.Window(3), 8)
    with pytest.raises(PlanError, match="n must be a whole number"):
        ls.coverage(ls.Causal(), 0)
    with pytest.raises(PatternError, match="evenly over 3 query heads"):
        ls.coverage(ls.PerHead(ls.Causal(), ls.Window(2)), 8, heads=3)


@pytest.mark.parametrize(("n", "heads"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_shortest_sequences(n, heads):
    found = ls.coverage(ls.SCCA.flow(4), n, heads=heads)
    assert found.reach[0].share == 1.0
    assert found.never == 0


def test_layers_that_nobody_could_wait_for():
    with pytest.raises(PlanError, match="layers must be at most 100,000, got 1,000,000,000"):
        ls.coverage("window(64)", 4096, layers=10**9)
