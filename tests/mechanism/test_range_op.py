"""Kernels over ranges that the data decides, inside ``torch.compile``."""

from __future__ import annotations

import pytest
import torch

from longspan.mechanism._range_op import over_ranges
from longspan.ops.kernels import native


def qkv(dtype=torch.float32):
    make = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 21, 8), (2, 2, 21, 8), (2, 2, 21, 6)]
    q, k, v = (torch.randn(s, generator=make, dtype=dtype, requires_grad=True) for s in shapes)
    return q, k, v


def window(impl):
    """Five keys back, and none for the fourth query."""
    row = torch.arange(21)
    lo, hi = (row - 5).clamp(min=0), (row + 1).index_fill(0, torch.tensor([3]), 0)

    def step(q, k, v):
        begin, end = (x[None, None, :, None].expand(2, 4, -1, 1) for x in (lo, hi))
        out, lse = over_ranges(q, k, v, begin, end, 0.3, impl)
        return out + lse.clamp(min=-9.0)[..., None]

    return step


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_gradients_are_those_of_eager_code(impl, dtype):
    leaves, step = qkv(dtype), window(impl)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found, wanted = (
        torch.autograd.grad(run(*leaves).square().sum(), leaves) for run in (compiled, step)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_derivatives_are_not_dropped():
    q, k, v = (x.detach() for x in qkv())
    along = torch.linspace(-1, 1, q.numel()).view_as(q)
    run = window("auto")

    def step(q):
        return torch.func.jvp(lambda q: run(q, k, v), (q,), (along,))

    wanted = step(q)
    for a, b in zip(torch.compile(step, backend="aot_eager")(q), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_backward_leaves_what_it_is_handed_as_it_is():
    q, k, v = (x.detach() for x in qkv())
    hi = torch.arange(1, 22, dtype=torch.int32)[None, None, :, None]
    how = (torch.zeros_like(hi), hi, 0.3, "auto")
    out, lse = torch.ops.longspan.attention_over_ranges(q, k, v, *how)
    torch.ops.longspan.attention_over_ranges_backward(out, lse, out, lse, q, k, v, *how)
    assert not out.requires_grad
    assert not lse.requires_grad


@pytest.mark.skipif(not native.level(), reason="native was not compiled for this machine")
def test_a_compiled_backward_computes_no_forward_again(monkeypatch):
    calls, run = [], native._Call.run
    monkeypatch.setattr(
        native._Call, "run", lambda self, what: (calls.append(what), run(self, what))
    )
    leaves = qkv()
    compiled = torch.compile(window("native"), backend="aot_eager", fullgraph=True)
    torch.autograd.grad(compiled(*leaves).sum(), leaves)
    assert calls == ["forward", "backward"]
