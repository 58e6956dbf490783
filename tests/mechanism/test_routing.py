"""Routing attention against explicit clusters."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.mechanism.oracles import (
    assert_no_leak,
    assert_padding_is_absent,
    assert_same_with_gradients,
    weighted_softmax,
)
from torch.nn.functional import normalize

from longspan.errors import InputError, Refusal
from longspan.mechanism import RoutingAttention, routing_attention


def clusters(q, k, v, centroids, w, causal, shared):
    """One head: every cluster in a loop, then the mean."""
    n, d = q.shape
    near_q, near_k = normalize(q, dim=-1) @ centroids.T, normalize(k, dim=-1) @ centroids.T
    k = normalize(k, dim=-1) if shared else k
    total, times = torch.zeros(n, v.shape[1], dtype=q.dtype), torch.zeros(n, 1, dtype=q.dtype)
    for c in range(len(centroids)):
        taken_q, taken_k = (x[:, c].topk(min(w, n)).indices.tolist() for x in (near_q, near_k))
        for i in taken_q:
            sees = [j for j in taken_k if not causal or j <= i]
            if shared:
                sees = [j for j in sees if j != i] or [i]
            if sees:
                weight = (k[sees] @ q[i] / d**0.5).softmax(0)
                total = total + torch.nn.functional.one_hot(torch.tensor(i), n)[:, None] * (
                    weight @ v[sees]
                )
                times[i] += 1
    return total / times.clamp_min(1)


def window(q, k, v, centroids, w, causal, shared):
    n, d = q.shape
    of_q, of_k = ((normalize(x, dim=-1) @ centroids.T).argmax(-1) for x in (q, k))
    k = normalize(k, dim=-1) if shared else k
    count = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        same = [j for j in range(i if shared else i + 1) if of_k[j] == of_q[i]]
        count[i, same[-w:] or [i]] = 1
    return weighted_softmax(q @ k.T / d**0.5, count, v)


def per_head(one, q, k, v, centroids, *rest):
    repeat = q.shape[1] // k.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    one(
                        q[b, h],
                        k[b, h // repeat],
                        v[b, h // repeat],
                        centroids[h // repeat],
                        *rest,
                    )
                    for h in range(q.shape[1])
                ]
            )
            for b in range(q.shape[0])
        ]
    )


def inputs(n, shared=False):
    g = torch.Generator().manual_seed(0)
    heads = 2 if shared else 4
    q = torch.randn(2, heads, n, 6, generator=g, dtype=torch.float64).requires_grad_()
    k, v = torch.randn(2, 2, 2, n, 6, generator=g, dtype=torch.float64)
    centroids = torch.randn(2, 4, 6, generator=g, dtype=torch.float64)
    return [q, *([] if shared else [k.requires_grad_()]), v.requires_grad_()], centroids


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("selection", "causal", "slow"),
    [("clusters", True, clusters), ("clusters", False, clusters), ("window", True, window)],
)
@pytest.mark.parametrize("n", [1, 5, 23])
def test_equals_explicit_clusters_with_gradients(selection, causal, slow, shared, n):
    given, centroids = inputs(n, shared)

    def fast(q, *kv):
        k, v = (q, *kv) if shared else kv
        options = {"selection": selection, "shared_key": shared, "causal": causal}
        return routing_attention(q, k, v, centroids, window=5, **options)

    def wanted(q, *kv):
        k, v = (q, *kv) if shared else kv
        return per_head(slow, q, k, v, centroids, 5, causal, shared)

    assert_same_with_gradients(fast, wanted, given)


def test_one_cluster_of_all_rows_is_dense_attention():
    (q, k, v), centroids = inputs(20)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    for selection in ("clusters", "window"):
        found = routing_attention(q, k, v, centroids[:, :1], window=20, selection=selection)
        torch.testing.assert_close(found, wanted)


def layer(**options):
    torch.manual_seed(0)
    own = RoutingAttention(16, 4, clusters=3, window=6, **{"kv_heads": 2} | options)
    return own.double().eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"selection": "window"}, {"shared_key": True, "kv_heads": 4}],
    ids=str,
)
def test_padding_is_absent(options):
    x = torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_padding_is_absent(layer(**options), x, 5, 8)
    assert_padding_is_absent(layer(**options), x[:, :4], 2, 9)


def test_the_window_never_leaks_and_clusters_do_through_selection_alone():
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_no_leak(layer(selection="window", rope=1e4), x, [1, 8, 25, 39], 1e-12)
    (q, k, v), centroids = inputs(40)
    base = routing_attention(q, k, v, centroids, window=5)
    keys, values = k.clone(), v.clone()
    keys[:, :, 20:] = centroids[:, None, 1]
    values[:, :, 20:] += 1
    changed = routing_attention(q, k, values, centroids, window=5)
    assert torch.equal(changed[:, :, :20], base[:, :, :20])
    changed = routing_attention(q, keys, v, centroids, window=5)
    assert not torch.allclose(changed[:, :, :20], base[:, :, :20])


@pytest.mark.parametrize("shared", [True, False])
def test_decoding_equals_prefill_with_the_window(shared):
    own = layer(selection="window", rope=1e4, shared_key=shared, kv_heads=4 if shared else 2)
    x = torch.randn(2, 25, 16, dtype=torch.float64)
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[1, :4] = False
    first, state = own(x[:, :9], mask[:, :9], return_state=True)
    parts = [first]
    for t in range(9, 25):
        part, state = own(x[:, t : t + 1], state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), own(x, mask), atol=1e-12, rtol=1e-12)


def test_centroids_follow_the_tokens_only_when_told():
    own = layer()
    before = own.centroids.clone()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    own.train()
    _, first = own(x, return_loss=True)
    assert torch.equal(own.centroids, before)
    for _ in range(5):
        own.update_centroids(decay=0.0)
        _, loss = own(x, return_loss=True)
    assert loss < first
    assert loss.requires_grad
    own.eval()
    own.update_centroids()
    q, k, _ = own.project(x, torch.arange(30))
    own.train()
    own(x)
    tokens = normalize(torch.cat([q[:, :2].flatten(1, 2), k[:, 0]], 1), dim=-1).flatten(0, 1)
    near = (tokens @ own.centroids[0].T).argmax(-1)
    wanted = torch.stack(
        [
            0.9 * own.centroids[0, c] + 0.1 * normalize(tokens[near == c].sum(0), dim=0)
            for c in range(3)
        ]
    )
    own.update_centroids(decay=0.9)
    torch.testing.assert_close(own.centroids[0], wanted)
    assert next(iter(own.state_dict())) == "centroids"
    assert "gathered" not in own.state_dict()


@pytest.mark.parametrize("value", [9.0, torch.nan])
def test_padding_moves_no_centroid(value):
    own = layer().train()
    x = torch.randn(1, 10, 16, dtype=torch.float64)
    own(x)
    wanted = own.gathered.clone()
    own.gathered.zero_()
    wide = torch.cat([torch.full((1, 4, 16), value).double(), x], 1)
    own(wide, torch.arange(14)[None] >= 4)
    torch.testing.assert_close(own.gathered, wanted)


def test_float16_moves_centroids_and_has_a_loss_beside_padding():
    own = layer().float().train()
    low = copy.deepcopy(own).half()
    own.load_state_dict(low.state_dict())
    x = torch.randn(2, 30, 16).half()
    mask = torch.arange(30) >= torch.tensor([[0], [8]])
    (_, wanted), (_, found) = (
        own(x.float(), mask, return_loss=True),
        low(x, mask, return_loss=True),
    )
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(low.gathered.float(), own.gathered, atol=2e-2, rtol=2e-2)


def test_refusals_say_what_to_do():
    with pytest.raises(Refusal, match='Use selection="window"'):
        layer()(torch.randn(1, 8, 16).double(), return_state=True)
    with pytest.raises(InputError, match="is causal"):
        layer(selection="window", causal=False)
    (q, k, v), centroids = inputs(5)
    with pytest.raises(InputError, match=r"expected centroids \[2, clusters, 6\]"):
        routing_attention(q, k, v, centroids[:1], window=5)
