"""Linformer against its formula, head by head."""

from __future__ import annotations

import pytest
import torch
from tests.mechanism.oracles import (
    assert_padding_is_absent,
    assert_same_with_gradients,
    per_head,
    qkv,
)

from longspan.errors import InputError, Refusal
from longspan.mechanism import Linformer, linformer_attention


def oracle(e, f):
    def one(q, k, v):
        n = len(q)
        return ((q @ (e[:n].T @ k).T) / q.shape[1] ** 0.5).softmax(-1) @ (f[:n].T @ v)

    return one


@pytest.mark.parametrize("n", [1, 17, 40])
def test_equals_the_formula_with_gradients(n):
    e, f = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(2)).double()
    assert_same_with_gradients(
        lambda q, k, v: linformer_attention(q, k, v, e[None], f[None]),
        lambda q, k, v: per_head(oracle(e, f), q, k, v),
        qkv(n=n, value_dim=5),
    )


def test_own_projections_per_head():
    e, f = torch.randn(2, 2, 40, 6, generator=torch.Generator().manual_seed(2)).double()
    q, k, v = qkv()
    found = linformer_attention(q, k, v, e, f)
    for h in range(4):
        wanted = per_head(
            oracle(e[h // 2], f[h // 2]),
            q[:, h : h + 1],
            *(x[:, h // 2 : h // 2 + 1] for x in (k, v)),
        )
        torch.testing.assert_close(found[:, h : h + 1], wanted)


def test_identity_projections_give_softmax_attention():
    q, k, v = qkv(n=20, kv_heads=4)
    one = torch.eye(20, dtype=torch.float64)[None]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(linformer_attention(q, k, v, one, one), wanted)


@pytest.mark.parametrize("sharing", ["none", "heads", "key_value"])
def test_layer_ignores_padding_on_either_side(sharing):
    torch.manual_seed(0)
    layer = Linformer(16, 4, kv_heads=2, max_length=40, rank=5, sharing=sharing).double()
    assert_padding_is_absent(layer, torch.randn(2, 21, 16, dtype=torch.float64), 6, 9)


def test_sharing_decides_the_parameters():
    def shapes(sharing):
        layer = Linformer(8, 2, max_length=9, rank=3, sharing=sharing)
        return [tuple(p.shape) for name, p in layer.named_parameters() if "project" in name]

    assert shapes("none") == [(2, 9, 3)] * 2
    assert shapes("heads") == [(1, 9, 3)] * 2
    assert shapes("key_value") == [(1, 9, 3)]


def test_refuses_what_it_cannot_do():
    with pytest.raises(Refusal, match="no causal form: each projected key"):
        Linformer(8, 2, causal=True)
    with pytest.raises(InputError, match="made for 9 rows, got 10"):
        Linformer(8, 2, max_length=9)(torch.randn(1, 10, 8))
    with pytest.raises(InputError, match="sharing must be one of"):
        Linformer(8, 2, sharing="all")
