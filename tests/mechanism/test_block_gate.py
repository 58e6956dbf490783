"""Block gates against dense forms of choice, attention and distillation target."""

from __future__ import annotations

import pytest
import torch
from tests.mechanism.oracles import (
    assert_decoding_equals_prefill,
    assert_no_leak,
    assert_padding_is_absent,
    weighted_softmax,
)

import longspan as ls
from longspan.errors import InputError, Refusal
from longspan.mechanism import BlockGate
from longspan.nn.rotary import rotate
from longspan.position import default

INF = float("inf")
SIZE = 6


@pytest.fixture(autouse=True)
def small_calls_are_sorted_too(monkeypatch):
    """Rows are copied and sorted by block as in long calls, but for those of decoding."""
    monkeypatch.setattr("longspan.mechanism._blocks._FEW_ROWS", 4)


def layer(random=True, **kwargs):
    torch.manual_seed(0)
    one = BlockGate(16, 4, **{"block": SIZE, "top": 3, "kv_heads": 2, "rope": 1e4, **kwargs})
    if random:
        for gate in (one.gate_query, one.gate_key):
            torch.nn.init.normal_(gate)
    return one.double()


def turn(x, place, width):
    return rotate(x[None, None], place, torch.from_numpy(default(width, 1e4).inv_freq))[0, 0]


def dense(one, x):
    """One batch row [n, d_model].

    Gives the output, scores [K, rows or blocks, T], sums and maxima of weights by block [H, n, T]
    and the choice [K, n, T].
    """
    n, d, group, width = len(x), one.head_dim, one.heads // one.kv_heads, one.gate_key.shape[-1]
    i = torch.arange(n)
    b = i // SIZE
    j = torch.arange(-(-n // SIZE))
    middle = j * SIZE + (SIZE - 1) // 2
    q, k, v = (
        part(x).unflatten(-1, (-1, d)).transpose(0, 1) for part in (one.query, one.key, one.value)
    )
    scores, sums, maxima, outs, choices = [], [], [], [], []
    for g in range(one.kv_heads):
        told = [k[g][b == t] for t in j]
        told = torch.stack([torch.cat([t.amax(0), t.amin(0), t.mean(0)]) for t in told])
        told = turn(told @ one.gate_key[g], middle, width)
        asking = torch.cat([q[g * group + h] for h in range(group)], -1)
        place = i
        if one.level == "block":
            asking = torch.stack([asking[b == t].mean(0) for t in j])
            place = middle
        score = turn(asking @ one.gate_query[g], place, width) @ told.T * width**-0.5
        scores.append(score)
        rows = score[b] if one.level == "block" else score
        rows = rows.masked_fill(j[None] > b[:, None], -INF).masked_fill(j[None] == b[:, None], INF)
        best = rows.topk(min(one.top, len(j)), -1).indices
        chosen = torch.zeros(n, len(j), dtype=torch.bool).scatter(1, best, True) & ~rows.isneginf()
        choices.append(chosen)
        past = i[None] <= i[:, None]
        for h in range(g * group, (g + 1) * group):
            z = turn(q[h], i, d) @ turn(k[g], i, d).T * d**-0.5
            outs.append(weighted_softmax(z, chosen[:, b] & past, v[g]))
            p = z.masked_fill(~past, -INF).softmax(-1)
            sums.append(torch.stack([p[:, b == t].sum(-1) for t in j], 1))
            maxima.append(torch.stack([p[:, b == t].amax(-1) for t in j], 1))
    out = one.output(torch.stack(outs, 1).flatten(1))
    return out, *(torch.stack(t) for t in (scores, sums, maxima, choices))


@pytest.mark.parametrize("level", ["token", "block"])
@pytest.mark.parametrize("n", [1, 6, 7, 41])
def test_equals_the_dense_form_with_gradients(n, level):
    one = layer(level=level, width=6)
    x = torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True)
    weights = [p for name, p in one.named_parameters() if "gate" not in name]
    found, wanted = one(x), torch.stack([dense(one, row)[0] for row in x])
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    toward = torch.randn_like(wanted)
    a, b = (torch.autograd.grad((t * toward).sum(), [x, *weights]) for t in (found, wanted))
    for one_grad, other in zip(a, b, strict=True):
        torch.testing.assert_close(one_grad, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("level", ["token", "block"])
@pytest.mark.parametrize("target", ["mass", "max"])
def test_the_loss_is_the_divergence_from_the_attention(level, target):
    one = layer(level=level)
    x = torch.randn(2, 41, 16, dtype=torch.float64)
    group = one.heads // one.kv_heads
    total, count = torch.zeros(()).double(), 0
    for row in x:
        _, scores, sums, maxima, _ = dense(one, row)
        own = torch.arange(41) // SIZE
        for g in range(one.kv_heads):
            of = slice(g * group, (g + 1) * group)
            wanted = maxima[of].amax(0) if target == "max" else sums[of].mean(0)
            if level == "block":
                blocks = [wanted[own == t] for t in range(7)]
                wanted = torch.stack([t.amax(0) if target == "max" else t.mean(0) for t in blocks])
            for r in range(len(wanted)):
                earlier = int(own[r]) if level == "token" else r
                if earlier:
                    p = wanted[r, :earlier] / wanted[r, :earlier].sum()
                    log = scores[g, r, :earlier].log_softmax(-1)
                    total = total + (p.detach() * (p.detach().log() - log)).sum()
                    count += 1
    found = one.distill(x, target=target)
    torch.testing.assert_close(found, total / count, atol=1e-12, rtol=1e-12)
    gates = [one.gate_query, one.gate_key]
    for a, b in zip(
        torch.autograd.grad(found, gates),
        torch.autograd.grad(total / count, gates),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert one.distill(x[:, :3]) == 0


def test_recall_is_the_mass_of_the_choice():
    one = layer()
    x = torch.randn(2, 41, 16, dtype=torch.float64)
    wanted = []
    for row in x:
        _, _, sums, _, choice = dense(one, row)
        mass = sums.unflatten(0, (2, 2)).mean(1)
        wanted.append((mass * choice).sum(-1).mean(-1))
    torch.testing.assert_close(one.recall(x), torch.stack(wanted).mean(0))
    best = one.recall(x, best=True)
    assert (one.recall(x) < best).all()
    i = torch.arange(41) // SIZE
    wanted = []
    for row in x:
        mass = dense(one, row)[2].unflatten(0, (2, 2)).mean(1)
        own = mass.gather(-1, i.expand(2, -1)[..., None])
        rest = mass.scatter(-1, i.expand(2, -1)[..., None], 0.0).topk(2, -1).values
        wanted.append((own[..., 0] + rest.sum(-1)).mean(-1))
    torch.testing.assert_close(best, torch.stack(wanted).mean(0))
    assert torch.allclose(layer(top=9).recall(x), torch.ones(2).double())


def test_distillation_improves_recall():
    one = layer(random=False, top=2).float()
    x = torch.randn(1, 60, 16).cumsum(1) / 3
    before, first = one.recall(x).mean(), one.distill(x)
    optimizer = torch.optim.Adam([one.gate_query, one.gate_key], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        one.distill(x).backward()
        optimizer.step()
    assert one.query.weight.grad is None
    assert one.distill(x) < 0.5 * first
    assert one.recall(x).mean() > before


def test_every_block_is_full_attention_and_heads_of_a_group_agree():
    one = layer(top=9)
    full = ls.nn.Attention(16, 4, "causal()", kv_heads=2, rope=1e4).double()
    full.load_state_dict({k: v for k, v in one.state_dict().items() if "gate" not in k})
    x = torch.randn(2, 41, 16, dtype=torch.float64)
    torch.testing.assert_close(one(x), full(x), atol=1e-12, rtol=1e-12)


def test_it_starts_as_means_of_keys():
    one = layer(random=False, rope=None)
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    q, k, _ = one.project(x, x)
    mean = k[0, 1].unflatten(0, (4, SIZE)).mean(1)
    wanted = q[0, 2:].mean(0) @ mean.T * one.head_dim**-0.5
    torch.testing.assert_close(dense_scores(one, x), wanted)


def dense_scores(one, x):
    asking, told = one._scored(*one.project(x, x)[:2], torch.arange(24)[None])
    return (asking @ told.mT)[0, 1]


@pytest.mark.parametrize("masked", [False, True])
def test_decoding_equals_prefill(masked):
    one = layer()
    x = torch.randn(2, 32, 16, dtype=torch.float64)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, :5] = mask[0, 20] = False
    assert_decoding_equals_prefill(one, x, mask if masked else None, (3, 8, 1, 1, 10))


def test_later_tokens_leave_the_past_alone_at_the_level_of_tokens():
    cuts = [1, 5, 6, 7, 12, 29, 39]
    x = torch.randn(2, 40, 16)
    assert_no_leak(layer().float(), x, cuts=cuts)
    # The published choice pools queries of the whole block, and says so.
    with pytest.raises(AssertionError, match="leak before"):
        assert_no_leak(layer(level="block", top=2).float(), x, cuts=cuts)


@pytest.mark.parametrize("level", ["token", "block"])
def test_padding_is_absent(level):
    one = layer(level=level)
    for n in (1, 4, 18, 21):
        x = torch.randn(2, n, 16, dtype=torch.float64)
        assert_padding_is_absent(one, x, 5, 9)
        wide, mask = torch.full((2, n + 14, 16), 7.0).double(), torch.zeros(2, n + 14)
        wide[:, 5 : n + 5], mask[:, 5 : n + 5] = x, 1
        torch.testing.assert_close(one.distill(wide, mask), one.distill(x))
        torch.testing.assert_close(one.recall(wide, mask), one.recall(x))


def test_refusals_say_what_to_do():
    x = torch.randn(1, 5, 16)
    with pytest.raises(InputError, match="level must be token or block"):
        BlockGate(16, 4, level="row")
    with pytest.raises(InputError, match="target must be mass or max"):
        BlockGate(16, 4).distill(x, target="sum")
    with pytest.raises(Refusal, match=r'cannot decode.*Use level="token"'):
        BlockGate(16, 4, level="block")(x, return_state=True)
    with pytest.raises(InputError, match="a gate of width 8 needs 4"):
        BlockGate(16, 4, width=8, rope=default(4, 1e4))
