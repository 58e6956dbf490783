"""Linear attention and Performer against their quadratic forms."""

from __future__ import annotations

import math

import pytest
import torch
from tests.mechanism.oracles import (
    assert_no_leak,
    assert_padding_is_absent,
    assert_same_with_gradients,
    per_head,
    qkv,
)
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.errors import InputError
from longspan.mechanism import (
    Hedgehog,
    Laplace,
    LinearAttention,
    Performer,
    linear_attention,
)
from longspan.mechanism.feature_maps import NAMES

FREQUENCIES = torch.randn(24, 8, generator=torch.Generator().manual_seed(3)).double() / 8
TURN = torch.randn(8, 8, generator=torch.Generator().manual_seed(4)).double()


def oracle_weights(name, q, k):
    """Unnormalised weights [n, n]."""
    if name == "elu":
        return (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).T
    if name == "relu":
        return q.relu() @ k.relu().T
    if name == "exp":
        return q.exp() @ k.exp().T
    if name == "mega":
        mean, deviation = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
        q, k = (0.5 * (1 + torch.erf((x - mean) / (deviation * math.sqrt(2)))) for x in (q, k))
        return q @ k.T
    if name == "hedgehog":
        q, k = (x * 8**-0.25 @ TURN.T for x in (q, k))
        return q.exp() @ k.exp().T + (-q).exp() @ (-k).exp().T
    if name == "laplace":
        return ((q[:, None] - k[None]) @ FREQUENCIES.T).cos().mean(-1)
    i = torch.arange(len(q), dtype=torch.float64)
    return (q.relu() @ k.relu().T) * torch.cos(math.pi / 2 * (i[:, None] - i[None]) / 64)


def oracle(name, causal, floor):
    def one(q, k, v):
        a = oracle_weights(name, q, k)
        a = a.tril() if causal else a
        return (a @ v) / a.sum(-1, keepdim=True).clamp_min(floor)

    return one


def map_of(name):
    if name == "hedgehog":
        found = Hedgehog(8)
        found.weight.data = TURN
        return found
    if name != "laplace":
        return name
    found = Laplace(8, features=24)
    found.frequencies = FREQUENCIES
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_quadratic_form_with_gradients(name, causal):
    q, k, v = qkv(value_dim=5)
    floor = {"relu": 1e-6, "cosformer": 1e-6, "laplace": 1e-3}.get(name, 0.0)

    def fast(q, k, v):
        return linear_attention(q, k, v, map_of(name), causal=causal, max_length=64, chunk=16)

    assert_same_with_gradients(
        fast, lambda q, k, v: per_head(oracle(name, causal, floor), q, k, v), (q, k, v)
    )


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33])
def test_chunks_and_odd_lengths_change_nothing(chunk, n):
    for name in ("elu", "exp"):
        q, k, v = qkv(n=n)
        wanted = per_head(oracle(name, True, 0.0), q, k, v)
        torch.testing.assert_close(
            linear_attention(q, k, v, name, chunk=chunk), wanted, atol=1e-12, rtol=1e-12
        )


class Written(TorchDispatchMode):
    """Counts the numbers that operations write."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else [found]:
            self.count += x.numel() if isinstance(x, torch.Tensor) else 0
        return found


@pytest.mark.parametrize("name", ["elu", "exp"])
def test_gradients_take_work_linear_in_the_rows(name, monkeypatch):
    monkeypatch.setattr("longspan.mechanism._linear_chunks._ROUND", 64)
    counts = []
    for n in (256, 2048):
        q, k, v = (torch.randn(1, 2, n, 4, requires_grad=True) for _ in range(3))
        out = linear_attention(q, k, v, name, chunk=16).sum()
        with Written() as written:
            torch.autograd.grad(out, (q, k, v))
        counts.append(written.count)
    assert counts[1] < 9 * counts[0]


def test_rounds_join(monkeypatch):
    monkeypatch.setattr("longspan.mechanism._linear_chunks._ROUND", 16)
    for name in ("elu", "exp"):
        q, k, v = qkv(n=50)
        assert_same_with_gradients(
            lambda q, k, v, name=name: linear_attention(q, k, v, name, chunk=8),
            lambda q, k, v, name=name: per_head(oracle(name, True, 0.0), q, k, v),
            (q, k, v),
        )


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_prefill(name):
    torch.manual_seed(0)
    layer = LinearAttention(
        16, 4, kv_heads=2, feature_map=name, max_length=64, chunk=8, rope=1e4
    ).double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :5] = False
    wanted = layer(x, mask)
    first, state = layer(x[:, :11], mask[:, :11], return_state=True)
    parts = [first]
    for t in range(11, 30):
        part, state = layer(x[:, t : t + 1], state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-12, rtol=1e-12)
    assert state.sum_BKRE.shape[:2] == (2, 2)
    assert state.rows == 30


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_leave_the_past_bit_identical(name):
    torch.manual_seed(0)
    layer = LinearAttention(16, 2, feature_map=name, max_length=64, chunk=8)
    assert_no_leak(layer, torch.randn(2, 40, 16), cuts=[1, 7, 8, 9, 24, 39])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_padding_is_absent(name, causal):
    torch.manual_seed(0)
    layer = LinearAttention(
        16, 4, kv_heads=2, feature_map=name, causal=causal, max_length=64, chunk=8
    ).double()
    assert_padding_is_absent(layer, torch.randn(2, 21, 16, dtype=torch.float64), 6, 9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["exp", "elu"])
def test_padding_may_hold_nan_and_gets_no_gradient(name, causal):
    q, k, v = qkv(n=12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False
    for x in (q, k, v):
        x.data[0, :, :4] = torch.nan
    out = linear_attention(q, k, v, name, causal=causal, mask=mask)
    assert out.isfinite().all()
    out.sum().backward()
    for x in (q, k, v):
        assert torch.equal(x.grad[0, :, :4], torch.zeros_like(x.grad[0, :, :4]))
        assert x.grad.isfinite().all()


def test_exp_features_never_overflow():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 50, 8, generator=g) for _ in range(3))
    k[:, :, 20:] += 200
    out = linear_attention(q, k, v, "exp", chunk=8)
    wanted = per_head(oracle("exp", True, 0.0), q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["exp", "performer softmax"])
def test_weights_that_all_but_vanish_have_finite_gradients(name, causal):
    torch.manual_seed(0)
    phi = Performer(16, 2, kernel="softmax").feature_map if name != "exp" else name
    q, k, v = (60 * torch.randn(1, 2, 200, 8) for _ in range(3))
    plain = linear_attention(q, k, v, phi, causal=causal)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = linear_attention(*inputs, phi, causal=causal)
    assert torch.equal(out, plain)
    slopes = torch.autograd.grad(out.sum(), inputs)
    assert all(x.isfinite().all() for x in slopes)
    assert slopes[2].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("low", [-36.0, -42.0, -60.0])
def test_small_features_of_queries_and_keys_have_their_gradients(low, causal):
    """Elu's features of entries far below 0: products of two are close to the least number."""
    torch.manual_seed(0)
    q, k, v = low + torch.randn(1, 2, 9, 4), low + torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    slopes = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = linear_attention(*inputs, "elu", causal=causal)
        slopes.append(torch.autograd.grad(out.square().sum(), inputs))
    for found, wanted in zip(*slopes, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-3)
    least = (low - 60 + torch.randn(1, 2, 9, 4)).requires_grad_()
    out = linear_attention(least, k, v, "elu", causal=causal)
    assert torch.autograd.grad(out.square().sum(), least)[0].isfinite().all()


def test_features_of_mega_keep_their_digits_far_below_the_mean():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    q, k = (0.2 * x - 1 for x in (q, k))
    exact = linear_attention(q, k, v, "mega")
    assert exact.abs().min() > 0
    found = linear_attention(q.float(), k.float(), v.float(), "mega")
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-4)


def test_a_row_without_weight_gives_zero():
    q, k, v = qkv(n=6)
    out = linear_attention(q, -k.abs(), v, "relu")
    assert torch.equal(out, torch.zeros_like(out))


def test_laplace_features_estimate_the_kernel():
    torch.manual_seed(0)
    found = Laplace(8, features=200_000).double()
    x, y = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)
    estimate = found(x, torch.arange(5))[0] @ found(y, torch.arange(5))[0].mT
    exact = (-(x[..., :, None, :] - y[..., None, :, :]).abs().sum(-1) / 8).exp()
    torch.testing.assert_close(estimate, exact, atol=0.01, rtol=0)


def test_low_precision_is_computed_in_float32():
    q, k, v = (x.detach().bfloat16() for x in qkv(n=100))
    exact = linear_attention(q.double(), k.double(), v.double())
    assert (linear_attention(q, k, v).double() - exact).norm() / exact.norm() < 5e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [*NAMES, "performer softmax", "performer relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_features_and_sums_in_float32(dtype, name, causal):
    """Float16 took the features of Hedgehog and Performer out of its range."""
    torch.manual_seed(0)
    if name in NAMES:
        layer = LinearAttention(16, 2, feature_map=name, causal=causal, max_length=200)
    else:
        layer = Performer(16, 2, kernel=name.split()[1], causal=causal)
    q, k, v = (3 * torch.randn(1, 2, 200, 8) for _ in range(3))
    with torch.autocast("cpu", dtype):
        found = linear_attention(q, k, v, layer.feature_map, causal=causal)
        out = layer(6 * torch.randn(1, 200, 16))
    assert torch.equal(found, linear_attention(q, k, v, layer.feature_map, causal=causal))
    assert out.isfinite().all()


def test_names_of_parameters_are_stable():
    names = list(LinearAttention(8, 2).state_dict())
    assert names == ["query.weight", "key.weight", "value.weight", "output.weight"]


def test_refusals_say_what_to_do():
    q, k, v = qkv(n=6)
    with pytest.raises(InputError, match="must be one of cosformer, elu"):
        linear_attention(q, k, v, "gelu")
    with pytest.raises(InputError, match="max_length="):
        LinearAttention(8, 2, feature_map="cosformer")
    with pytest.raises(InputError, match="made for 4 rows, got 6"):
        linear_attention(q, k, v, "cosformer", max_length=4)
    with pytest.raises(InputError, match="only for causal=True"):
        linear_attention(q, k, v, causal=False, return_state=True)
    with pytest.raises(InputError, match="must divide"):
        linear_attention(q[:, :3], k, v)
