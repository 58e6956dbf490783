"""Synthesizer against explicit N x N logits."""

from __future__ import annotations

import pytest
import torch
from tests.mechanism.oracles import (
    assert_decoding_equals_prefill,
    assert_no_leak,
    assert_padding_is_absent,
    assert_same_with_gradients,
    weighted_softmax,
)

from longspan.errors import InputError, Refusal
from longspan.mechanism import Synthesizer
from longspan.mechanism.synthesizer import KINDS

MIXTURES = [("dense", "factorized"), ("random", "dot_product"), KINDS]


def logits(layer, kind, x, h):
    """B [n, n] of one head, written out."""
    n, (width, p) = len(x), (layer.head_dim, dict(layer.named_parameters()))

    def hidden(name):
        part = slice(h * width, (h + 1) * width)
        return torch.relu(x @ p[f"{name}.weight"][part].T + p[f"{name}.bias"][part])

    if kind == "dense":
        return hidden("dense_hidden") @ p["dense_key"][h, :n].T + p["dense_bias"][h, :n]
    if kind == "random":
        return p["random"][h, :n, :n]
    if kind == "factorized":
        return (p["factor_query"][h] @ p["factor_key"][h].T)[:n, :n]
    if kind == "factorized_dense":
        a, b = hidden("coarse") @ p["coarse_key"][h].T, hidden("fine") @ p["fine_key"][h].T
        s = layer.side
        return torch.stack([a[:, j // s] * b[:, j % s] for j in range(n)], dim=1)
    kv = h * layer.kv_heads // layer.heads
    q = x @ layer.query.weight[h * width : (h + 1) * width].T
    k = x @ layer.key.weight[kv * width : (kv + 1) * width].T
    return q @ k.T / width**0.5


def oracle(layer, x):
    out = []
    for row in x:
        n, heads = len(row), []
        for h in range(layer.heads):
            parts = [logits(layer, kind, row, h) for kind in layer.kinds]
            shares = layer.mixture.softmax(0) if len(parts) > 1 else [1.0]
            b = sum(s * part for s, part in zip(shares, parts, strict=True))
            kv = h * layer.kv_heads // layer.heads
            v = row @ layer.value.weight[kv * layer.head_dim : (kv + 1) * layer.head_dim].T
            allowed = torch.ones(n, n, dtype=torch.float64)
            heads.append(weighted_softmax(b, allowed.tril() if layer.causal else allowed, v))
        out.append(torch.cat(heads, dim=1) @ layer.output.weight.T)
    return torch.stack(out)


def build(kind, **changes):
    torch.manual_seed(0)
    layer = Synthesizer(16, 4, kv_heads=2, kind=kind, max_length=40, **changes).double()
    for p in layer.parameters():
        # Biases and shares that are zero would hide mistakes.
        p.data += 0.1 * torch.randn_like(p)
    return layer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES], ids=str)
def test_equals_explicit_logits_with_gradients(kind, causal):
    layer = build(kind, causal=causal)
    x = torch.randn(2, 23, 16, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    assert_same_with_gradients(lambda x, *_: layer(x), lambda x, *_: oracle(layer, x), inputs)


@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES], ids=str)
def test_later_tokens_leave_the_past_bit_identical(kind):
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind in ("random", "factorized"):
        # Weights ignore x, but values do not.
        layer = build(kind)
        assert torch.equal(layer(2 * x), 2 * layer(x))
    assert_no_leak(build(kind), x, cuts=[1, 16, 29])


@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES], ids=str)
def test_a_prefix_alone_gives_the_same_rows(kind):
    layer, x = build(kind), torch.randn(2, 40, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x[:, :7]), layer(x)[:, :7])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES], ids=str)
def test_padding_is_absent(kind, causal):
    x = torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_padding_is_absent(build(kind, causal=causal), x, 6, 9)


@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES], ids=str)
def test_decoding_equals_the_whole_sequence(kind):
    layer, x = build(kind, rope=10000.0), torch.randn(2, 21, 16, dtype=torch.float64)
    mask = torch.arange(21) >= torch.tensor([[0], [6]])
    assert_decoding_equals_prefill(layer, x, mask, (8, 1, 5, 6, 1))


@pytest.mark.parametrize("mask", [None, torch.ones(1, 8)], ids=["whole", "padded"])
def test_a_named_kernel_is_the_one_that_runs(mask):
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    for impl, words in (("flash", "runs on cuda"), ("none", "impl must be")):
        layer = Synthesizer(16, 4, max_length=8, impl=impl).double()
        with pytest.raises(Refusal, match=words):
            layer(x, mask)


def test_only_what_a_kind_needs_is_a_parameter():
    assert list(Synthesizer(8, 2, kind="factorized").state_dict()) == [
        "factor_query",
        "factor_key",
        "value.weight",
        "output.weight",
    ]
    fixed = Synthesizer(8, 2, kind="random", fixed_random=True)
    assert "random" in fixed.state_dict()
    assert "random" not in dict(fixed.named_parameters())


def test_refusals_say_what_to_do():
    with pytest.raises(InputError, match="one or several of dense"):
        Synthesizer(8, 2, kind="sparse")
    with pytest.raises(InputError, match="made for 9 rows, got 10"):
        Synthesizer(8, 2, max_length=9)(torch.randn(1, 10, 8))
    layer = Synthesizer(8, 2, max_length=9)
    _, state = layer(torch.randn(1, 9, 8), return_state=True)
    with pytest.raises(InputError, match="made for 9 rows, got 10"):
        layer(torch.randn(1, 1, 8), state=state)
    with pytest.raises(InputError, match="only for causal=True"):
        Synthesizer(8, 2, causal=False)(torch.randn(1, 4, 8), return_state=True)
