"""What each policy keeps, against its definition; sums of budgets; what holds for all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.kv.oracles import as_positions, choose, guard, tokens, view, weights
from torch.nn import functional as F

import longspan.kv as kv
from longspan.errors import PolicyError
from longspan.kv.snapkv import pool
from longspan.kv.view import Moments

GROUP = 2


def per_group(seen, b, g):
    share = seen.queries.shape[1] // seen.keys.shape[1]
    return range(g * share, (g + 1) * share)


def kept(text, seen):
    return as_positions(seen, kv.parse(text).keep(seen))


def test_sinks_and_recent():
    seen = view()
    got = kept("sinks(3) + recent(5)", seen)
    for (b, g), positions in got.items():
        expected = [p for p in tokens(seen, b, g) if p < 3 or p >= int(seen.seen[b]) - 5]
        assert positions == expected


def test_default_protection():
    seen = view(n=60)
    for text in ("heavy(0)", "keynorm(0)", "tova(0)", "snapkv(0)"):
        expected = choose(seen, lambda b, g, p: 0, lambda b, g: 0, guard(seen))
        assert kept(text, seen) == expected
    assert kept("recent(9)", seen) == kept("sinks(4)+recent(9)", seen)
    nothing = kept("heavy(0)+sinks(0)+recent(0)", seen)
    assert all(not positions for positions in nothing.values())


@pytest.mark.parametrize("age", [False, True])
def test_heavy(age):
    seen = view()

    def score(b, g, p):
        total = float(seen.sums[b, g, tokens(seen, b, g)[p]])
        return total / (int(seen.seen[b]) - p) if age else total

    expected = choose(seen, score, lambda b, g: 6, guard(seen, 2, 3))
    assert kept(f"sinks(2)+recent(3)+heavy(6, {str(age).lower()})", seen) == expected


def test_heavy_by_coverage_takes_the_fewest():
    seen = view()
    got = kept("sinks(0)+recent(0)+heavy(coverage(0.6))", seen)
    for (b, g), positions in got.items():
        own = {p: float(seen.sums[b, g, c]) for p, c in tokens(seen, b, g).items()}
        goal = 0.6 * sum(own.values())
        ranked = sorted(own, key=lambda p: -own[p])
        count = next(k for k in range(len(ranked) + 1) if sum(own[p] for p in ranked[:k]) >= goal)
        assert positions == sorted(ranked[:count])


def test_tova_is_one_set_for_all_heads():
    seen = view(holes=False)
    seen = replace(seen, positions=seen.positions[:, :1].expand(-1, 2, -1).contiguous())
    rows = weights(seen, 1)

    def score(b, g, p):
        last = int(seen.seen[b]) - 1
        return sum(rows[b, h, last][tokens(seen, b, g)[p]] for h in range(4)) / 4

    expected = choose(seen, score, lambda b, g: 7, lambda b, g, p: False)
    got = kept("tova(7)+sinks(0)+recent(0)", seen)
    assert got == expected
    assert all(got[b, 0] == got[b, 1] for b in range(2))


def test_tova_counts_a_head_without_the_token_as_zero():
    seen = view()
    rows = weights(seen, 1)

    def score(b, g, p):
        last = int(seen.seen[b]) - 1
        where = [tokens(seen, b, own).get(p) for own in (0, 1)]
        return sum(rows[b, h, last].get(where[h // GROUP], 0.0) for h in range(4))

    expected = choose(seen, score, lambda b, g: 7, guard(seen, 1, 2))
    assert kept("tova(7)+sinks(1)+recent(2)", seen) == expected


def snap_score(seen, window, kernel, how):
    rows = weights(seen, window)

    def score(b, g, p):
        first = int(seen.seen[b]) - window
        before = sorted(q for q in tokens(seen, b, g) if q < first)
        place = tokens(seen, b, g)
        own = []
        for h in per_group(seen, b, g):
            total = {
                q: sum(rows[b, h, at].get(place[q], 0.0) for at in range(first, first + window))
                for q in before
            }
            if p not in total:
                return 0.0
            middle = before.index(p)
            near = before[max(0, middle - kernel // 2) : middle + kernel // 2 + 1]
            values = [total[q] for q in near]
            own.append(max(values) if how == "max" else sum(values) / len(values))
        return sum(own) / len(own)

    return score


@pytest.mark.parametrize(("kernel", "how"), [(1, "avg"), (5, "avg"), (3, "max")])
def test_snapkv(kernel, how):
    seen = view()
    score = snap_score(seen, 6, kernel, how)
    expected = choose(seen, score, lambda b, g: 5, guard(seen, 1, 6))
    got = kept(f"snapkv(5, 6, {kernel}, {how})+sinks(1)+recent(0)", seen)
    assert got == expected


def test_pooling_does_not_lower_the_first_keys():
    flat = torch.ones(1, 1, 9)
    assert (pool(flat, torch.ones(1, 1, 9, dtype=torch.bool), 5, "avg") == 1).all()
    lowered = F.avg_pool1d(flat, 5, 1, 2)
    assert lowered[0, 0, 0] < 1


def test_pyramid_sums_to_the_mean_over_layers():
    layers, base = 7, 5
    total = np.zeros((2, 2), int)
    for layer in range(layers):
        seen = view(n=40, queries=6, holes=False, layer=layer, layers=layers)
        keep = kv.parse(f"pyramidkv({base}, 6)+sinks(0)+recent(0)").keep(seen)
        total += keep.sum(-1).numpy() - 6
    assert (total == layers * base).all()


def test_adakv_spends_exactly_and_respects_the_floor():
    seen = view(n=40)
    base, floor = 6, 0.5
    got = kept(f"adakv(snapkv({base}, 6, 3, max), {floor})+sinks(2)+recent(0)", seen)
    score = snap_score(seen, 6, 3, "max")
    for b in range(2):
        own = {
            g: sorted(
                (p for p in tokens(seen, b, g) if not guard(seen, 2, 6)(b, g, p)),
                key=lambda p, g=g: -score(b, g, p),
            )
            for g in range(2)
        }
        least = int(floor * base)
        rest = sorted(((score(b, g, p), g) for g in own for p in own[g][least:]), reverse=True)
        counts = {g: least + sum(h == g for _, h in rest[: 2 * base - 2 * least]) for g in own}
        assert sum(counts.values()) == 2 * base
        for g in own:
            safe = [p for p in tokens(seen, b, g) if guard(seen, 2, 6)(b, g, p)]
            assert got[b, g] == sorted(safe + own[g][: counts[g]])


def test_adakv_with_a_full_floor_is_uniform():
    seen = view(n=40)
    both = "snapkv(6, 6, 7, max)"
    assert kept(f"adakv({both}, 1.0)", seen) == kept(both, seen)


def test_keydiff():
    seen = view()

    def score(b, g, p):
        unit = [
            seen.keys[b, g, c] / seen.keys[b, g, c].norm() for c in tokens(seen, b, g).values()
        ]
        anchor = sum(unit) / len(unit)
        return -float(unit[tokens(seen, b, g)[p]] @ anchor / anchor.norm())

    expected = choose(seen, score, lambda b, g: 6, guard(seen, 1, 2))
    assert kept("keydiff(6)+sinks(1)+recent(2)", seen) == expected
    louder = replace(seen, keys=3 * seen.keys)
    assert kept("keydiff(6)+sinks(1)+recent(2)", louder) == expected


def test_keynorm():
    seen = view()
    expected = choose(
        seen,
        lambda b, g, p: -float(seen.keys[b, g, tokens(seen, b, g)[p]].norm()),
        lambda b, g: 6,
        guard(seen, 1, 2),
    )
    assert kept("keynorm(6)+sinks(1)+recent(2)", seen) == expected


@pytest.mark.parametrize(("text", "sign"), [("", 1), (", false", -1)])
def test_embeddingnorm(text, sign):
    seen = view()
    expected = choose(
        seen,
        lambda b, g, p: sign * float(seen.norms[b, g, tokens(seen, b, g)[p]]),
        lambda b, g: 6,
        guard(seen, 1, 2),
    )
    assert kept(f"embeddingnorm(6{text})+sinks(1)+recent(2)", seen) == expected


def rope(x, places):
    """Half-split rotation of x [B, H, N, D] by places [B, N]."""
    half = x.shape[-1] // 2
    angle = places[:, None, :, None] * 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def test_expected_attention_is_the_mean_over_normal_queries():
    draw = torch.Generator().manual_seed(3)
    plain = torch.randn(2, 4, 50, 8, generator=draw, dtype=torch.float64) + 0.5
    moments = Moments(count=torch.tensor([50, 50]), first=plain.sum(2), second=plain.mT @ plain)
    seen = view(moments=moments, turn=rope)
    part = kv.ExpectedAttention(6, future=16, sinks=2)
    mean, spread = part.queries_to_come(seen)
    for b in range(2):
        for h in range(4):
            at = int(seen.seen[b]) + torch.arange(16)
            turned = [
                rope(torch.eye(8, dtype=torch.float64)[None, None], p.expand(1, 8))[0, 0].T
                for p in at
            ]
            R = sum(turned) / 16
            own = plain[b, h]
            assert torch.allclose(mean[b, h], R @ own.mean(0))
            assert torch.allclose(spread[b, h], R @ torch.cov(own.T, correction=0) @ R.T)
    expected = torch.zeros(2, 2, seen.keys.shape[2], dtype=torch.float64)
    for b in range(2):
        for g in range(2):
            places = [c for p, c in tokens(seen, b, g).items() if p >= 2]
            for h in per_group(seen, b, g):
                logits = [
                    seen.scale * float(k @ mean[b, h])
                    + float(k @ spread[b, h] @ k) * seen.scale**2 / 2
                    for k in seen.keys[b, g, places]
                ]
                share = torch.tensor(logits, dtype=torch.float64).softmax(0)
                for c, x in zip(places, share, strict=True):
                    expected[b, g, c] += x / 2 * seen.values[b, g, c].norm()
    assert torch.allclose(part.score(seen), expected)


def test_duo_ranks_heads_and_meets_the_count_under_ties():
    policy = kv.Duo([[0.5, 0.5], [0.5, 0.9], [0.5, 0.1]], 0.5, sinks=1, recent=2)  # pyright: ignore
    assert policy.full.sum() == 3
    assert policy.full.tolist() == [[True, True], [False, True], [False, False]]
    seen = view(layer=1, layers=3)
    got = as_positions(seen, kv.each_step(policy + kv.Sinks(0)).keep(seen))
    for b in range(2):
        assert got[b, 1] == list(tokens(seen, b, 1))
        last = int(seen.seen[b]) - 2
        assert got[b, 0] == [p for p in tokens(seen, b, 0) if p < 1 or p >= last]
    with pytest.raises(PolicyError, match="3 layers of 2"):
        policy.check(3, 4)


SCORERS = [
    "heavy({})",
    "heavy({}, true)",
    "tova({})",
    "snapkv({}, 6)",
    "pyramidkv({}, 6)",
    "adakv({})",
    "keydiff({})",
    "keynorm({})",
    "embeddingnorm({})",
]


@pytest.mark.parametrize("text", SCORERS)
def test_a_budget_for_everything_keeps_everything_and_more_keeps_more(text):
    seen = view(n=60)
    assert (kv.parse(text.format(1000)).keep(seen) == seen.valid).all()
    assert (kv.parse(text.format(1.0)).keep(seen) == seen.valid).all()
    before = torch.zeros_like(seen.valid)
    for budget in (0, 3, 8, 20):
        keep = kv.parse(text.format(budget)).keep(seen)
        assert (keep <= seen.valid).all()
        assert (before <= keep).all()
        before = keep


@pytest.mark.parametrize("text", SCORERS)
def test_the_budget_is_the_sum_of_the_numbers(text):
    seen = view(n=60)
    added = [kv.parse(text.format(budget)).keep(seen).sum((1, 2)) for budget in (0, 5)]
    assert (added[1] - added[0] == GROUP * 5).all()


@pytest.mark.parametrize("text", SCORERS)
def test_rows_do_not_know_of_each_other(text):
    seen = view(n=60, batch=3)
    keep = kv.parse(text.format(0.1)).keep(seen)
    for b in range(3):
        names = ("keys", "values", "positions", "seen", "queries", "query_positions", "sums")
        own = {name: getattr(seen, name)[b : b + 1] for name in (*names, "norms")}
        alone = replace(seen, **own)
        assert (kv.parse(text.format(0.1)).keep(alone)[0] == keep[b]).all()


def test_parts_choose_one_after_the_other():
    seen = view(n=40)
    both = kept("sinks(1)+recent(2)+heavy(4)+keynorm(3)", seen)
    first = kept("sinks(1)+recent(2)+heavy(4)", seen)
    expected = choose(
        seen,
        lambda b, g, p: -float(seen.keys[b, g, tokens(seen, b, g)[p]].norm()),
        lambda b, g: 3,
        lambda b, g, p: p in first[b, g],
    )
    assert both == expected


@pytest.fixture
def published(tmp_path):
    """A folder as DuoAttention publishes it: gates a little outside 0 and 1, and a config."""
    folder = tmp_path / "lr=0.02, ctx=1000_32000"
    folder.mkdir()
    rows = "9.98e-01\t2.5e-02\n1.00390625\t-3.1e-03\n"
    (folder / "full_attention_heads.tsv").write_text(rows)
    (folder / "config.json").write_text('{"sink_size": 3, "recent_size": 5}')
    return folder


def test_duo_reads_what_is_published(published):
    from_folder = kv.Duo(published)
    from_file = kv.Duo(str(published / "full_attention_heads.tsv"))
    for duo in (from_folder, from_file):
        assert duo.full.tolist() == [[True, False], [True, False]]
        assert kv.parse(str(duo)).parts == (duo,)
        duo.check(2, 2)
    values = kv.Duo([[0.998, 0.025], [1.0, 0.0]], sinks=3, recent=5)
    seen = view()
    for layer in range(2):
        own = replace(seen, layer=layer, layers=2)
        assert torch.equal(from_folder.protected(own), values.protected(own))
    # What is given goes before what the folder says; without a config there are defaults.
    assert kv.Duo(published, sinks=9)._window == (9, 5)
    (published / "config.json").unlink()
    assert kv.Duo(published)._window == (128, 256)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.0\t0.5\n1.0\n", "a line for each layer"),
        ("a\tb\n", "a line for each layer"),
        ("", "a line for each layer"),
        (None, "cannot read gates"),
    ],
)
def test_files_that_hold_no_gates_are_named(text, said, tmp_path):
    file = tmp_path / "full_attention_heads.tsv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PolicyError, match=said) as caught:
        kv.parse(f'duo("{file}")')
    assert "full_attention_heads.tsv" in str(caught.value)
