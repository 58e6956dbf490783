"""Longformer and BigBird against dense forms, and against the layers of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.mechanism.oracles import (
    assert_padding_is_absent,
    assert_same_with_gradients,
    per_head,
    qkv,
    weighted_softmax,
)

import longspan as ls
from longspan.errors import InputError, Refusal
from longspan.mechanism import BigBirdAttention, LongformerAttention, published_bigbird_attention


def heads(x):
    return x.unflatten(-1, (-1, 4)).transpose(0, 1)


def dense_longformer(layer, x, side, steps, is_global):
    """One batch row [n, d_model], head by head."""
    i = torch.arange(len(x))
    names = ("query", "key", "value", "query_global", "key_global", "value_global")
    q, k, v, qg, kg, vg = (heads(getattr(layer, name)(x)) for name in names)
    out = []
    for h, step in enumerate(steps):
        own = h * layer.kv_heads // layer.heads
        back = i[None] - i[:, None]
        keep = (back.abs() <= side * step) & (back % step == 0) | is_global[None]
        near = weighted_softmax(q[h] @ k[own].T * 0.5, keep, v[own])
        far = weighted_softmax(qg[h] @ kg[own].T * 0.5, torch.ones_like(keep), vg[own])
        out.append(torch.where(is_global[:, None], far, near))
    return layer.output(torch.stack(out, 1).flatten(1))


@pytest.mark.parametrize("n", [1, 2, 9, 40])
@pytest.mark.parametrize("dilation", [1, (1, 3)])
def test_longformer_equals_the_dense_form_with_gradients(n, dilation):
    torch.manual_seed(0)
    layer = LongformerAttention(16, 4, kv_heads=2, window=6, dilation=dilation).double()
    is_global = torch.zeros(2, n, dtype=torch.bool)
    is_global[0, [0, n // 2, n - 1]] = True
    is_global[1, n // 3] = True
    steps = (1, 1, 1, 1) if dilation == 1 else (1, 1, 3, 3)
    weights = list(layer.parameters())
    x = torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        lambda x, *_: layer(x, global_mask=is_global),
        lambda x, *_: torch.stack(
            [
                dense_longformer(layer, row, 3, steps, own)
                for row, own in zip(x, is_global, strict=True)
            ]
        ),
        [x, *weights],
    )


def test_a_window_over_everything_is_full_attention():
    layer = LongformerAttention(16, 4, window=60).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    full = ls.nn.Attention(16, 4, "dense()").double()
    full.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), full(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rope", [None, 1e4])
def test_longformer_padding_is_absent(rope):
    torch.manual_seed(0)
    layer = LongformerAttention(16, 4, kv_heads=2, window=6, global_tokens=(0, 11), rope=rope)
    for n in (1, 8, 30):
        x = torch.randn(2, n, 16, dtype=torch.float64)
        assert_padding_is_absent(layer.double(), x, 5, 9)


def test_listed_tokens_and_a_mask_say_the_same():
    layer = LongformerAttention(16, 4, window=6, global_tokens=(1, 4))
    x = torch.randn(2, 20, 16)
    mask = torch.arange(20) >= torch.tensor([[0], [3]])
    is_global = torch.zeros(2, 20, dtype=torch.bool)
    is_global[0, [1, 4]] = is_global[1, [4, 7]] = True
    assert torch.equal(layer(x, mask), layer(x, mask, global_mask=is_global))


def hf_longformer(window):
    transformers = pytest.importorskip("transformers")
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )
    return LongformerSelfAttention(config, 0).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])
def test_loads_the_longformer_layer_of_transformers(dtype, tolerance):
    theirs = hf_longformer(8).to(dtype)
    ours = LongformerAttention.from_hf(theirs)
    x = torch.randn(3, 32, 32, dtype=dtype, requires_grad=True)
    mask = torch.zeros(3, 32, dtype=dtype)
    mask[0, [0, 17]] = mask[1, [3, 4]] = mask[2, [9, 31]] = 1e4

    def reference(x):
        return theirs(
            x,
            attention_mask=mask,
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=True,
        )[0]

    assert_same_with_gradients(
        lambda x: ours(x, mask >= 0, global_mask=mask > 0), reference, [x], tolerance
    )
    # Outputs only: with padding, or unequal numbers of global tokens, gradients of theirs in
    # float64 are NaN.
    mask[1, 27:] = mask[2, 20:] = -1e4
    mask[1, 4] = 0
    found = ours(x, mask >= 0, global_mask=mask > 0)
    torch.testing.assert_close(found, reference(x), atol=tolerance, rtol=tolerance)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert grad.isfinite().all()
    none = torch.zeros_like(mask, dtype=torch.bool)
    plain = theirs(x, torch.zeros_like(mask), none, none, False)[0]
    torch.testing.assert_close(ours(x), plain, atol=tolerance, rtol=tolerance)


def bigbird_counts(blocks, drawn):
    """How often each block sees each: fixed ones once, drawn ones as often as they are listed."""
    count = torch.zeros(blocks, blocks)
    count[0] = count[-1] = 1
    for a in range(1, blocks - 1):
        for b in {0, blocks - 1, a - 1, a, a + 1}:
            count[a, b] += 1
        for b in drawn[a - 1]:
            count[a, b] += 1
    return count


@pytest.mark.parametrize("repeated", [False, True])
def test_published_bigbird_counts_as_often_as_listed(repeated):
    blocks, size = 7, 3
    numbers = np.random.default_rng(0).integers(0, blocks, (4, blocks - 2, 2))
    drawn = (numbers * 0 if repeated else numbers).tolist()
    q, k, v = qkv(n=blocks * size, value_dim=5)

    def slow(q, k, v):
        groups = []
        for h in range(4):
            count = bigbird_counts(blocks, drawn[h]).repeat_interleave(size, 0)
            count = count.repeat_interleave(size, 1)

            def one(q, k, v, count=count):
                return weighted_softmax(q @ k.T * q.shape[1] ** -0.5, count, v)

            own = slice(h // 2, h // 2 + 1)
            groups.append(per_head(one, q[:, h : h + 1], k[:, own], v[:, own]))
        return torch.cat(groups, 1)

    assert_same_with_gradients(
        lambda q, k, v: published_bigbird_attention(q, k, v, block=size, random_blocks=drawn),
        slow,
        (q, k, v),
    )


@pytest.mark.parametrize("n", [1, 4, 23, 61])
def test_bigbird_counts_each_pair_once(n):
    torch.manual_seed(0)
    layer = BigBirdAttention(16, 4, kv_heads=2, block=4, random=2, seed=3).double()
    seen = torch.from_numpy(ls.bigbird(4, 2, seed=3).mask(n, heads=4))

    def slow(x):
        q, k, v = layer.project(x, torch.arange(n))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        out = [
            weighted_softmax(q[:, h] @ k[:, h].mT * 0.5, seen[h].expand(2, -1, -1), v[:, h])
            for h in range(4)
        ]
        return layer.join(torch.stack(out, 1))

    x = torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(layer, slow, [x])
    layer.train()
    trained = layer(x)
    assert torch.equal(trained, layer.eval()(x))


def test_bigbird_padding_is_absent():
    torch.manual_seed(0)
    layer = BigBirdAttention(16, 4, kv_heads=2, block=3, random=1, rope=1e4).double()
    for n in (2, 20, 31):
        assert_padding_is_absent(layer, torch.randn(2, n, 16, dtype=torch.float64), 5, 9)


def hf_bigbird(monkeypatch, training):
    """The layer, a way to call it, and the random blocks of its last call."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.big_bird.modeling_big_bird import (
        BigBirdBlockSparseAttention,
        BigBirdModel,
    )

    torch.manual_seed(0)
    config = transformers.BigBirdConfig(
        hidden_size=32, num_attention_heads=4, block_size=4, num_random_blocks=2, use_bias=True
    )
    layer = BigBirdBlockSparseAttention(config, seed=1).double().train(training)
    caught = []
    inner = BigBirdBlockSparseAttention._create_rand_mask_from_inputs

    def catch(from_blocked, to_blocked, rand_attn, *rest):
        caught.append(rand_attn[0].tolist())
        return inner(from_blocked, to_blocked, rand_attn, *rest)

    monkeypatch.setattr(
        BigBirdBlockSparseAttention, "_create_rand_mask_from_inputs", staticmethod(catch)
    )

    def call(x, mask):
        blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(
            mask.to(x.dtype), 4
        )
        return layer(x, band, rows, keys, blocked, blocked)[0]

    return layer, call, caught


@pytest.mark.parametrize("training", [False, True])
def test_reproduces_the_bigbird_layer_of_transformers(monkeypatch, training):
    theirs, call, caught = hf_bigbird(monkeypatch, training)
    ours = BigBirdAttention.from_hf(theirs, published=True)
    x = torch.randn(2, 48, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 48, dtype=torch.bool)
    mask[1, 37:] = False
    call(x, mask)
    drawn = caught[-1] if training else None
    assert_same_with_gradients(
        lambda x: ours(x, mask, random_blocks=drawn), lambda x: call(x, mask), [x], 1e-12
    )
    corrected = BigBirdAttention.from_hf(theirs)(x, mask)
    assert (corrected - call(x, mask)).abs().max() > 1e-3


def test_refusals_say_what_to_do():
    with pytest.raises(Refusal, match="LongformerAttention has no causal form: global tokens see"):
        LongformerAttention(16, 4, causal=True)
    with pytest.raises(Refusal, match="BigBirdAttention has no causal form: every row sees"):
        BigBirdAttention(16, 4, causal=True)
    with pytest.raises(InputError, match="places from 0"):
        LongformerAttention(16, 4, global_tokens=(-1,))
    with pytest.raises(InputError, match="padding mask of shape"):
        LongformerAttention(16, 4)(torch.randn(1, 5, 16), global_mask=torch.ones(1, 4))
    x = torch.randn(1, 21, 16)
    with pytest.raises(InputError, match="needs at least 20 rows and a multiple of 4, got 21"):
        BigBirdAttention(16, 4, block=4, published=True)(x)
    with pytest.raises(InputError, match="need published=True"):
        BigBirdAttention(16, 4, block=4)(x, random_blocks=[])
    with pytest.raises(InputError, match=r"random_blocks must be \[4, 3, random\]"):
        BigBirdAttention(16, 4, block=4, published=True)(x[:, :20], random_blocks=[[]])
