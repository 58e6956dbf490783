"""Reading stored tokens, streamed sums and Quest's bounds, against plain formulas in float64."""

from __future__ import annotations

import pytest
import torch
from tests.kv.oracles import view

from longspan.kv import Quest
from longspan.kv import view as view_module
from longspan.kv.quest import PageBounds
from longspan.kv.read import read, read_one
from longspan.kv.view import column_sums
from longspan.pattern import parse


def dense(seen, allowed):
    """Weights [B, H, N, C] under a mask, and their log-sum-exp."""
    share = seen.queries.shape[1] // seen.keys.shape[1]
    logits = seen.queries @ seen.keys.repeat_interleave(share, 1).mT * seen.scale
    logits = logits.masked_fill(~allowed, -torch.inf)
    lse = logits.logsumexp(-1)
    return (logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp(), lse


def causal(seen):
    share = seen.queries.shape[1] // seen.keys.shape[1]
    key = seen.positions.repeat_interleave(share, 1)[:, :, None]
    return (key >= 0) & (key <= seen.query_positions[:, None, :, None])


@pytest.fixture(params=[1 << 24, 200], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(view_module, "CPU_TILE", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("text", [None, "causal()", "window(7) | sink(2)", "strided(3)"])
def test_read(text):
    seen = view()
    pattern = None if text is None else parse(text)
    allowed = causal(seen)
    if pattern is not None:
        own = torch.from_numpy(pattern.mask(64, heads=4))
        at_q = seen.query_positions[:, None, :, None].expand_as(allowed)
        at_k = seen.positions.repeat_interleave(2, 1)[:, :, None].expand_as(allowed).clamp(min=0)
        head = torch.arange(4)[None, :, None, None].expand_as(allowed)
        allowed = allowed & own[head, at_q, at_k]
    weight, expected_lse = dense(seen, allowed)
    out, lse = read(
        seen.queries,
        seen.keys,
        seen.values,
        seen.query_positions,
        seen.positions,
        seen.scale,
        pattern,
    )
    assert torch.allclose(out, weight @ seen.values.repeat_interleave(2, 1))
    assert torch.allclose(lse, expected_lse)


def test_read_one_and_rows_without_keys():
    seen = view(queries=1)
    weight, _ = dense(seen, causal(seen))
    got = read_one(seen.queries, seen.keys, seen.values, seen.valid, seen.scale)
    assert torch.allclose(got, weight @ seen.values.repeat_interleave(2, 1))
    nothing = torch.full_like(seen.positions, -1)
    at = seen.query_positions
    out, lse = read(seen.queries, seen.keys, seen.values, at, nothing, seen.scale)
    assert (out == 0).all()
    assert lse.isneginf().all()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("known", [False, True])
def test_column_sums(known):
    seen = view()
    at = seen.query_positions.clone()
    at[1, :3] = -1
    weight, lse = dense(seen, causal(seen))
    weight[1, :, :3] = 0
    got = column_sums(
        seen.queries, seen.keys, at, seen.positions, seen.scale, lse=lse if known else None
    )
    assert torch.allclose(got, weight.sum(2))
    mass = torch.tensor([12.0, 9.0], dtype=torch.float64)[:, None].expand(2, 4)
    assert torch.allclose(got.sum(-1), mass)


@pytest.mark.usefixtures("tile")
def test_aligned_queries_skip_what_they_cannot_see():
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, n, 8, generator=draw) for h, n in ((4, 9), (2, 15)))
    q_at, k_at = torch.arange(6, 15).expand(2, -1), torch.arange(15).expand(2, 2, -1)
    whole = column_sums(q, k, q_at, k_at, 0.3)
    assert torch.allclose(column_sums(q, k, q_at, k_at, 0.3, aligned=True), whole)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("aligned", [False, True])
def test_known_sums_cut_tiles_both_ways(aligned, monkeypatch):
    monkeypatch.setattr(view_module, "SQUARE", 4)
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, n, 8, generator=draw) for h, n in ((4, 9), (2, 15)))
    q_at, k_at = torch.arange(6, 15).expand(2, -1), torch.arange(15).expand(2, 2, -1).clone()
    if not aligned:
        k_at[1, :, 11:] = -1
    _, lse = read(q, k, k, q_at, k_at, 0.3)
    whole = column_sums(q, k, q_at, k_at, 0.3)
    got = column_sums(q, k, q_at, k_at, 0.3, lse=lse, aligned=aligned)
    assert torch.allclose(got, whole, atol=1e-6)
    assert torch.allclose(got.sum(-1), torch.tensor(9.0))


def test_quest_bounds_hold_and_grow_with_the_keys():
    draw = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 2, 41, 8, generator=draw)
    length = torch.tensor([[41, 30], [17, 4]])
    whole = PageBounds(4, keys, length)
    grown = PageBounds(4, keys[:, :, :0], torch.zeros_like(length))
    for n in range(41):
        grown.extend(keys[:, :, n : n + 1], length.clamp(max=n), (length > n).long())
    assert torch.equal(whole.low, grown.low)
    assert torch.equal(whole.high, grown.high)
    q = torch.randn(2, 4, 8, generator=draw)
    bound = whole.upper(q, length)
    for b in range(2):
        for g in range(2):
            for p in range(bound.shape[2]):
                own = keys[b, g, 4 * p : min(4 * p + 4, int(length[b, g]))]
                if not len(own):
                    assert bound[b, g, p] == -torch.inf
                    continue
                heads = q[b, 2 * g : 2 * g + 2]
                exact = sum(torch.maximum(h * own.amin(0), h * own.amax(0)).sum() for h in heads)
                assert torch.allclose(bound[b, g, p], exact, atol=1e-5)
                assert bound[b, g, p] >= (heads @ own.T).sum(0).max() - 1e-5


def test_quest_reads_first_last_and_best_pages():
    draw = torch.Generator().manual_seed(2)
    keys, length = torch.randn(1, 2, 50, 8, generator=draw), torch.tensor([[50, 45]])
    bounds = PageBounds(5, keys, length)
    q = torch.randn(1, 4, 8, generator=draw)
    places = bounds.choose(q, length, 20)
    assert places is not None
    assert places.shape == (1, 2, 20)
    upper = bounds.upper(q, length)
    for g, last in ((0, 9), (1, 8)):
        pages = places[0, g, ::5] // 5
        middle = range(1, last)
        best = sorted(middle, key=lambda p, g=g: -float(upper[0, g, p]))[:2]
        assert pages.tolist() == sorted([0, last, *best])
    assert bounds.choose(q, length, 50) is None


def test_quest_with_pages_of_one_token_takes_the_best_tokens():
    draw = torch.Generator().manual_seed(3)
    keys, length = torch.randn(1, 1, 30, 8, generator=draw), torch.tensor([[30]])
    q = torch.randn(1, 1, 8, generator=draw)
    places = PageBounds(1, keys, length).choose(q, length, Quest(8, 1).tokens)
    logits = (keys[0, 0] @ q[0, 0])[1:-1]
    expected = (logits.topk(6).indices + 1).tolist()
    assert places is not None
    assert places.flatten().tolist() == sorted([0, 29, *expected])
