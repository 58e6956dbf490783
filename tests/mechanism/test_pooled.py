"""Pooled and hierarchical chunk attention against their dense forms."""

from __future__ import annotations

import pytest
import torch
from tests.mechanism.oracles import (
    assert_no_leak,
    assert_padding_is_absent,
    assert_same_with_gradients,
    per_head,
    qkv,
    weighted_softmax,
)

from longspan.errors import InputError
from longspan.mechanism import (
    HierarchicalAttention,
    PooledChunkAttention,
    hierarchical_attention,
    pooled_chunk_attention,
)
from longspan.nn.rotary import rotate
from longspan.position import default

FORMS = [("sum", False), ("joint", False), ("joint", True)]


def oracle(size, causal, combine="sum", count_bias=False, pool=None, turn=None):
    """Dense, one head: chunk summaries as a matrix product, two masks."""

    def one(q, k, v):
        n, d = q.shape
        i, m = torch.arange(n), -(-n // size)
        chunk, j = i // size, torch.arange(m)
        logit = torch.zeros(n, dtype=q.dtype) if pool is None else k @ pool * d**-0.5
        member = chunk[None] == j[:, None]
        weight = logit.expand(m, n).masked_fill(~member, -torch.inf).softmax(-1)
        keys, values, count = weight @ k, weight @ v, member.sum(-1).to(q.dtype)
        if turn is not None:
            q, k, keys = turn(q, i), turn(k, i), turn(keys, j * size + (size - 1) // 2)
        own = (chunk[:, None] == chunk[None]) & ((i[None] <= i[:, None]) | (not causal))
        far = j[None] < chunk[:, None] if causal else j[None] != chunk[:, None]
        near, rest = q @ k.T * d**-0.5, q @ keys.T * d**-0.5
        rest = rest + count.log() if count_bias else rest
        if combine == "joint":
            seen = torch.cat([own, far], 1)
            return weighted_softmax(torch.cat([near, rest], 1), seen, torch.cat([v, values]))
        return weighted_softmax(near, own, v) + weighted_softmax(rest, far, values)

    return one


def hierarchical_oracle(size, causal):
    def one(q, k, v):
        n, d = q.shape
        i, m = torch.arange(n), -(-n // size)
        chunk = i // size
        own = (chunk[:, None] == chunk[None]) & ((i[None] <= i[:, None]) | (not causal))
        local = weighted_softmax(q @ k.T / d**0.5, own, v)
        r, keys = (torch.stack([x[chunk == t].mean(0) for t in range(m)]) for x in (local, k))
        j = torch.arange(m)[None]
        far = j < chunk[:, None] if causal else torch.ones(n, m, dtype=torch.bool)
        return local + weighted_softmax(q @ keys.T / d**0.5, far, r)

    return one


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("combine", "count_bias"), FORMS)
@pytest.mark.parametrize("n", [1, 5, 6, 13, 24, 37])
def test_pooled_equals_the_dense_form_with_gradients(n, combine, count_bias, causal):
    q, k, v = qkv(n=n, value_dim=5)
    how = {"combine": combine, "count_bias": count_bias}
    assert_same_with_gradients(
        lambda q, k, v: pooled_chunk_attention(q, k, v, 6, causal=causal, **how),
        lambda q, k, v: per_head(oracle(6, causal, **how), q, k, v),
        (q, k, v),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 6, 13, 37])
def test_hierarchical_equals_the_dense_form_with_gradients(n, causal):
    q, k, v = qkv(n=n, value_dim=5)
    assert_same_with_gradients(
        lambda q, k, v: hierarchical_attention(q, k, v, 6, causal=causal),
        lambda q, k, v: per_head(hierarchical_oracle(6, causal), q, k, v),
        (q, k, v),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_learned_pooling_and_rotation(causal):
    q, k, v = qkv(n=29, kv_heads=1)
    pool = torch.linspace(-2, 2, 8, dtype=torch.float64).requires_grad_()
    inv_freq = torch.from_numpy(default(8, 1e4).inv_freq)

    def turn(x, place):
        return rotate(x[None, None], place, inv_freq)[0, 0]

    assert_same_with_gradients(
        lambda q, k, v, p: pooled_chunk_attention(
            q, k, v, 6, causal=causal, pool=p[None], rope=1e4
        ),
        lambda q, k, v, p: per_head(oracle(6, causal, pool=p, turn=turn), q, k, v),
        (q, k, v, pool),
    )


def test_what_constant_values_become():
    q, k, v = qkv(n=20)
    ones = torch.ones_like(v)
    doubled = pooled_chunk_attention(q, k, ones, 6)
    assert torch.allclose(doubled[:, :, :6], torch.ones(()).double())
    assert torch.allclose(doubled[:, :, 6:], torch.full((), 2.0).double())
    joint = pooled_chunk_attention(q, k, ones, 6, combine="joint")
    assert torch.allclose(joint, torch.ones(()).double())


def full(q, k, v):
    return per_head(
        lambda q, k, v: weighted_softmax(
            q @ k.T * q.shape[1] ** -0.5, torch.ones(len(q), len(q)).tril(), v
        ),
        q,
        k,
        v,
    )


def test_limits_are_full_attention():
    q, k, v = (x.detach() for x in qkv(n=24))
    for size, combine in ((24, "sum"), (100, "joint"), (1, "joint")):
        found = pooled_chunk_attention(q, k, v, size, combine=combine)
        torch.testing.assert_close(found, full(q, k, v), atol=1e-12, rtol=1e-12)
    flat = k[:, :, ::6].repeat_interleave(6, dim=2)
    found = pooled_chunk_attention(q, flat, v, 6, combine="joint", count_bias=True)
    torch.testing.assert_close(found, full(q, flat, v), atol=1e-12, rtol=1e-12)
    without = pooled_chunk_attention(q, flat, v, 6, combine="joint")
    assert (without - full(q, flat, v)).abs().max() > 0.1


def test_order_inside_a_past_chunk_does_not_matter():
    q, k, v = (x.detach() for x in qkv(n=20))
    order = torch.tensor([3, 0, 5, 1, 4, 2, *range(6, 20)])
    one = pooled_chunk_attention(q, k, v, 6)
    other = pooled_chunk_attention(q, k[:, :, order], v[:, :, order], 6)
    torch.testing.assert_close(one[:, :, 6:], other[:, :, 6:], atol=1e-12, rtol=1e-12)
    assert (one - other)[:, :, :6].abs().max() > 0.1


LAYERS = [
    (PooledChunkAttention, {"combine": "sum", "rope": 1e4}),
    (PooledChunkAttention, {"combine": "joint", "count_bias": True, "pool": "learned"}),
    (HierarchicalAttention, {"rope": 1e4}),
]


def layer(kind, **kwargs):
    torch.manual_seed(0)
    one = kind(16, 4, chunk=6, **{"kv_heads": 2, **kwargs}).double()
    if one.pool is not None:
        torch.nn.init.normal_(one.pool)
    return one


@pytest.mark.parametrize(("kind", "kwargs"), LAYERS)
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_equals_prefill(kind, kwargs, masked):
    one = layer(kind, **kwargs)
    x = torch.randn(2, 32, 16, dtype=torch.float64)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, :5] = False
    mask[0, 20] = False
    given = mask if masked else None
    wanted = one(x, given)
    parts, state, start = [], None, 0
    for size in (8, 1, 1, 13, *9 * [1]):
        rows = slice(start, start + size)
        step = given[:, rows] if masked else None
        part, state = one(x[:, rows], step, state=state, return_state=True)
        parts.append(part)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-12, rtol=1e-12)
    # One summary per closed chunk, and fewer tokens than a chunk.
    assert state.key.shape[2] == 5
    assert state.open_key.shape[2] < 6


@pytest.mark.parametrize(("kind", "kwargs"), LAYERS)
def test_later_tokens_leave_the_past_bit_identical(kind, kwargs):
    one = layer(kind, **kwargs).float()
    assert_no_leak(one, torch.randn(2, 30, 16), cuts=[1, 5, 6, 7, 12, 29])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kind", "kwargs"), LAYERS)
def test_padding_is_absent(kind, kwargs, causal):
    one = layer(kind, causal=causal, **kwargs)
    for n in (5, 18, 21):
        assert_padding_is_absent(one, torch.randn(2, n, 16, dtype=torch.float64), 5, 9)


def test_learned_pooling_starts_as_the_mean():
    torch.manual_seed(0)
    learned = PooledChunkAttention(16, 4, chunk=6, pool="learned")
    mean = PooledChunkAttention(16, 4, chunk=6)
    mean.load_state_dict({k: v for k, v in learned.state_dict().items() if k != "pool"})
    x = torch.randn(1, 20, 16)
    torch.testing.assert_close(learned(x), mean(x))


def test_the_state_is_small():
    one = layer(PooledChunkAttention)
    _, state = one(torch.randn(1, 6 * 40 + 2, 16, dtype=torch.float64), return_state=True)
    assert state.key.shape[2] == 40
    assert state.open_key.shape[2] == 2


def test_refusals_say_what_to_do():
    q, k, v = qkv(n=6)
    with pytest.raises(InputError, match="sum or joint, got 'gate'"):
        pooled_chunk_attention(q, k, v, 4, combine="gate")
    with pytest.raises(InputError, match="needs combine='joint'"):
        PooledChunkAttention(16, 4, chunk=4, count_bias=True)
    with pytest.raises(InputError, match="only for causal=True"):
        hierarchical_attention(q, k, v, 4, causal=False, return_state=True)
    with pytest.raises(InputError, match="mean or learned, got 'max'"):
        HierarchicalAttention(16, 4, chunk=4, pool="max")
    with pytest.raises(InputError, match="chunk must be a whole number"):
        pooled_chunk_attention(q, k, v, 0)
