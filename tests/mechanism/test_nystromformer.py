"""Nystromformer against its formula and against the layer of transformers."""

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
from longspan.mechanism import Nystromformer, nystrom_attention


def oracle(m, iterations=6, start=None):
    def one(q, k, v):
        n, d = q.shape
        q, k = q * d**-0.25, k * d**-0.25
        place = [i * m // n for i in range(n)]
        parts = [[i for i in range(n) if place[i] == s] for s in range(m)]
        ql, kl = (torch.stack([x[part].mean(0) for part in parts]) for x in (q, k))
        f, a, g = (s.softmax(-1) for s in (q @ kl.T, ql @ kl.T, ql @ k.T))
        z = a.T / (a.sum(0).max() * a.sum(1).max() if start is None else start)
        one = torch.eye(m, dtype=q.dtype)
        for _ in range(iterations):
            x = a @ z
            z = z @ (13 * one - x @ (15 * one - x @ (7 * one - x))) / 4
        return f @ (z @ (g @ v))

    return one


@pytest.mark.parametrize("n", [24, 29, 8])
def test_equals_the_formula_with_gradients(n):
    assert_same_with_gradients(
        lambda q, k, v: nystrom_attention(q, k, v, 8),
        lambda q, k, v: per_head(oracle(8), q, k, v),
        qkv(n=n, value_dim=5),
    )


def test_as_many_landmarks_as_rows_tend_to_softmax_attention():
    q, k, v = qkv(n=16, kv_heads=4)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error = [
        (nystrom_attention(q, k, v, 16, iterations=i) - wanted).abs().max() for i in (6, 12, 24)
    ]
    assert error[0] > error[1] > error[2]
    assert error[2] < 1e-10


def test_fewer_rows_than_landmarks():
    q, k, v = qkv(n=5, kv_heads=4)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    found = nystrom_attention(q, k, v, 8, iterations=30)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("landmarks", [4, None])
def test_padding_is_absent(landmarks):
    torch.manual_seed(0)
    layer = Nystromformer(16, 4, kv_heads=2, landmarks=landmarks, conv_kernel=5).double()
    assert_padding_is_absent(layer, torch.randn(2, 21, 16, dtype=torch.float64), 6, 9)
    assert_padding_is_absent(layer, torch.randn(2, 3, 16, dtype=torch.float64), 2, 1)


def test_padding_between_tokens_is_absent():
    torch.manual_seed(0)
    layer = Nystromformer(16, 4, kv_heads=2, landmarks=4, conv_kernel=5).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 21) < 0.6
    found = layer(x, mask)
    alone = [layer(row[real][None])[0] for row, real in zip(x, mask, strict=True)]
    torch.testing.assert_close(found[mask], torch.cat(alone))
    assert not found[~mask].any()
    toward = torch.randn_like(found)[mask]
    a, b = (torch.autograd.grad((t * toward).sum(), x)[0] for t in (found[mask], torch.cat(alone)))
    torch.testing.assert_close(a, b)


def test_a_row_does_not_depend_on_its_batch_unless_published():
    q, k, v = (x.detach() * 3 for x in qkv(n=24))
    for shared, same in ((False, True), (True, False)):
        both = nystrom_attention(q, k, v, 8, shared_start=shared)
        alone = torch.cat(
            [
                nystrom_attention(*(x[b : b + 1] for x in (q, k, v)), 8, shared_start=shared)
                for b in (0, 1)
            ]
        )
        assert torch.allclose(both, alone, atol=1e-12) is same


def hf_layer(monkeypatch=None, **changes):
    transformers = pytest.importorskip("transformers")
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    torch.manual_seed(0)
    config = transformers.NystromformerConfig(
        hidden_size=32,
        num_attention_heads=4,
        attention_probs_dropout_prob=0.0,
        **{"num_landmarks": 8, "segment_means_seq_len": 64, "conv_kernel_size": 5} | changes,
    )
    return NystromformerSelfAttention(config).double().eval()


@pytest.mark.parametrize("seq_len", [64, 8])
def test_loads_the_layer_of_transformers(seq_len):
    theirs = hf_layer(segment_means_seq_len=seq_len)
    # Its identity matrix is float32 whatever the input: harmless, whole numbers.
    ours = Nystromformer.from_hf(theirs)
    x = torch.randn(3, 64, 32, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(ours, lambda x: theirs(x)[0], [x], tolerance=1e-10)


def test_means_of_landmarks_stay_in_the_range_of_float16():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4000, 8) for _ in range(3))
    k += 40
    found = nystrom_attention(*(x.half() for x in (q, k, v)), 2).float()
    expected = nystrom_attention(q, k, v, 2)
    assert (found - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 10), (torch.float16, 4)])
def test_autocast_leaves_the_iteration_in_float32(dtype, scale):
    """In bfloat16 its gradient was off by 8 %, in float16 it was NaN."""
    torch.manual_seed(0)
    q, k, v = (scale * torch.randn(1, 2, 120, 8) for _ in range(3))
    q.requires_grad_()

    with torch.autocast("cpu", dtype):
        cast = nystrom_attention(q, k, v, 16)
    found, expected = (
        torch.autograd.grad(out.float().square().sum(), q)[0]
        for out in (cast, nystrom_attention(q, k, v, 16))
    )
    assert (found - expected).norm() / expected.norm() < 2e-2


def test_refuses_what_it_cannot_do():
    with pytest.raises(Refusal, match="no causal form: landmarks mix"):
        Nystromformer(8, 2, causal=True)
    with pytest.raises(InputError, match="must be odd"):
        Nystromformer(8, 2, conv_kernel=4)
