"""Top-k attention and adaptive spans against dense forms."""

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
from longspan.mechanism import AdaptiveSpan, TopK, adaptive_span_attention, topk_attention

INF = float("inf")


def topk_oracle(keep, causal):
    def one(q, k, v):
        n, d = q.shape
        i = torch.arange(n)
        z = q @ k.T * d**-0.5
        z = z.masked_fill(i[None] > i[:, None], -INF) if causal else z
        least = z.topk(min(keep, n), -1).values[:, -1:]
        kept = (z >= least) & ~z.isneginf()
        return weighted_softmax(q @ k.T * d**-0.5, kept, v)

    return one


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize(("keep", "causal"), [(1, True), (6, True), (6, False), (50, True)])
def test_topk_equals_the_dense_form_with_gradients(n, keep, causal):
    q, k, v = qkv(n=n, value_dim=5)
    assert_same_with_gradients(
        lambda q, k, v: topk_attention(q, k, v, keep, causal=causal),
        lambda q, k, v: per_head(topk_oracle(keep, causal), q, k, v),
        (q, k, v),
    )


def test_equal_logits_are_all_kept():
    q, k, v = (x.detach() for x in qkv(n=12))
    k = k[:, :, :1].expand(-1, -1, 12, -1)
    found = topk_attention(q, k, v, 2, causal=False)
    wanted = v.mean(2, keepdim=True).expand(-1, -1, 12, -1).repeat_interleave(2, 1)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def span_oracle(span, ramp):
    def one(q, k, v):
        n, d = q.shape
        i = torch.arange(n)
        x = i[:, None] - i[None]
        weight = ((ramp + span - x) / ramp).clamp(0, 1) * (x >= 0)
        z = (q @ k.T * d**-0.5).exp() * weight
        return z @ v / z.sum(-1, keepdim=True)

    return one


@pytest.mark.parametrize("n", [1, 2, 17, 50])
@pytest.mark.parametrize("ramp", [1, 5, 20])
def test_spans_equal_the_dense_form_with_gradients(n, ramp):
    q, k, v = qkv(n=n, value_dim=5)
    # Not whole: there the weight of the key at the end of the ramp has a kink.
    span = torch.tensor([0.4, 3.3, 12.7, 49.9], dtype=torch.float64, requires_grad=True)

    def slow(q, k, v, span):
        own = [
            per_head(span_oracle(span[h], ramp), q[:, h : h + 1], k[:, g], v[:, g])
            for h in range(4)
            for g in [slice(h // 2, h // 2 + 1)]
        ]
        return torch.cat(own, 1)

    assert_same_with_gradients(
        lambda q, k, v, span: adaptive_span_attention(q, k, v, span, ramp=ramp),
        slow,
        (q, k, v, span),
    )


def test_a_span_over_everything_is_full_attention():
    q, k, v = (x.detach() for x in qkv(n=40))
    causal = torch.ones(40, 40).tril()
    wanted = per_head(
        lambda q, k, v: weighted_softmax(q @ k.T * q.shape[1] ** -0.5, causal, v), q, k, v
    )
    for found in (
        topk_attention(q, k, v, 40),
        adaptive_span_attention(q, k, v, torch.full((4,), 40.0), ramp=8),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_the_window_is_that_of_each_head():
    q, k, v = (x.detach() for x in qkv(n=60))
    k.requires_grad_(), v.requires_grad_()
    out = adaptive_span_attention(q, k, v, torch.tensor([2.0, 2.0, 30.0, 30.0]), ramp=4)
    for head, back in ((0, 5), (1, 5), (2, 33), (3, 33)):
        (grad,) = torch.autograd.grad(out[0, head, 50].sum(), v, retain_graph=True)
        assert grad[0].abs().sum((0, 2)).nonzero()[:, 0].tolist() == [*range(51 - back - 1, 51)]


def test_spans_are_learned_and_kept_in_bounds():
    torch.manual_seed(0)
    layer = AdaptiveSpan(16, 4, max_span=20, ramp=4, start=1.0)
    torch.testing.assert_close(layer.penalty(), torch.tensor(20.0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):
        (layer(torch.randn(1, 30, 16)).square().mean() + 0.05 * layer.penalty()).backward()
        optimizer.step()
        layer.clip()
        optimizer.zero_grad()
    assert ((layer.span >= 0) & (layer.span < 1)).all()
    layer.span.data.fill_(-3.0)
    layer.clip()
    assert layer.spans().tolist() == [0.0] * 4


SIZES = {TopK: {"keep": 5}, AdaptiveSpan: {"max_span": 9, "ramp": 4}}


def layer(kind, **kwargs):
    torch.manual_seed(0)
    one = kind(16, 4, **{**SIZES[kind], "kv_heads": 2, "rope": 1e4, **kwargs}).double()
    if kind is AdaptiveSpan:
        one.span.data.copy_(torch.tensor([0.0, 0.3, 0.77, 1.0]))
    return one


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_equals_prefill(kind, masked):
    one = layer(kind)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :5] = mask[0, 20] = False
    state = assert_decoding_equals_prefill(one, x, mask if masked else None, (3, 8, 1, 1, 18))
    assert state.kept[0].shape[2] == (40 if kind is TopK else 9 + 4 - 1)


@pytest.mark.parametrize("kind", SIZES)
def test_later_tokens_leave_the_past_bit_identical(kind):
    assert_no_leak(layer(kind).float(), torch.randn(2, 40, 16), cuts=[1, 5, 9, 13, 29, 39])


@pytest.mark.parametrize(
    ("kind", "kwargs"), [(TopK, {}), (TopK, {"causal": False}), (AdaptiveSpan, {})]
)
def test_padding_is_absent(kind, kwargs):
    for n in (1, 4, 21, 30):
        x = torch.randn(2, n, 16, dtype=torch.float64)
        assert_padding_is_absent(layer(kind, **kwargs), x, 5, 9)


def test_slices_change_nothing(monkeypatch):
    one = layer(TopK)
    x = torch.randn(2, 21, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(21) >= torch.tensor([[0], [4]])
    wanted = one(x, mask)
    inputs = [x, *one.parameters()]
    gradients = torch.autograd.grad(wanted.square().sum(), inputs)
    monkeypatch.setattr("longspan.mechanism._blocks._SCORES", 1000)
    found = one(x, mask)
    torch.testing.assert_close(found, wanted)
    again = torch.autograd.grad(found.square().sum(), inputs)
    for a, b in zip(again, gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_refusals_say_what_to_do():
    q, k, v = qkv(n=5)
    with pytest.raises(InputError, match="keep must be a whole number of at least 1, got 0"):
        topk_attention(q, k, v, 0)
    with pytest.raises(InputError, match="a state exists only for causal=True"):
        TopK(16, 4, causal=False)(torch.randn(1, 5, 16), return_state=True)
    with pytest.raises(InputError, match="one span for each of 4 heads"):
        adaptive_span_attention(q, k, v, torch.zeros(2))
    with pytest.raises(InputError, match="start must be a number from 0 to 1"):
        AdaptiveSpan(16, 4, start=2)
