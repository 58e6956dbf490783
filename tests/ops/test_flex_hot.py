"""Copies of keys that all queries see: the same attention, less work for one program."""

from __future__ import annotations

import pytest
import torch

import longspan as ls
from longspan.ops.kernels._flex_hot import copies_of
from longspan.ops.kernels._flex_tiles import count_tiles
from longspan.ops.kernels.reference import reference
from longspan.ops.ranges import KeyRanges
from longspan.ops.run import load


@pytest.mark.parametrize("pattern", ["window(100) | sink(3)", "longformer"])
def test_hot_keys_are_copied_and_nothing_else_changes(pattern):
    n, heads, key_heads = 8200, 4, 2
    given = ls.longformer(200, (77, 4001)) if pattern == "longformer" else ls.parse(pattern)
    q, k, v, d_out = (
        torch.randn(1, h, n, 8, dtype=torch.float64) for h in (heads, key_heads, key_heads, heads)
    )
    one = ls.plan(given, n, heads).passes[0]
    loaded = load(one, q, k)
    _, k, v = (x.requires_grad_() for x in loaded.inputs(q, k, v))
    copies = copies_of(loaded.ranges, heads, key_heads)
    assert copies is not None
    assert copies.ranges.keys < 2 * loaded.ranges.keys
    row = torch.arange(0, n, 41)

    def some(ranges, k, v):
        few = KeyRanges(ranges.lo_GNm[:, row], ranges.hi_GNm[:, row], ranges.group_BH, ranges.keys)
        out, lse = reference(q[:, :, row], k, v, few, 0.4)
        return out, lse, *torch.autograd.grad(out, (k, v), d_out[:, :, row])

    wanted = some(loaded.ranges, k, v)
    big_k, big_v = copies.take(k), copies.take(v)
    out, lse, *big = some(copies.ranges, big_k, big_v)
    grads = torch.autograd.grad((big_k, big_v), (k, v), big)
    for a, b in zip((out, lse, *grads), wanted, strict=True):
        torch.testing.assert_close(a, b)
    before, after = (
        (c.q_GC + c.full_q_GC)[:, 0].amax()
        for c in map(count_tiles, (loaded.ranges, copies.ranges))
    )
    assert after < before / 2


def test_without_hot_keys_nothing_is_copied():
    # The sink of ssa stands in front of the strided keys.
    for pattern in ("causal()", "window(100)", "scca.flow(256)", "ssa(100, 8)"):
        q = torch.zeros(1, 4, 8192, 8)
        ranges = load(ls.plan(ls.parse(pattern), 8192, 4).passes[0], q, q).ranges
        assert copies_of(ranges, 4, 4) is None
