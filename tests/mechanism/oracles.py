"""Slow and obvious forms in float64, one head at a time, and checks that every mechanism shares.

Axes: n rows, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_softmax(logit: Tensor, count: Tensor, v: Tensor) -> Tensor:
    """o_i = sum_j count_ij exp(logit_ij) v_j / sum_j count_ij exp(logit_ij); 0 without keys."""
    a = logit + count.to(logit.dtype).log()
    dead = a.isneginf().all(-1, keepdim=True)
    return torch.where(dead, 0.0, a.masked_fill(dead, 0.0).softmax(-1) @ v)


def per_head(one, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Apply ``one(q, k, v)`` on [n, d] to every query head, with the key head it reads."""
    groups = q.shape[1] // k.shape[1]
    return torch.stack(
        [
            torch.stack(
                [one(q[b, h], k[b, h // groups], v[b, h // groups]) for h in range(q.shape[1])]
            )
            for b in range(q.shape[0])
        ]
    )


def qkv(batch=2, heads=4, kv_heads=2, n=37, dim=8, seed=0, scale=1.0, value_dim=None):
    """Random float64 q, k, v that require gradients."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)]
    return [
        (torch.randn(batch, h, n, d, generator=g, dtype=torch.float64) * scale).requires_grad_()
        for h, d in shapes
    ]


def assert_same_with_gradients(fast, slow, inputs, tolerance=1e-10):
    """Outputs and all gradients of two functions agree."""
    found, wanted = fast(*inputs), slow(*inputs)
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(wanted)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def assert_no_leak(layer, x: Tensor, cuts, tolerance=0.0) -> None:
    """Resampling tokens from ``t`` on leaves every output before ``t`` bit-identical.

    With a tolerance, for mechanisms that sort their rows, outputs may differ in rounding, but no
    gradient may pass.
    """
    base = layer(x)
    for t in cuts:
        other = x.clone()
        other[:, t:] = 3 * torch.randn(
            other[:, t:].shape, generator=torch.Generator().manual_seed(t)
        )
        changed = layer(other)
        if tolerance:
            torch.testing.assert_close(changed[:, :t], base[:, :t], atol=tolerance, rtol=tolerance)
            given = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(layer(given)[:, :t].sum(), given)
            assert torch.equal(grad[:, t:], torch.zeros_like(grad[:, t:]))
        else:
            assert torch.equal(changed[:, :t], base[:, :t]), f"leak before {t}"
        assert not torch.equal(changed[:, t:], base[:, t:])


def assert_padding_is_absent(layer, x: Tensor, left: int, right: int, tolerance=1e-10) -> None:
    """Padding on either side, whatever it holds, changes no real row; padding itself gives 0."""
    alone = layer(x)
    wide = torch.full((x.shape[0] + 1, left + x.shape[1] + right, x.shape[2]), 7.0).to(x)
    wide[:-1, left : left + x.shape[1]] = x
    mask = torch.zeros(wide.shape[:2], dtype=torch.bool)
    mask[:-1, left : left + x.shape[1]] = True
    # The last batch row is padding throughout.
    out = layer(wide, mask)
    torch.testing.assert_close(
        out[:-1, left : left + x.shape[1]], alone, atol=tolerance, rtol=tolerance
    )
    assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))


def assert_decoding_equals_prefill(layer, x: Tensor, mask, sizes, tolerance=1e-12):
    """Pieces of these sizes, then single tokens, give what one call gives; the last state."""
    wanted = layer(x, mask)
    parts, state, start = [], None, 0
    for size in (*sizes, *[1] * (x.shape[1] - sum(sizes))):
        rows = slice(start, start + size)
        own = None if mask is None else mask[:, rows]
        part, state = layer(x[:, rows], own, state=state, return_state=True)
        parts.append(part)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=tolerance, rtol=tolerance)
    return state
