"""MoBA and NSA against dense forms that build every mask."""

from __future__ import annotations

import pytest
import torch
from tests.mechanism.oracles import (
    assert_decoding_equals_prefill,
    assert_no_leak,
    assert_padding_is_absent,
    assert_same_with_gradients,
    per_head,
    qkv,
    weighted_softmax,
)

from longspan.errors import InputError
from longspan.mechanism import NSA, MoBA, moba_attention
from longspan.mechanism._blocks import Lay, best_blocks
from longspan.nn.rotary import rotate
from longspan.position import default

INF = float("inf")


@pytest.fixture(autouse=True)
def small_calls_are_sorted_too(monkeypatch):
    """Rows are copied and sorted by block as in long calls, but for those of decoding."""
    monkeypatch.setattr("longspan.mechanism._blocks._FEW_ROWS", 4)


def kept(score, count):
    """Which blocks are among the best of each row."""
    best = score.topk(min(count, score.shape[-1]), -1).indices
    return torch.zeros(score.shape, dtype=torch.bool).scatter(-1, best, True) & ~score.isneginf()


def moba_oracle(size, top):
    def one(q, k, v):
        n, d = q.shape
        i = torch.arange(n)
        b = i // size
        j = torch.arange(-(-n // size))
        mean = torch.stack([k[b == t].mean(0) for t in j])
        score = (q @ mean.T).masked_fill(j[None] > b[:, None], -INF)
        seen = kept(score.masked_fill(j[None] == b[:, None], INF), top)
        return weighted_softmax(q @ k.T * d**-0.5, seen[:, b] & (i[None] <= i[:, None]), v)

    return one


@pytest.mark.parametrize("n", [1, 5, 6, 7, 40])
@pytest.mark.parametrize("top", [1, 3, 20])
def test_moba_equals_the_dense_form_with_gradients(n, top):
    q, k, v = qkv(n=n, value_dim=5)
    assert_same_with_gradients(
        lambda q, k, v: moba_attention(q, k, v, block=6, top=top),
        lambda q, k, v: per_head(moba_oracle(6, top), q, k, v),
        (q, k, v),
    )


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("few", [4, 64])
def test_moba_heads_of_a_group_choose_together(n, few, monkeypatch):
    monkeypatch.setattr("longspan.mechanism._blocks._FEW_ROWS", few)
    size, top = 6, 3

    def slow(q, k, v):
        i = torch.arange(n)
        b, j = i // size, torch.arange(-(-n // size))
        mean = torch.stack([k[:, :, b == t].mean(2) for t in j], 2)
        score = q.unflatten(1, (2, 2)) @ mean[:, :, None].mT
        score = score.sum(2).masked_fill(j[None] > b[:, None], -INF)
        seen = kept(score.masked_fill(j[None] == b[:, None], INF), top)
        seen = (seen[..., b] & (i[None] <= i[:, None])).repeat_interleave(2, 1)
        logit = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
        return weighted_softmax(logit, seen, v.repeat_interleave(2, 1))

    assert_same_with_gradients(
        lambda q, k, v: moba_attention(q, k, v, block=size, top=top, share_blocks=True),
        slow,
        qkv(n=n),
    )


def test_moba_with_every_block_is_full_attention():
    q, k, v = (x.detach() for x in qkv(n=40))
    found = moba_attention(q, k, v, block=6, top=7)
    causal = torch.ones(40, 40).tril()
    wanted = per_head(
        lambda q, k, v: weighted_softmax(q @ k.T * q.shape[1] ** -0.5, causal, v), q, k, v
    )
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_scoring_in_pieces_changes_nothing(monkeypatch):
    one, two = layer(MoBA), layer(NSA)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    wanted = one(x), two(x)
    monkeypatch.setattr("longspan.mechanism._blocks._SCORES", 100)
    torch.testing.assert_close((one(x), two(x)), wanted, atol=1e-12, rtol=1e-12)


SIZES = {
    MoBA: {"block": 6, "top": 2},
    NSA: {"block": 6, "stride": 3, "select_block": 5, "select": 4, "window": 4},
}


def layer(kind, **kwargs):
    torch.manual_seed(0)
    settings = {**SIZES[kind], "kv_heads": 2, "rope": 1e4, **kwargs}
    one = kind(16, 4, **settings).double()
    if settings.get("compress") == "learned":
        for phi in (one.phi_key, one.phi_value):
            torch.nn.init.normal_(phi.outer.weight)
    return one


def nsa_oracle(one, x):
    """One batch row [n, d_model], by loops over heads; selection by dense importance."""
    n, d, group = len(x), one.head_dim, one.heads // one.kv_heads
    block, stride, size = one.block, one.stride, one.select_block
    i = torch.arange(n)
    past = i[None] <= i[:, None]
    inv_freq = torch.from_numpy(default(d, 1e4).inv_freq)

    def heads(part):
        return part(x).unflatten(-1, (-1, d)).transpose(0, 1)

    def turn(t):
        return rotate(t[None], i, inv_freq)[0]

    q, k, v = heads(one.query), heads(one.key), heads(one.value)
    kc, vc = heads(one.key_compressed), heads(one.value_compressed)
    kw, vw = heads(one.key_window), heads(one.value_window)
    starts = list(range(0, n - block + 1, stride))

    def compress(t, phi):
        blocks = torch.stack([t[:, a : a + block] for a in starts], 1)
        if phi is None:
            return blocks.mean(2)
        inner = torch.nn.functional.gelu(phi.inner((blocks + phi.code).flatten(-2)))
        return blocks.mean(2) + phi.outer(inner)

    m = -(-n // size)
    j, b = torch.arange(m), i // size
    compressed, weight = torch.zeros_like(q), torch.zeros(one.heads, n, m).double()
    if starts:
        keys, values = compress(kc, one.phi_key), compress(vc, one.phi_value)
        first = torch.tensor(starts)
        see = (first + block - 1)[None] <= i[:, None]
        begin = j * size
        overlap = (first[:, None] < begin + size) & ((first + block)[:, None] > begin)
        outs = []
        for h in range(one.heads):
            z = q[h] @ keys[h // group].T * d**-0.5
            outs.append(weighted_softmax(z, see, values[h // group]))
            weight[h] = (
                weighted_softmax(z, see, torch.eye(len(starts)).double()) @ overlap.double()
            )
        compressed = torch.stack(outs)
    q, k, kw = turn(q), turn(k), turn(kw)
    gate = one.gate(x).sigmoid().view(n, 3, one.heads)
    out = []
    for h in range(one.heads):
        own = h // group
        score = weight[own * group : (own + 1) * group].sum(0).detach()
        forced = (j[None] == 0) | (j[None] == b[:, None]) | (j[None] == b[:, None] - 1)
        score = score.masked_fill(forced, INF).masked_fill(j[None] > b[:, None], -INF)
        z, zw = q[h] @ k[own].T * d**-0.5, q[h] @ kw[own].T * d**-0.5
        selected = weighted_softmax(z, kept(score, one.select)[:, b] & past, v[own])
        near = weighted_softmax(zw, past & (i[:, None] - i[None] < one.window), vw[own])
        g = gate[:, :, h]
        out.append(g[:, :1] * compressed[h] + g[:, 1:2] * selected + g[:, 2:] * near)
    return one.output(torch.stack(out, 1).flatten(1))


@pytest.mark.parametrize("compress", ["mean", "learned"])
@pytest.mark.parametrize("n", [1, 5, 6, 11, 41])
def test_nsa_equals_the_dense_form_with_gradients(n, compress):
    one = layer(NSA, compress=compress)
    x = torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True)
    weights = [p for name, p in one.named_parameters() if n > 5 or "phi" not in name]
    found, wanted = one(x), torch.stack([nsa_oracle(one, row) for row in x])
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    toward = torch.randn_like(wanted)
    a, b = (
        torch.autograd.grad((t * toward).sum(), [x, *weights], allow_unused=n < 6)
        for t in (found, wanted)
    )
    for name, one_grad, other in zip(["x", *range(99)], a, b, strict=False):
        one_grad, other = (torch.zeros(()) if g is None else g for g in (one_grad, other))
        torch.testing.assert_close(
            one_grad,
            other.to(one_grad),
            atol=1e-10,
            rtol=1e-10,
            msg=lambda m, at=name: f"{at}: {m}",
        )


KINDS = [(MoBA, {}), (MoBA, {"share_blocks": True}), (NSA, {}), (NSA, {"compress": "learned"})]


@pytest.mark.parametrize(("kind", "kwargs"), KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_equals_prefill(kind, kwargs, masked):
    one = layer(kind, **kwargs)
    x = torch.randn(2, 32, 16, dtype=torch.float64)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, :5] = False
    mask[0, 20] = False
    assert_decoding_equals_prefill(one, x, mask if masked else None, (3, 8, 1, 1, 10))


# Tokens that repeat, and selected blocks that overlap the same compressed ones, score alike.
@pytest.mark.parametrize(
    ("kind", "kwargs"), [*KINDS, (NSA, {"block": 8, "stride": 3, "select_block": 1, "select": 6})]
)
def test_equal_scores_are_chosen_alike_whatever_comes_later(kind, kwargs):
    torch.manual_seed(1)
    one = kind(16, 4, **SIZES[kind] | kwargs).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64).repeat(1, 12, 1)
    x = x + (torch.arange(60) % 7)[:, None] * 0.01
    whole = one(x)
    for t in range(3, 60, 4):
        torch.testing.assert_close(one(x[:, :t]), whole[:, :t])
    assert_decoding_equals_prefill(one, x, None, (20, 11, 1, 1, 1, 1, 25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_overlap_the_same_ones_score_alike_to_the_last_bit(dtype):
    torch.manual_seed(0)
    # Three compressed blocks of nine tokens have ended, at 0, 1 and 2: the blocks of two tokens
    # from the second to the fifth overlap them all.
    score = torch.rand(2, 1, 55, 47, dtype=dtype) * (torch.arange(47) < 3)
    found = Lay(2, 8, 28).sums(score)
    torch.testing.assert_close(found[..., 1], score.sum(dim=-1))
    assert torch.equal(found[..., 1:5], found[..., 1:2].expand(-1, -1, -1, 4))
    assert torch.equal(
        best_blocks(score, torch.full((1, 55), 28), 2, 1, Lay(2, 8, 28))[..., 0],
        torch.ones(2, 1, 55, dtype=torch.int64),
    )


def test_of_equal_scores_the_earlier_blocks_are_taken():
    score = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0, 1.0]).expand(1, 1, 40, 6)
    stop = (torch.arange(40) % 7)[None]
    found = best_blocks(score, stop, 3)
    for row, end in enumerate(stop[0].tolist()):
        own = sorted(range(end), key=lambda b: -float(score[0, 0, row, b]))[:3]
        assert sorted(found[0, 0, row].tolist()) == sorted(own + [6] * (3 - len(own)))


@pytest.mark.parametrize(("kind", "kwargs"), KINDS)
def test_later_tokens_leave_the_past_bit_identical(kind, kwargs):
    one = layer(kind, **kwargs).float()
    assert_no_leak(one, torch.randn(2, 40, 16), cuts=[1, 5, 6, 7, 12, 29, 39])


@pytest.mark.parametrize(("kind", "kwargs"), KINDS)
def test_later_tokens_leave_the_past_of_long_sequences_alone(kind, kwargs):
    # Sorted by block, rows share their matrix products with others.
    one = layer(kind, **kwargs)
    assert_no_leak(one, torch.randn(1, 151, 16).double(), [1, 64, 77, 150], 1e-12)


@pytest.mark.parametrize(("kind", "kwargs"), KINDS)
def test_padding_is_absent(kind, kwargs):
    for n in (4, 18, 21):
        x = torch.randn(2, n, 16, dtype=torch.float64)
        assert_padding_is_absent(layer(kind, **kwargs), x, 5, 9)


def test_learned_compression_starts_as_the_mean():
    torch.manual_seed(0)
    learned = NSA(16, 4, **SIZES[NSA], compress="learned")
    mean = NSA(16, 4, **SIZES[NSA])
    mean.load_state_dict({k: v for k, v in learned.state_dict().items() if "phi" not in k})
    x = torch.randn(1, 20, 16)
    torch.testing.assert_close(learned(x), mean(x))


def test_refusals_say_what_to_do():
    with pytest.raises(InputError, match="top must be a whole number of at least 1, got 0"):
        MoBA(16, 4, top=0)
    with pytest.raises(InputError, match="stride must be at most block"):
        NSA(16, 4, block=4, stride=5)
    with pytest.raises(InputError, match="select must be at least 3"):
        NSA(16, 4, select=2)
    with pytest.raises(InputError, match="mean or learned, got 'max'"):
        NSA(16, 4, compress="max")
