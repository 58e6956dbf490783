"""LongNet as a multiset: counts by loops, outputs and gradients against the counted softmax."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch

import longspan as ls
from longspan.errors import PatternError


def longnet_count(n, ws, rs, heads, causal=True, offsets="paper"):
    """How many branches hold each pair, as spec'd by the published operator."""
    count = np.zeros((heads, n, n), int)
    for w, r in zip(ws, rs, strict=True):
        w = min(w, n)
        for h in range(heads):
            o = h % r if offsets == "paper" else h // ceil(heads / r)
            chosen = [(p % w) % r == o for p in range(n)]
            for i in range(n):
                for j in range(n):
                    same = i // w == j // w and (j <= i or not causal)
                    count[h, i, j] += chosen[i] and chosen[j] and same
    return count


def counted(q, k, v, count):
    """One softmax over the multiset: log(count) added to the logits."""
    count = torch.as_tensor(count, dtype=q.dtype)
    logits = q @ k.mT / q.shape[-1] ** 0.5 + count.log()
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


CASES = [
    ((6, 12, 24), (1, 2, 3), True, "paper"),
    ((4, 8), (1, 4), True, "torchscale"),
    ((5, 10, 40), (1, 3, 4), False, "paper"),
    ((29,), (1,), True, "paper"),
    ((8, 8), (1, 1), True, "paper"),
]


@pytest.mark.parametrize(("ws", "rs", "causal", "offsets"), CASES)
@pytest.mark.parametrize("n", [1, 11, 29])
def test_counts(ws, rs, causal, offsets, n):
    count = longnet_count(n, ws, rs, 4, causal, offsets)
    assert count.any(-1).all(), "a branch with dilation 1 leaves no row empty"
    pattern = ls.LongNet(ws, rs, causal=causal, offsets=offsets)
    plan = ls.plan(pattern, n, 4)
    np.testing.assert_array_equal(plan.counts()[0], count)
    assert plan.pairs == count.sum()
    plain = ls.LongNetSet(ws, rs, causal=causal, offsets=offsets)
    np.testing.assert_array_equal(ls.plan(plain, n, 4).counts()[0], count > 0)
    np.testing.assert_array_equal(pattern.mask(n, 4), count > 0)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize(("ws", "rs", "causal", "offsets"), CASES)
def test_output_and_gradients_are_those_of_the_multiset(ws, rs, causal, offsets, impl):
    n, heads = 29, 4
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 8, generator=make, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    pattern = ls.LongNet(ws, rs, causal=causal, offsets=offsets)
    ours = ls.attend(q, k, v, pattern, return_lse=True, impl=impl)
    theirs = counted(q, k, v, longnet_count(n, ws, rs, heads, causal, offsets))
    weights = [torch.randn(x.shape, generator=make, dtype=x.dtype) for x in ours]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    grads = [
        torch.autograd.grad(pair, (q, k, v), weights, retain_graph=True) for pair in (ours, theirs)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_branch_may_be_repeated():
    n, heads = 24, 4
    q, k, v = (torch.randn(1, heads, n, 8, dtype=torch.float64) for _ in range(3))
    once, twice = ls.LongNet((8,), (1,)), ls.LongNet((8, 8), (1, 1))
    assert ls.plan(twice, n, heads).pairs == 2 * ls.plan(once, n, heads).pairs
    torch.testing.assert_close(ls.attend(q, k, v, once), ls.attend(q, k, v, twice))
    torch.testing.assert_close(ls.attend(q, k, v, once), ls.attend(q, k, v, ls.Chunk(8)))


def test_offsets_of_paper_and_code_are_a_permutation_of_heads():
    paper = longnet_count(24, (24,), (4,), 8)
    code = longnet_count(24, (24,), (4,), 8, offsets="torchscale")
    order = [h // 2 for h in range(8)]
    np.testing.assert_array_equal(paper[order], code)
    ours = ls.LongNet((24,), (4,), offsets="torchscale")
    bare = (
        ls.plan(ours, 24, 8).counts()[0] - np.eye(24, dtype=int) * (code.sum(-1) == 0)[..., None]
    )
    np.testing.assert_array_equal(bare, code)


def test_queries_of_no_branch_keep_themselves():
    count = longnet_count(12, (6,), (2,), 2)
    empty = ~count.any(-1)
    assert empty.sum() == 12
    expected = count + empty[..., None] * np.eye(12, dtype=int)
    np.testing.assert_array_equal(ls.plan(ls.LongNet((6,), (2,)), 12, 2).counts()[0], expected)


def test_mixture_adds_and_operators_do_not():
    longnet = ls.LongNet((4, 8), (1, 2))
    count = longnet_count(16, (4, 8), (1, 2), 2)
    window = ls.Window(3).mask(16, 2).astype(int)
    mixed = ls.plan(ls.Mixture(longnet, ls.Window(3)), 16, 2)
    np.testing.assert_array_equal(mixed.counts()[0], count + window)
    joined = ls.plan(longnet | ls.Window(3), 16, 2)
    np.testing.assert_array_equal(joined.counts()[0], (count + window) > 0)
    halves = ls.plan(ls.PerHead(longnet, ls.Window(3)), 16, 4)
    np.testing.assert_array_equal(halves.counts()[0], np.concatenate([count, window]))


def test_published_pattern_and_its_cost():
    ws, rs = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
    assert sum(w / r**2 for w, r in zip(ws, rs, strict=True)) == pytest.approx(4266.7, abs=0.1)
    plan = ls.plan(ls.LongNet(ws, rs, causal=False), 32768, 12)
    mean_keys = plan.pairs / (12 * 32768)
    assert mean_keys == pytest.approx(4266.7, rel=1e-3)
    assert 32768 / mean_keys == pytest.approx(7.7, abs=0.05)


def reach(mask, layers):
    """Share of causal pairs that are connected after 1, 2, ... layers, heads together."""
    step = mask.any(0)
    n = len(step)
    seen, shares = np.eye(n, dtype=bool), []
    for _ in range(layers):
        seen = (step.astype(np.int32) @ seen.astype(np.int32)) > 0
        shares.append(seen.sum() / (n * (n + 1) / 2))
    return shares, seen


def test_causal_dead_zone():
    ws, rs = (12, 24, 48, 96, 192), (1, 2, 4, 6, 12)
    shares, seen = reach(ls.LongNet(ws, rs).mask(192, 12), 6)
    np.testing.assert_allclose(shares[:4], [0.223, 0.842, 0.986, 0.993], atol=6e-4)
    assert shares[5] == shares[3]
    assert (np.tri(192, dtype=bool) & ~seen).sum() == 130
    assert not seen[12, 11]
    _, healed = reach(ls.Mixture(ls.LongNet(ws, rs), ls.Window(2)).mask(192, 12), 12)
    assert healed[12, 11]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ls.LongNet((4, 8), (1,)), ["2 segments", "1 dilations"]),
        (lambda: ls.LongNet((4,), (5,)), ["exceed", "5", "4"]),
        (lambda: ls.LongNet(4, 1), ["list", "4"]),
        (lambda: ls.LongNet((4,), (1,), offsets="mine"), ["paper", "torchscale", "mine"]),
        (lambda: ls.LongNet((), ()), ["list"]),
        (lambda: ls.Mixture(), ["at least one"]),
        (lambda: ls.Mixture("window(3)"), ["window(3)"]),
    ],
)
def test_errors(make, words):
    with pytest.raises(PatternError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)
