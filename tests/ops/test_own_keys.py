"""Keys gathered for each key head alone: the same attention over fewer rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import longspan as ls
from longspan.ops.loading import Loaded, load
from longspan.ops.own_keys import own_keys

PATTERNS = ["strided(4)", "sda(64, 4)", "random(8) | strided(4)"]


@pytest.mark.parametrize("n", [256, 203])
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("text", PATTERNS)
def test_equals_dense_attention_under_the_mask(text, key_heads, n):
    pattern = ls.parse(text)
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 8, generator=make, dtype=torch.float64, requires_grad=True)
        for h in (8, key_heads, key_heads)
    )
    slope = torch.randn(2, 8, n, 8, generator=make, dtype=torch.float64)
    mask = torch.from_numpy(pattern.mask(n, heads=8))
    wanted = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    found = ls.attend(q, k, v, pattern, impl="tiled")
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), slope),
        torch.autograd.grad(wanted, (q, k, v), slope),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_each_head_gets_the_keys_that_it_sees():
    (one,) = ls.plan(ls.parse("strided(4)"), 256, 8).passes
    q = torch.arange(256.0).view(1, 1, 256, 1).expand(1, 8, 256, 1)
    loaded = load(one, q, q)
    assert isinstance(loaded, Loaded)
    _, k, _ = loaded.inputs(q, q, q)
    # The first queries of a remainder see themselves: up to three keys more.
    assert k.shape == (1, 8, 67, 1)
    for head, keys in enumerate(k[0, :, :, 0].long().tolist()):
        assert {*range(head % 4, 256, 4)} <= {*keys} <= {0, 1, 2, *range(head % 4, 256, 4)}


def test_where_heads_of_a_key_head_differ_they_share_all_keys():
    (one,) = ls.plan(ls.parse("strided(4)"), 256, 8).passes
    assert own_keys(one, 8) is not None
    assert own_keys(one, 2) is None
    (same,) = ls.plan(ls.parse("window(9)"), 256, 8).passes
    assert own_keys(same, 8) is None


def test_no_leak():
    make = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 300, 8, generator=make)
    before = ls.attend(q, k, v, "longnet([64, 128, 256], [1, 2, 4])", impl="tiled")
    for x in (q, k, v):
        x[:, :, 200:] = torch.randn(100, 8, generator=make)
    after = ls.attend(q, k, v, "longnet([64, 128, 256], [1, 2, 4])", impl="tiled")
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])
