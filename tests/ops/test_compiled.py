"""``attend`` inside ``torch.compile`` and under autocast."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import longspan as ls
from longspan.errors import InputError

TEXT = "window(4) | sink(1)"


def qkv(n, dtype=torch.float32):
    make = torch.Generator().manual_seed(n)
    shapes = [(1, 4, n, 8), (1, 2, n, 8), (1, 2, n, 6)]
    return [torch.randn(s, generator=make, dtype=dtype, requires_grad=True) for s in shapes]


def grads(out, leaves):
    return torch.autograd.grad(out.square().sum(), leaves)


@pytest.fixture
def counted():
    """Counters of the compiler, from zero."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


@pytest.mark.parametrize("pattern", [TEXT, ls.parse(TEXT)], ids=["text", "value"])
def test_compiles_into_one_graph_of_any_length(pattern, counted):
    def step(q, k, v):
        return ls.attend(2 * q, k, v, pattern) + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for n in (7, 12, 13, 29):
        leaves = qkv(n)
        found, wanted = compiled(*leaves), step(*leaves)
        torch.testing.assert_close(found, wanted)
        for a, b in zip(grads(found, leaves), grads(wanted, leaves), strict=True):
            torch.testing.assert_close(a, b)
    # One for the first length, one for all others.
    assert counted["stats"]["unique_graphs"] <= 2


def test_rows_and_lse_compile_too(counted):
    def step(q, k, v):
        rows = {"segments": [0] * 5 + [1] * 4 + [-1] * 2, "scale": 0.3}
        return ls.attend(q, k, v, TEXT, return_lse=True, **rows)

    leaves = qkv(11)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves)
    for a, b in zip(found, step(*leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("default:The .grad attribute of a Tensor:UserWarning")
def test_a_plan_breaks_the_graph_and_nothing_inside_is_traced(counted):
    plan = ls.plan(ls.parse(TEXT), n=11, heads=4)

    def step(q, k, v):
        return ls.attend(2 * q, k, v, plan) + 1

    leaves = qkv(11)
    compiled = torch.compile(step, backend="aot_eager")
    found, wanted = compiled(*leaves), step(*leaves)
    for a, b in zip(grads(found, leaves), grads(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b)
    assert counted["stats"]["unique_graphs"] == 2, "before and after"


def test_errors_reach_the_caller_of_a_compiled_function(counted):
    q, k, v = qkv(9)
    compiled = torch.compile(lambda q: ls.attend(q, k[:, :, :0], v, TEXT), backend="aot_eager")
    with pytest.raises(Exception, match="v the heads and rows of k"):
        compiled(q)


def test_autocast_casts_as_torch_does():
    q, k, v = (x[..., :6] for x in qkv(9))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = scaled_dot_product_attention(q, k, v, is_causal=True)
        ours, lse = ls.attend(q, k, v, "causal()", return_lse=True)
        # A rotation in float32 leaves queries wider than values.
        mixed = ls.attend(q, k.bfloat16(), v.bfloat16(), "causal()")
        double = ls.attend(q.double(), k.double(), v.double(), "causal()")
    assert (ours.dtype, lse.dtype, theirs.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert mixed.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mixed, ours, rtol=0, atol=0)
    assert ls.attend(q, k, v, "causal()").dtype == torch.float32


def test_autocast_gradients_and_compiled_agree(counted):
    leaves = qkv(9)

    def step(*leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ls.attend(*leaves, TEXT)

    found, wanted = torch.compile(step, backend="aot_eager")(*leaves), step(*leaves)
    assert found.dtype == wanted.dtype == torch.bfloat16
    exact = grads(ls.attend(*leaves, TEXT), leaves)
    for a, b, c in zip(grads(found, leaves), grads(wanted, leaves), exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(a, c, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("pattern", ["longnet([16, 64], [1, 4])", "ssa(16, 4)"])
def test_gradients_through_several_passes_and_orders(pattern, counted):
    leaves = qkv(96)
    compiled = torch.compile(ls.attend, backend="aot_eager", fullgraph=True)
    found = grads(compiled(*leaves, pattern), leaves)
    for a, b in zip(found, grads(ls.attend(*leaves, pattern), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiler_drops_no_gradient_of_the_scale():
    q, k, v = qkv(9)
    scale = torch.tensor(0.3, requires_grad=True)
    call = torch.compile(lambda q, scale: ls.attend(q, k, v, TEXT, scale=scale), backend="eager")
    with pytest.raises(InputError, match="scale gets no gradient"):
        call(q, scale)
