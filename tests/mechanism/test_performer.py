"""Performer against the quadratic form of its own features, and the features against exp."""

from __future__ import annotations

import pytest
import torch
from tests.mechanism.oracles import (
    assert_no_leak,
    assert_padding_is_absent,
    assert_same_with_gradients,
    per_head,
    qkv,
)

from longspan.errors import InputError
from longspan.mechanism import Favor, Performer, linear_attention, redraw
from longspan.mechanism.performer import orthogonal_gaussian


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def oracle(w, causal):
    def one(q, k, v):
        q, k = q * q.shape[1] ** -0.25, k * k.shape[1] ** -0.25
        fq = torch.exp(q @ w.T - (q * q).sum(-1, keepdim=True) / 2) / len(w) ** 0.5
        fk = torch.exp(k @ w.T - (k * k).sum(-1, keepdim=True) / 2) / len(w) ** 0.5
        a = fq @ fk.T
        a = a.tril() if causal else a
        return (a @ v) / a.sum(-1, keepdim=True)

    return one


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_quadratic_form_with_gradients(causal):
    q, k, v = qkv()
    favor = Favor(8, features=20, generator=generator(), dtype=torch.float64)
    assert_same_with_gradients(
        lambda q, k, v: linear_attention(q, k, v, favor, causal=causal, chunk=16),
        lambda q, k, v: per_head(oracle(favor.projection, causal), q, k, v),
        (q, k, v),
    )


def test_features_have_the_default_dtype_of_torch():
    assert Favor(8).projection.dtype == torch.float32
    assert Favor(8, dtype=torch.float64).projection.dtype == torch.float64


def test_rows_are_orthogonal_within_blocks_and_have_gaussian_length():
    w = orthogonal_gaussian(4000, 8, generator=generator(), dtype=torch.float64)
    blocks = torch.nn.functional.normalize(w, dim=-1).view(-1, 8, 8)
    torch.testing.assert_close(
        blocks @ blocks.mT, torch.eye(8, dtype=torch.float64).expand(500, 8, 8)
    )
    assert abs(w.square().sum(-1).mean() - 8) < 0.3
    assert w.mean(0).abs().max() < 0.1


def test_the_estimate_is_unbiased_and_its_variance_falls_as_one_over_m():
    g = generator(1)
    x, y = torch.randn(2, 40, 8, generator=g, dtype=torch.float64) * 0.25
    exact = (x * y).sum(-1).exp()
    spread = []
    for m in (16, 64):
        # Whole blocks are independent: one tall matrix holds all the draws.
        w = orthogonal_gaussian(1500 * m, 8, generator=g, dtype=torch.float64)
        fx, fy = ((z @ w.T - z.square().sum(-1, keepdim=True) / 2).exp() for z in (x, y))
        draws = (fx * fy).unflatten(1, (1500, m)).mean(-1).T
        assert ((draws.mean(0) / exact) - 1).abs().median() < 0.02
        spread.append((draws.var(0) / exact.square()).median() * m)
    assert 0.8 < spread[0] / spread[1] < 1.25


def test_a_large_later_key_neither_leaks_nor_starves_earlier_rows():
    torch.manual_seed(0)
    layer = Performer(16, 2, features=12, chunk=8)
    assert_no_leak(layer, torch.randn(2, 40, 16), cuts=[1, 8, 9, 39])
    favor = Favor(8, features=20, generator=generator())
    q, k, v = (x.detach().float() for x in qkv(n=20))
    base = linear_attention(q, k, v, favor, chunk=8)
    k[:, :, -1] *= 40
    changed = linear_attention(q, k, v, favor, chunk=8)
    assert torch.equal(base[:, :, :-1], changed[:, :, :-1])
    assert changed.isfinite().all()


def test_constant_values_come_back():
    q, k, v = qkv(scale=3.0)
    for kernel in ("softmax", "relu"):
        favor = Favor(8, kernel=kernel, dtype=torch.float64)
        out = linear_attention(q, k, torch.ones_like(v), favor)
        torch.testing.assert_close(out, torch.ones_like(out))


def test_padding_is_absent():
    torch.manual_seed(0)
    layer = Performer(16, 4, kv_heads=2, chunk=8).double()
    assert_padding_is_absent(layer, torch.randn(2, 21, 16, dtype=torch.float64), 3, 5)


def test_decoding_equals_prefill_until_redrawn():
    torch.manual_seed(0)
    layer = Performer(16, 4, kv_heads=2, chunk=8).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    wanted = layer(x)
    first, state = layer(x[:, :9], return_state=True)
    parts = [first]
    for t in range(9, 20):
        part, state = layer(x[:, t : t + 1], state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-12, rtol=1e-12)
    assert redraw(torch.nn.ModuleList([layer])) == 1
    assert not torch.allclose(layer(x), wanted)
    with pytest.raises(InputError, match="before redraw"):
        layer(x[:, :1], state=state)


def test_random_features_are_saved_and_drawn_from_the_given_source():
    first, second = (Performer(16, 2, generator=generator(5)) for _ in range(2))
    assert list(first.state_dict())[-1] == "feature_map.projection"
    assert torch.equal(first.feature_map.projection, second.feature_map.projection)
    before = torch.random.get_rng_state()
    redraw(first, generator(6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first.feature_map.projection, second.feature_map.projection)
