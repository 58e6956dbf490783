"""LSH attention against explicit counts, and against the layer of transformers."""

from __future__ import annotations

import pytest
import torch
from tests.mechanism.oracles import (
    assert_no_leak,
    assert_padding_is_absent,
    assert_same_with_gradients,
    weighted_softmax,
)

from longspan.errors import InputError, Refusal
from longspan.mechanism import LSHAttention, lsh_attention
from longspan.mechanism._lsh_attention import hash_buckets


def counts(bucket, chunk, before=1, after=0):
    """How often each row sees each key [n, n]; bucket [R, n], n a multiple of the chunk."""
    rounds, n = bucket.shape
    big = int(bucket.max()) + 1
    key = ((bucket + big * torch.arange(rounds)[:, None]) * n + torch.arange(n)).reshape(-1)
    chunks = (key.argsort() % n).view(-1, chunk)
    found = torch.zeros(n, n, dtype=torch.float64)
    for c in range(len(chunks)):
        for o in range(-before, after + 1):
            for i in chunks[c].tolist():
                found[i, chunks[(c + o) % len(chunks)]] += 1
    return found


def window_counts(bucket, window):
    rounds, n = bucket.shape
    found = torch.zeros(n, n, dtype=torch.float64)
    for r in range(rounds):
        for i in range(n):
            same = [j for j in range(i) if bucket[r, j] == bucket[r, i]]
            found[i, same[-window:]] += 1
    return found


def attention(qk, v, count, causal, union=False, scale=1.0):
    n = len(qk)
    k = qk * (qk.square().mean(-1, keepdim=True) + 1e-6).rsqrt() / qk.shape[1] ** 0.5
    count = count.clamp(max=1) if union else count
    count = count.tril() if causal else count
    # A row's own key is left only where there is no other.
    others = count.masked_fill(torch.eye(n, dtype=torch.bool), 0.0)
    alone = (others.sum(-1) == 0)[:, None] & torch.eye(n, dtype=torch.bool)
    return weighted_softmax(qk @ k.T * scale, torch.where(alone, 1.0, others), v)


def inputs(n=48, rounds=2, buckets=6, batch=2, heads=2, dim=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    qk, v = torch.randn(2, batch, heads, n, dim, generator=g, dtype=torch.float64)
    bucket = torch.randint(0, buckets, (batch, heads, rounds, n), generator=g)
    return qk.requires_grad_(), v.requires_grad_(), bucket


def oracle(bucket, count, **options):
    def whole(qk, v):
        return torch.stack(
            [
                torch.stack(
                    [
                        attention(qk[b, h], v[b, h], count(bucket[b, h]), **options)
                        for h in range(qk.shape[1])
                    ]
                )
                for b in range(qk.shape[0])
            ]
        )

    return whole


@pytest.mark.parametrize("counting", ["multiset", "union"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("rounds", "before", "after"), [(1, 1, 0), (3, 1, 0), (2, 1, 1), (2, 0, 0)]
)
def test_equals_explicit_counts_with_gradients(counting, causal, rounds, before, after):
    qk, v, bucket = inputs(rounds=rounds)
    wanted = oracle(
        bucket,
        lambda b: counts(b, 8, before, after),
        causal=causal,
        union=counting == "union",
        scale=0.7,
    )

    def fast(qk, v):
        return lsh_attention(
            qk,
            v,
            bucket,
            chunk=8,
            before=before,
            after=after,
            causal=causal,
            counting=counting,
            scale=0.7,
        )

    assert_same_with_gradients(fast, wanted, [qk, v])


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_ring_shorter_than_what_is_looked_at(rounds):
    qk, v, bucket = inputs(n=8, rounds=rounds)
    for counting in ("multiset", "union"):
        wanted = oracle(
            bucket, lambda b: counts(b, 8, 1, 1), causal=True, union=counting == "union"
        )
        found = lsh_attention(qk, v, bucket, chunk=8, after=1, counting=counting)
        torch.testing.assert_close(found, wanted(qk, v), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_window_equals_explicit_counts_with_gradients(rounds):
    qk, v, bucket = inputs(n=45, rounds=rounds, buckets=3)
    assert_same_with_gradients(
        lambda qk, v: lsh_attention(qk, v, bucket, chunk=3, selection="window"),
        oracle(bucket, lambda b: window_counts(b, 6), causal=True),
        [qk, v],
    )


def test_one_bucket_and_one_chunk_is_dense_attention_without_self():
    qk, v, bucket = inputs(n=16, rounds=1, buckets=1)
    wanted = oracle(bucket, lambda b: torch.ones(16, 16).double(), causal=True)(qk, v)
    torch.testing.assert_close(lsh_attention(qk, v, bucket, chunk=16, before=0), wanted)
    torch.testing.assert_close(lsh_attention(qk, v, bucket, chunk=16, selection="window"), wanted)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 29])
def test_any_length(n):
    qk, v, bucket = inputs(n=n)
    for counting in ("multiset", "union"):
        found = lsh_attention(qk, v, bucket, chunk=8, counting=counting)
        assert found.isfinite().all()
        torch.testing.assert_close(found[:, :, 0], v[:, :, 0])


def layer(**options):
    torch.manual_seed(0)
    defaults = {"buckets": 4, "rounds": 2, "chunk": 8}
    return LSHAttention(16, 2, **defaults | options).double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"counting": "union"},
        {"causal": False, "after": 1},
        {"selection": "window"},
        {"buckets": (4, 2)},
    ],
    ids=str,
)
def test_padding_is_absent(options):
    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_padding_is_absent(layer(**options), x, 8, 16)
    assert_padding_is_absent(layer(**options), x[:, :21], 3, 6)


def test_the_window_never_leaks_and_chunks_do_through_selection_alone():
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_no_leak(layer(selection="window", rope=1e4), x, [1, 8, 9, 25, 39], 1e-12)
    qk, v, bucket = inputs(n=40)
    base = lsh_attention(qk, v, bucket, chunk=8)
    later = bucket.clone()
    later[..., 20:] = 0
    assert not torch.allclose(lsh_attention(qk, v, later, chunk=8)[:, :, :20], base[:, :, :20])
    values = v.clone()
    values[:, :, 20:] += 1
    changed = lsh_attention(qk, values, bucket, chunk=8)
    assert torch.equal(changed[:, :, :20], base[:, :, :20])


def test_decoding_equals_prefill_with_the_window():
    own = layer(selection="window", rope=1e4)
    x = torch.randn(2, 25, 16, dtype=torch.float64)
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[1, :4] = False
    first, state = own(x[:, :9], mask[:, :9], return_state=True)
    parts = [first]
    for t in range(9, 25):
        part, state = own(x[:, t : t + 1], state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), own(x, mask), atol=1e-12, rtol=1e-12)


def hf_layer(**changes):
    transformers = pytest.importorskip("transformers")
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        hidden_size=32,
        num_attention_heads=2,
        attention_head_size=8,
        lsh_attn_chunk_length=8,
        lsh_attention_probs_dropout_prob=0.0,
        **{"num_buckets": 6, "num_hashes": 2, "hash_seed": 3, "is_decoder": True} | changes,
    )
    return LSHSelfAttention(config, layer_idx=0).double().eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_decoder": False, "num_hashes": 1},
        {"num_buckets": [4, 2], "num_hashes": 3},
        {"lsh_num_chunks_after": 1, "is_decoder": False},
    ],
    ids=str,
)
def test_loads_the_layer_of_transformers(changes):
    theirs = hf_layer(**changes)
    ours = LSHAttention.from_hf(theirs)
    x = torch.randn(2, 48, 32, dtype=torch.float64)
    mask = torch.ones(2, 48, dtype=torch.bool)
    mask[1, 37:] = False
    for given in (None, mask):
        wanted = theirs(x, attention_mask=given)
        found = ours(x, given)
        rows = torch.ones_like(mask) if given is None else mask
        torch.testing.assert_close(found[rows], wanted.hidden_states[rows], atol=1e-10, rtol=1e-10)
    q = ours.query(x).unflatten(-1, (2, -1)).transpose(1, 2)
    offset = torch.arange(ours.rotations.shape[2])[:, None] * torch.tensor(ours.buckets).prod()
    assert torch.equal(theirs(x).buckets - offset, hash_buckets(q, ours.rotations, ours.buckets))


def test_short_inputs_of_transformers_are_dense():
    theirs = hf_layer()
    x = torch.randn(2, 8, 32, dtype=torch.float64)
    torch.testing.assert_close(
        LSHAttention.from_hf(theirs)(x), theirs(x).hidden_states, atol=1e-10, rtol=1e-10
    )


def test_refusals_say_what_to_do():
    with pytest.raises(Refusal, match='Use selection="window"'):
        layer()(torch.randn(1, 8, 16).double(), return_state=True)
    with pytest.raises(InputError, match="hashes at random: set hash_seed"):
        LSHAttention.from_hf(hf_layer(hash_seed=None))
    with pytest.raises(InputError, match="leave kv_heads out"):
        LSHAttention(16, 4, kv_heads=2)
    with pytest.raises(InputError, match="even numbers"):
        LSHAttention(16, 4, buckets=5)
    with pytest.raises(InputError, match="counts of single pairs"):
        layer(selection="window", counting="union")
    with pytest.raises(InputError, match="is causal"):
        layer(selection="window", causal=False)
