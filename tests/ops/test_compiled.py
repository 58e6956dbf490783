"""``attend`` inside ``torch.compile`` and under autocast."""

from __future__ import annotations

import gc

import pytest
import torch
from tests.ops import test_hopper
from tests.ops.test_flex import gpu, relative
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

import longspan as ls
from longspan.errors import InputError
from longspan.ops.kernels import native

TEXT = "window(4) | sink(1)"


def qkv(n, dtype=torch.float32):
    make = torch.Generator().manual_seed(n)
    shapes = [(1, 4, n, 8), (1, 2, n, 8), (1, 2, n, 6)]
    q, k, v = (torch.randn(s, generator=make, dtype=dtype, requires_grad=True) for s in shapes)
    return q, k, v


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


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
def test_autocast_rounds_inputs_alone(impl):
    q, k, v = (x.detach() for x in qkv(33))
    low = (x.bfloat16() for x in (q, k, v))
    wanted = ls.attend(*low, TEXT, impl=impl, return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ls.attend(q, k, v, TEXT, impl=impl, return_lse=True)
        # Here ``auto`` is the reference.
        several = torch.vmap(lambda q: ls.attend(q, k, v, TEXT, return_lse=True)[1])(q[None])
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert several.dtype == torch.float32


def test_autocast_gradients_and_compiled_agree(counted):
    leaves = qkv(9)

    def step(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ls.attend(q, k, v, TEXT)

    q, k, v = leaves
    found, wanted = torch.compile(step, backend="aot_eager")(q, k, v), step(q, k, v)
    assert found.dtype == wanted.dtype == torch.bfloat16
    exact = grads(ls.attend(*leaves, TEXT), leaves)
    for a, b, c in zip(grads(found, leaves), grads(wanted, leaves), exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(a, c, rtol=5e-2, atol=5e-2)


# Of 256 rows those of dilated windows are views by remainder, beside a pass of rows as they are
# where some heads have none.
PATTERNS = [
    "longnet([16, 64], [1, 4])",
    "ssa(16, 4)",
    "dilated(32, 4)",
    "dilated(64, [1, 1, 4, 4])",
    "chunk(16) - sink(1)",
]


# Double precision is for kernels that compute their forward again.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_through_several_passes_and_orders(pattern, dtype, counted):
    def step(q, k, v):
        out, lse = ls.attend(q, k, v, pattern, return_lse=True)
        # Rows that see no key have a log-sum-exp of -inf.
        return out + lse.clamp(min=-9.0)[..., None]

    leaves = qkv(256, dtype)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = grads(compiled(*leaves), leaves)
    for a, b in zip(found, grads(step(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", [TEXT, *PATTERNS])
def test_the_backward_computes_no_forward_again(pattern, counted, monkeypatch):
    if not native.level():
        pytest.skip("native was not compiled for this machine")
    calls, run = [], native._Call.run
    monkeypatch.setattr(
        native._Call, "run", lambda self, what: (calls.append(what), run(self, what))
    )
    leaves = qkv(256)
    compiled = torch.compile(ls.attend, backend="aot_eager", fullgraph=True)
    out = compiled(*leaves, pattern, impl="native")
    forward = len(calls)
    grads(out, leaves)
    assert calls == ["forward"] * forward + ["backward"] * forward
    assert forward > 0


@pytest.mark.parametrize("impl", ["auto", "tiled"])
def test_the_backward_leaves_what_it_is_handed_as_it_is(impl):
    q, k, v = (x.detach() for x in qkv(9))
    how = (TEXT, None, None, None, None, 0.3, impl, 0)
    out, lse = torch.ops.longspan.attention(q, k, v, *how)
    torch.ops.longspan.attention_backward(out, lse, out, lse, q, k, v, *how)
    assert not out.requires_grad
    assert not lse.requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_derivatives_are_not_dropped(backend):
    q, k, v = (x.detach() for x in qkv(33))
    along = torch.linspace(-1, 1, q.numel()).view_as(q)

    def step(q):
        return torch.func.jvp(lambda q: ls.attend(q, k, v, TEXT), (q,), (along,))

    wanted = step(q)
    for a, b in zip(torch.compile(step, backend=backend)(q), wanted, strict=True):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(lambda q: ls.attend(q, k, v, TEXT), backend=backend)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(q, along)))
    torch.testing.assert_close(found.tangent, wanted[1])


def test_a_compiler_drops_no_gradient_of_the_scale():
    q, k, v = qkv(9)
    scale = torch.tensor(0.3, requires_grad=True)
    call = torch.compile(lambda q, scale: ls.attend(q, k, v, TEXT, scale=scale), backend="eager")
    with pytest.raises(InputError, match="scale gets no gradient"):
        call(q, scale)


GPU_PATTERNS = [
    "window(128) | sink(4)",
    "longnet([256, 1024], [1, 4])",
    "ssa(128, 8)",
    "dilated(128, 8)",
    "dilated(128, [1, 2, 4, 8])",
    "window(128) | global(0, 500, 1000)",
]


@gpu
# With "reduce-overhead" both passes are recorded as graphs of the GPU and played again.
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("pattern", GPU_PATTERNS)
def test_compiled_training_on_a_gpu(pattern, mode, counted):
    def step(q, k, v):
        return 2 * ls.attend(q * 1.5, k, v, pattern) - 1

    compiled = torch.compile(step, mode=mode, fullgraph=True)
    for seed in range(4):
        make = torch.Generator("cuda").manual_seed(seed)
        leaves = [
            torch.randn(
                1, heads, 2048, 64, generator=make, device="cuda", dtype=torch.bfloat16
            ).requires_grad_()
            for heads in (8, 2, 2)
        ]
        found = [x.clone() for x in grads(compiled(*leaves).float(), leaves)]
        for a, b in zip(found, grads(step(*leaves).float(), leaves), strict=True):
            assert relative(a, b) < 1e-2


@gpu
def test_a_recorded_graph_keeps_its_plan():
    test_hopper.here()

    def made():
        q, k, v = (
            torch.randn(1, heads, 1024, 64, device="cuda", dtype=torch.bfloat16)
            for heads in (8, 2, 2)
        )
        return q, k, v

    how, (q, k, v) = {"pattern": "window(128) | sink(4)", "impl": "hopper"}, made()
    # Outside, where plans may be made, and on a stream of its own.
    with torch.cuda.stream(torch.cuda.Stream()):
        ls.attend(q, k, v, **how)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ls.attend(q, k, v, **how)
    # As many others as push it out of those that are kept, and what comes to lie in its place.
    for width in range(64, 128):
        ls.attend(q, k, v, f"window({width})", impl="hopper")
    gc.collect()
    spoilt = [
        torch.full((1 << size,), -1, device="cuda") for _ in range(200) for size in range(6, 16)
    ]
    for x, other in zip((q, k, v), made(), strict=True):
        x.copy_(other)
    graph.replay()
    torch.testing.assert_close(out, ls.attend(q, k, v, **how))
    del spoilt
