"""Copies of keys that all queries see: the same attention, less work for one program."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import pytest
import torch

import longspan as ls
from longspan.ops import copies
from longspan.ops.copies import copies_of
from longspan.ops.kernels._flex_tiles import count_tiles
from longspan.ops.kernels.reference import reference
from longspan.ops.loading import Loaded, load
from longspan.ops.ranges import KeyRanges
from longspan.ops.suited import _with_copies


@pytest.mark.parametrize(
    ("given", "n", "programs"),
    [
        (ls.parse("window(100) | sink(3)"), 8200, 2),
        (ls.parse("window(100) | sink(3)"), 8200, 4),
        (ls.longformer(200, (77, 4001)), 8200, 2),
        (ls.longformer(200, (77, 4001)), 8200, 4),
        (ls.parse("ssa(32, 4)"), 16384, 2),
    ],
    ids=str,
)
def test_hot_keys_are_copied_and_nothing_else_changes(given, n, programs):
    heads, key_heads = 4, 2
    q, k, v, d_out = (
        torch.randn(1, h, n, 8, dtype=torch.float64) for h in (heads, key_heads, key_heads, heads)
    )
    one = ls.plan(given, n, heads).passes[0]
    loaded = load(one, q, k)
    plain_k, plain_v = k, v
    _, k, v = (x.requires_grad_() for x in loaded.inputs(q, k, v))
    found = copies_of(loaded.ranges, heads, programs)
    assert found is not None
    # Ranges of a query ascend, as kernels that take endpoints need them.
    lo, hi = found.ranges.lo_GNm, found.ranges.hi_GNm
    assert ((lo[..., 1:] >= hi[..., :-1]) | (lo >= hi)[..., 1:]).all()
    assert found.ranges.keys < 2 * loaded.ranges.keys
    row = torch.arange(0, n, n // 50)

    def some(ranges, k, v):
        few = KeyRanges(ranges.lo_GNm[:, row], ranges.hi_GNm[:, row], ranges.group_BH, ranges.keys)
        out, lse = reference(q[:, :, row], k, v, few, 0.4)
        return out, lse, *torch.autograd.grad(out, (k, v), d_out[:, :, row])

    wanted = some(loaded.ranges, k, v)
    big_k, big_v = found.take(k), found.take(v)
    out, lse, *big = some(found.ranges, big_k, big_v)
    grads = torch.autograd.grad((big_k, big_v), (k, v), big)
    for a, b in zip((out, lse, *grads), wanted, strict=True):
        torch.testing.assert_close(a, b)
    before, after = (
        (c.q_GC + c.full_q_GC).amax() for c in map(count_tiles, (loaded.ranges, found.ranges))
    )
    assert after < before / 1.5
    # The order of the pass and the copies are one order.
    composed = _with_copies(one, loaded, n, programs)
    assert isinstance(composed, Loaded)
    inside = torch.zeros(found.ranges.keys, dtype=torch.bool)
    inside[: loaded.ranges.keys] = True
    inside[loaded.ranges.keys :] = found.row_E >= 0
    for found, wanted in zip(
        composed.inputs(q, plain_k, plain_v)[1:], (big_k, big_v), strict=True
    ):
        assert torch.equal(found[:, :, inside], wanted[:, :, inside])


def test_without_hot_keys_nothing_is_copied():
    # The sink of ssa stands in front of the strided keys, which are seen no longer than fair.
    for pattern in ("causal()", "window(100)", "scca.flow(256)", "ssa(100, 8)"):
        q = torch.zeros(1, 4, 8192, 8)
        ranges = load(ls.plan(ls.parse(pattern), 8192, 4).passes[0], q, q).ranges
        assert copies_of(ranges, 4, 4) is None


def test_copies_that_cost_more_than_they_save(monkeypatch):
    # Half of the heads have strided keys, each seen by half of the queries: nearly all are hot.
    q, k = (torch.zeros(1, heads, 32768, 1) for heads in (32, 8))
    ranges = load(ls.plan(ls.parse("longmixed(2048, 8)"), 32768, 32).passes[0], q, k).ranges
    assert copies_of(ranges, 32, 32) is None
    monkeypatch.setattr(copies, "_PRICE", 0.0)
    monkeypatch.setattr(copies, "_copies", WeakKeyDictionary())
    assert copies_of(ranges, 32, 32) is not None
