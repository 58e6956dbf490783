"""Patterns against independent implementations: transformers, LongNet's authors, local-attention.

Differences found, all on the other side. BigBird in evaluation draws no random blocks: it counts
its first block r more times in every row but those of the first and the last block. Longformer
computes its softmax in float32 whatever the inputs. torchscale stops the gradient of the shares
that mix LongNet's branches. A window of w of local-attention is a distance, w + 1 keys; without
``exact_windowsize`` it is the own block and the one before it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import longspan as ls

transformers = pytest.importorskip("transformers")

N, HEADS, WIDTH, BLOCK = 48, 2, 16, 4


def by_heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def ours(layer, hidden, pattern):
    """Attention with the layer's own projections, under one of our patterns."""
    q, k, v = (by_heads(p(hidden)) for p in (layer.query, layer.key, layer.value))
    return ls.attend(q, k, v, pattern).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tokens", [(), (0,), (3, 17, 40)])
def test_longformer(tokens):
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = transformers.LongformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_window=[8],
        attention_probs_dropout_prob=0.0,
        num_hidden_layers=1,
    )
    torch.manual_seed(0)
    layer = LongformerSelfAttention(config, 0).double().eval()
    # A pattern has one set of projections; the layer's second set is made equal to it.
    for name in ("query", "key", "value"):
        getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    hidden = torch.randn(2, N, WIDTH, dtype=torch.float64)
    is_global = torch.zeros(2, N, dtype=torch.bool)
    is_global[:, list(tokens)] = True
    theirs = layer(
        hidden.clone(),
        attention_mask=10000.0 * is_global.double(),
        is_index_masked=torch.zeros_like(is_global),
        is_index_global_attn=is_global,
        is_global_attn=bool(tokens),
    )[0]
    found = ours(layer, hidden, ls.longformer(8, tokens))
    torch.testing.assert_close(found, theirs, rtol=0, atol=2e-7)


def bigbird_layer(random):
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = transformers.BigBirdConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        block_size=BLOCK,
        num_random_blocks=random,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return BigBirdBlockSparseAttention(config, seed=3).double()


def run_bigbird(layer, hidden):
    from transformers.models.big_bird.modeling_big_bird import BigBirdModel

    mask = torch.ones(len(hidden), N, dtype=hidden.dtype)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(mask, BLOCK)
    return layer(hidden, band, rows, columns, blocked, blocked)[0]


def test_bigbird_in_evaluation_counts_its_first_block_again():
    layer = bigbird_layer(2).eval()
    hidden = torch.randn(1, N, WIDTH, dtype=torch.float64)
    blocks = N // BLOCK
    middle = ls.Blocks(((), *[(0,)] * (blocks - 2)), BLOCK)
    known = ls.bigbird(BLOCK, 0)
    theirs = run_bigbird(layer, hidden)
    found = ours(layer, hidden, ls.Mixture(known, middle, middle))
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)
    assert (ours(layer, hidden, known) - theirs).abs().max() > 1e-3


def test_bigbird_in_training_with_its_own_draw(monkeypatch):
    layer = bigbird_layer(2).train()
    hidden = torch.randn(1, N, WIDTH, dtype=torch.float64)
    drawn = []
    make = layer._create_rand_mask_from_inputs
    monkeypatch.setattr(
        layer,
        "_create_rand_mask_from_inputs",
        lambda *args: drawn.append(args[2]) or make(*args),
    )
    state = np.random.get_state()  # noqa: NPY002 (the layer seeds the global generator)
    try:
        theirs = run_bigbird(layer, hidden)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    turns = drawn[0][0].transpose(1, 2).tolist()
    # One map for each random block: where two draws agree, the layer counts the block twice.
    maps = [
        ls.PerHead(*(ls.Blocks(((), *((b,) for b in head[t])), BLOCK) for head in turns))
        for t in range(2)
    ]
    found = ours(layer, hidden, ls.Mixture(ls.bigbird(BLOCK, 0), *maps))
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)


def dilated_branches(q, k, v, segments, dilations, *, weights_have_gradient):
    """LongNet as its authors compute it: a softmax per branch, mixed by the denominators."""
    heads, n = q.shape[1:3]
    outs, lses = [], []
    for w, r in zip(segments, dilations, strict=True):
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -1e8)
        for h in range(heads):
            for start in range(0, n, w):
                rows = torch.arange(start + h % r, min(start + w, n), r)
                if len(rows) == 0:
                    continue
                logits = q[:, h, rows] @ k[:, h, rows].mT / q.shape[-1] ** 0.5
                future = torch.ones(len(rows), len(rows)).triu(1).bool()
                logits = logits.masked_fill(future, -torch.inf)
                out = out.index_put(
                    (torch.tensor(0), torch.tensor(h), rows),
                    (logits.softmax(-1) @ v[:, h, rows])[0],
                )
                lse = lse.index_put(
                    (torch.tensor(0), torch.tensor(h), rows), logits.logsumexp(-1)[0]
                )
        outs.append(out)
        lses.append(lse)
    share = torch.stack(lses).softmax(0)
    share = share if weights_have_gradient else share.detach()
    return (share[..., None] * torch.stack(outs)).sum(0)


def test_longnet_mixed_by_denominators_and_the_gradient_that_torchscale_stops():
    segments, dilations = (8, 32), (1, 4)
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 4, 64, 8, generator=make, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    toward = torch.randn(q.shape, generator=make, dtype=q.dtype)

    def run(out):
        return out, torch.autograd.grad((out * toward).sum(), (q, k, v))

    ours, grads = run(ls.attend(q, k, v, ls.LongNet(segments, dilations)))
    whole = {"weights_have_gradient": True}
    theirs, wanted = run(dilated_branches(q, k, v, segments, dilations, **whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # torchscale computes the shares without gradient: the outputs agree, and those of v, only.
    whole["weights_have_gradient"] = False
    theirs, stopped = run(dilated_branches(q, k, v, segments, dilations, **whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    off = [float((a - b).norm() / b.norm()) for a, b in zip(stopped, wanted, strict=True)]
    assert off[0] > 0.05
    assert off[1] > 0.05
    assert off[2] < 1e-12


def test_local_attention():
    theirs = pytest.importorskip("local_attention").LocalAttention
    q, k, v = (torch.randn(1, 2, 24, 8) for _ in range(3))
    for causal, exact, pattern in [
        (True, True, ls.Window(5)),
        (False, True, ls.Window(9, causal=False)),
        (True, False, ls.BandBlocks(4, back=1, ahead=0) & ls.Causal()),
        (False, False, ls.BandBlocks(4)),
    ]:
        layer = theirs(
            window_size=4,
            causal=causal,
            exact_windowsize=exact,
            look_backward=1,
            look_forward=0 if causal else 1,
            use_rotary_pos_emb=False,
        )
        torch.testing.assert_close(ls.attend(q, k, v, pattern), layer(q, k, v), msg=str(pattern))
