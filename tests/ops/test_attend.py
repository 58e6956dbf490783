"""``attend`` against dense masked attention, for patterns, layouts, decoding, leaks and errors."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import longspan as ls
from longspan.errors import InputError, PatternError, PlanError, Refusal

PATTERNS = [
    "causal()",
    "dense()",
    "window(7) | sink(2)",
    "window(6, causal=false)",
    "shifted_chunk(8)",
    "scca.fixed(6)",
    "scca.flow(5)",
    "scca.flow(5, wrap=none)",
    "document(9, 11) & causal()",
    "causal() | prefix(4)",
    "heads(window(3), scca.flow(4)) - sink(1)",
]
IMPLS = ["tiled", "reference"]


def qkv(batch=2, heads=4, kv_heads=2, n=29, m=None, dim=8, value_dim=None, seed=0):
    make = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    value_dim = dim if value_dim is None else value_dim
    shapes = [(heads, n, dim), (kv_heads, m, dim), (kv_heads, m, value_dim)]
    return [
        torch.randn(batch, *shape, generator=make, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


def oracle(q, k, v, mask):
    """Dense masked attention with an explicit mask [heads, n, m] or [batch, heads, n, m]."""
    mask = torch.as_tensor(np.ascontiguousarray(mask)).expand(len(q), -1, -1, -1)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -1e300)
    empty = ~mask.any(-1)
    out = (logits.softmax(-1) @ v).masked_fill(empty[..., None], 0.0)
    return out, logits.logsumexp(-1).masked_fill(empty, -torch.inf)


def assert_same(ours, theirs, inputs):
    """Outputs, lse and the three gradients, with gradient flowing through both results."""
    (out, lse), (expected, expected_lse) = ours, theirs
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(lse, expected_lse, **close)
    make = torch.Generator().manual_seed(1)
    d_out = torch.randn(out.shape, generator=make, dtype=out.dtype)
    d_lse = torch.randn(lse.shape, generator=make, dtype=lse.dtype)
    d_lse = d_lse.masked_fill(torch.isneginf(lse), 0.0)
    grads = [
        torch.autograd.grad(pair, inputs, (d_out, d_lse), retain_graph=True)
        for pair in ((out, lse), (expected, expected_lse))
    ]
    for ours_grad, expected_grad in zip(*grads, strict=True):
        torch.testing.assert_close(ours_grad, expected_grad, **close)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("text", PATTERNS)
def test_equals_dense_masked_attention(text, impl):
    pattern = ls.parse(text)
    inputs = qkv(value_dim=5)
    ours = ls.attend(*inputs, pattern, return_lse=True, impl=impl)
    assert_same(ours, oracle(*inputs, pattern.mask(29, 4)), inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_grouped_queries(kv_heads, impl):
    inputs = qkv(heads=8, kv_heads=kv_heads, n=17)
    pattern = ls.SCCA.flow(4)
    ours = ls.attend(*inputs, pattern, return_lse=True, impl=impl)
    assert_same(ours, oracle(*inputs, pattern.mask(17, 8)), inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("text", PATTERNS)
def test_padding_and_packing_equal_separate_runs(text, impl):
    pattern = ls.parse(text)
    q, k, v = qkv(batch=3)
    segments = torch.zeros(3, 29, dtype=torch.long)
    segments[0, :6] = -1
    segments[1, 20:] = -1
    segments[2, 12:] = 1
    out, lse = ls.attend(q, k, v, pattern, segments=segments, return_lse=True, impl=impl)
    for b in range(3):
        for segment in segments[b].unique().tolist():
            rows = torch.nonzero(segments[b] == segment)[:, 0]
            if segment < 0:
                assert (out[b, :, rows] == 0).all()
                assert torch.isneginf(lse[b, :, rows]).all()
                continue
            one = [t[b : b + 1, :, rows] for t in (q, k, v)]
            alone, alone_lse = ls.attend(*one, pattern, return_lse=True, impl="reference")
            torch.testing.assert_close(out[b : b + 1, :, rows], alone, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(lse[b : b + 1, :, rows], alone_lse, rtol=1e-10, atol=1e-10)
    # Padding must not turn gradients into NaN.
    grads = torch.autograd.grad((out**2).sum() + lse[~lse.isinf()].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, :, :6] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("text", [t for t in PATTERNS if ls.parse(t).is_causal])
def test_prefill_then_decode_equals_one_forward(text, impl):
    pattern = ls.parse(text)
    with torch.no_grad():
        q, k, v = qkv()
        whole = ls.attend(q, k, v, pattern, impl=impl)
        steps = [ls.attend(q[:, :, :20], k[:, :, :20], v[:, :, :20], pattern, impl=impl)]
        for n in range(21, 30):
            step = ls.attend(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], pattern, impl=impl)
            steps.append(step)
        torch.testing.assert_close(torch.cat(steps, 2), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("text", [t for t in PATTERNS if ls.parse(t).is_causal])
def test_the_future_cannot_move_the_past(text, impl):
    pattern = ls.parse(text)
    with torch.no_grad():
        q, k, v = qkv(n=33)
        before = ls.attend(q, k, v, pattern, impl=impl)
        for t in (1, 8, 16, 17, 32):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[:, :, t:] = torch.randn_like(x[:, :, t:]) * 9
            after = ls.attend(*changed, pattern, impl=impl)
            assert torch.equal(before[:, :, :t], after[:, :, :t]), f"tokens from {t} on leak"


def test_a_plan_and_a_text_give_what_the_pattern_gives():
    q, k, v = qkv()
    pattern = ls.Window(7) | ls.Sink(2)
    expected = ls.attend(q, k, v, pattern)
    assert torch.equal(ls.attend(q, k, v, "window(7) | sink(2)"), expected)
    assert torch.equal(ls.attend(q, k, v, ls.plan(pattern, 29, heads=4)), expected)


def test_layers_take_turns():
    q, k, v = qkv()
    pattern = ls.PerLayer(ls.Window(3), ls.Chunk(6))
    for layer, alone in enumerate([ls.Window(3), ls.Chunk(6), ls.Window(3)]):
        assert torch.equal(ls.attend(q, k, v, pattern, layer=layer), ls.attend(q, k, v, alone))


def test_merge_over_disjoint_keys_is_exact():
    inputs = qkv(n=13)
    whole = np.tri(13, dtype=bool)
    near = ls.Window(4).mask(13)[0]
    first = ls.Sink(2).mask(13)[0] & ~near
    masks = [near, first, whole & ~near & ~first]
    parts = [oracle(*inputs, np.broadcast_to(mask, (4, 13, 13))) for mask in masks]
    assert_same(ls.merge(parts), oracle(*inputs, ls.Causal().mask(13, 4)), inputs)


def test_merge_of_rows_that_see_nothing():
    out = torch.zeros(1, 1, 2, 3, requires_grad=True)
    lse = torch.tensor([[[-torch.inf, 1.0]]], requires_grad=True)
    merged, total = ls.merge([(out, lse), (out + 1, lse)])
    assert merged[0, 0].tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]
    assert total[0, 0].tolist() == pytest.approx([-float("inf"), 1 + np.log(2)])
    merged.sum().backward()
    assert out.grad is not None
    assert out.grad.isfinite().all()
    assert lse.grad is not None
    assert lse.grad.isfinite().all()
    with pytest.raises(InputError):
        ls.merge([])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[0], k, v), ["[B, H, N, D]", "[4, 29, 8]"]),
        (lambda q, k, v: (q, k[:1], v), ["batch"]),
        (lambda q, k, v: (q, k[..., :4], v), ["width of q"]),
        (lambda q, k, v: (q, k, v[:, :, :9]), ["heads and rows of k"]),
        (lambda q, k, v: (q[:, :3], k, v), ["divide"]),
        (lambda q, k, v: (q, k.float(), v), ["dtype", "float64", "float32"]),
        (lambda q, k, v: (q[:, :, :0], k, v), ["no empty axis"]),
        (lambda q, k, v: (q.long(), k.long(), v.long()), ["floating"]),
        (lambda q, k, v: (q, k.to("meta"), v), ["one device", "meta"]),
        (lambda q, k, v: (3, k, v), ["int"]),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), ["no empty axis"]),
        (lambda q, k, v: tuple(x.to("meta") for x in (q, k, v)), ["with data", "meta"]),
        (lambda q, k, v: (q, k.detach().to_sparse(), v), ["torch.sparse_coo"]),
        (lambda q, k, v: tuple(x.to(torch.float8_e4m3fn) for x in (q, k, v)), ["bfloat16"]),
    ],
)
def test_input_errors(change, words):
    with pytest.raises(InputError) as caught:
        ls.attend(*change(*qkv()), ls.Causal())
    for word in words:
        assert word in str(caught.value)


def test_fake_tensors_leave_nothing_for_later_calls():
    x = torch.randn(1, 2, 31, 8)
    with FakeTensorMode() as mode, pytest.raises(InputError, match="with data; got fake"):
        ls.attend(*[mode.from_tensor(x)] * 3, ls.Window(7))
    found = ls.attend(x, x, x, ls.Window(7))
    wanted = ls.attend(*[x.double()] * 3, ls.Window(7), impl="reference")
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)


def test_layout_errors():
    q, k, v = qkv()
    segments = torch.arange(3)[:, None].expand(3, 29)
    with pytest.raises(InputError, match="3 batch rows, q has 2"):
        ls.attend(q, k, v, ls.Causal(), segments=segments)
    with pytest.raises(InputError, match="already holds positions"):
        ls.attend(q, k, v, ls.plan(ls.Causal(), 29, heads=4), positions=torch.arange(29))
    with pytest.raises(InputError, match="28 queries"):
        ls.attend(q, k, v, ls.plan(ls.Causal(), 28, heads=4))
    with pytest.raises(PlanError, match="29 query rows but only 9 key rows"):
        ls.attend(q, k[:, :, :9], v[:, :, :9], ls.Causal())


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_rows_that_are_alike_still_have_a_batch_size(form):
    q, k, v = qkv()
    with pytest.raises(InputError, match="3 batch rows, q has 2"):
        ls.attend(q, k, v, ls.Causal(), segments=form([[0] * 29] * 3))


@pytest.mark.parametrize("rows", [[[0] * 29, [0]], torch.zeros(29, dtype=torch.bfloat16)])
def test_rows_that_are_no_whole_numbers(rows):
    for name in ("positions", "segments"):
        with pytest.raises(PlanError, match=name):
            ls.attend(*qkv(), ls.Causal(), **{name: rows})


@pytest.mark.parametrize(
    "rows", [torch.zeros(29, dtype=torch.int64, device="meta"), torch.zeros(29).long().to_sparse()]
)
def test_rows_that_cannot_be_read(rows):
    for name in ("positions", "segments"):
        with pytest.raises(PlanError, match=f"{name} must be a dense tensor with data"):
            ls.attend(*qkv(), ls.Causal(), **{name: rows})
        with pytest.raises(PlanError, match=name):
            ls.plan(ls.Causal(), 29, **{name: rows})


def test_vmap_goes_over_no_segments():
    q, k, v = (x.detach() for x in qkv())

    def one(q, row):
        return ls.attend(q, k, v, ls.Causal(), segments=row)

    with pytest.raises(PlanError, match=r"segments must be .* vmap goes over: .* all batch"):
        torch.vmap(one)(q[None], torch.zeros(1, 29, dtype=torch.int64))


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ("wide", "finite number, got 'wide'"),
        (float("nan"), "finite number, got nan"),
        (torch.ones(2), "finite number"),
        (torch.tensor(0.3, requires_grad=True), "multiply q by it"),
    ],
)
def test_scales_that_would_be_ignored_or_spread(scale, words):
    for call in (ls.attend, ls.explain):
        with pytest.raises(InputError, match=words):
            call(*qkv(), ls.Causal(), scale=scale)


def test_a_scale_may_be_a_tensor():
    inputs = qkv()
    ours = ls.attend(*inputs, ls.Causal(), scale=torch.tensor(0.25))
    assert torch.equal(ours, ls.attend(*inputs, ls.Causal(), scale=0.25))


def test_explain_takes_what_attend_takes():
    parameters = inspect.signature(ls.attend).parameters
    assert set(parameters) == set(inspect.signature(ls.explain).parameters)
    with pytest.raises(TypeError, match="segmnets"):
        ls.explain(*qkv(), ls.Window(7), segmnets=torch.zeros(29))


def test_a_named_kernel_never_falls_back():
    q, k, v = qkv()
    with pytest.raises(Refusal, match=r"runs on cuda, the tensors are on cpu.*tiled, reference"):
        ls.attend(q, k, v, ls.Causal(), impl="flex")
    for other in ("fast", [], None):
        with pytest.raises(Refusal, match=r'"auto" or one of .*tiled'):
            ls.attend(q, k, v, ls.Causal(), impl=other)


def test_explain_names_the_kernel_and_the_reasons():
    text = ls.explain(*qkv(), ls.Window(7))
    assert "kernel tiled" in text
    assert "not flex: runs on cuda" in text
    assert "plan of window(7)" in text


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("text", ["heads(window(8), strided(4))", "dilated(8, [1, 2, 2, 4])"])
def test_a_plan_first_used_in_inference_mode_trains(text, impl):
    # Some heads see nothing in a pass: which ones is kept with the plan, and saved for a backward.
    plan = ls.plan(ls.parse(text), 64, 4, orders="apart")
    inputs = qkv(n=64)
    with torch.inference_mode():
        ls.attend(*inputs, plan, impl=impl)
    ours = ls.attend(*inputs, plan, impl=impl, return_lse=True)
    assert_same(ours, oracle(*inputs, ls.parse(text).mask(64, 4)), inputs)


def test_a_plan_is_that_of_one_layer():
    q, k, v = qkv()
    pattern = ls.swin(8)
    odd = ls.plan(pattern, 29, 4, layer=1)
    for function in (ls.attend, ls.explain):
        with pytest.raises(InputError, match=r"one layer, got layer=1 .* plan\(...\)"):
            function(q, k, v, odd, layer=1)
    assert torch.equal(ls.attend(q, k, v, odd), ls.attend(q, k, v, pattern, layer=1))


# What torch.func.jvp itself imports.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("text", ["window(5) | sink(1)", "ssa(4, 3)", "longmixed(8, 2)"])
def test_torch_func(text):
    q, k, v = (x.detach() for x in qkv())
    seen = torch.from_numpy(ls.parse(text).mask(29, 4))

    def dense(q):
        logits = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
        return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)

    def ours(q):
        return ls.attend(q, k, v, text)

    several = torch.stack([q, 2 * q, -q])
    slope = torch.ones_like(q)
    for transform in (
        lambda f: torch.vmap(f)(several),
        lambda f: torch.func.grad(lambda q: f(q).square().sum())(q),
        lambda f: torch.func.jvp(f, (q,), (slope,))[1],
    ):
        torch.testing.assert_close(transform(ours), transform(dense))
    with forward_ad.dual_level():
        found, wanted = (f(forward_ad.make_dual(q, slope)) for f in (ours, dense))
        for x, y in zip(*map(forward_ad.unpack_dual, (found, wanted)), strict=True):
            torch.testing.assert_close(x, y)
        with pytest.raises(Refusal, match=r"'tiled' .* forward-mode .* can: reference"):
            ls.attend(forward_ad.make_dual(q, slope), k, v, text, impl="tiled")
    with pytest.raises(Refusal, match=r"'tiled' .* torch\.func does not go.* can: reference"):
        torch.vmap(lambda q: ls.attend(q, k, v, text, impl="tiled"))(several)


# What torch.func.jvp itself imports.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "text",
    [
        "mixture(window(3), sink(2))",
        "longnet([8, 16], [1, 2])",
        "heads(mixture(sda(8, 2), window(3)), window(2))",
    ],
)
def test_torch_func_of_keys_that_count_twice(text):
    q, k, v = (x.detach() for x in qkv())

    def ours(q):
        return ls.attend(q, k, v, text)

    several = torch.stack([q, 2 * q])
    found = torch.vmap(ours)(several)
    for x, y in zip(found, several, strict=True):
        torch.testing.assert_close(x, ls.attend(y, k, v, text, impl="reference"))
    own = q.clone().requires_grad_()
    out = ls.attend(own, k, v, text, impl="reference")
    (wanted,) = torch.autograd.grad(out.square().sum(), own)
    torch.testing.assert_close(torch.func.grad(lambda q: ours(q).square().sum())(q), wanted)
    slope = torch.randn_like(q)
    _, along = torch.func.jvp(lambda q: ours(q).square().sum(), (q,), (slope,))
    torch.testing.assert_close(along, (wanted * slope).sum())


def test_torch_func_does_not_go_through_gathered_rows():
    q, k, v = (x.detach() for x in qkv())
    laid = ls.plan("longnet([8, 16], [1, 2])", 29, 4)
    with pytest.raises(Refusal, match=r"longnet.* in another order.* torch\.func"):
        torch.func.grad(lambda q: ls.attend(q, k, v, laid).sum())(q)


@pytest.mark.parametrize("pattern", [["window(4)"], {}, np.ones((4, 4)), None, 7])
def test_no_pattern(pattern):
    q, k, v = qkv()
    for function in (ls.attend, ls.explain):
        with pytest.raises(PatternError, match=r"expected a pattern, its text form or a plan"):
            function(q, k, v, pattern)


@pytest.mark.parametrize("layer", [-1, "0", 1.0, None, [1], True])
def test_no_layer(layer):
    q, k, v = qkv()
    for call in (
        lambda: ls.attend(q, k, v, "window(4)", layer=layer),
        lambda: ls.plan("window(4)", 29, layer=layer),
    ):
        with pytest.raises(PatternError, match="layer must be"):
            call()


@pytest.mark.parametrize("scale", ["1", True, 1e39, -1e39, float("nan")])
def test_no_scale(scale):
    with pytest.raises(InputError, match="scale must be a finite number, got"):
        ls.attend(*qkv(), "window(4)", scale=scale)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors():
    q, _, v = qkv()
    nested = torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(4, 2)])
    with pytest.raises(InputError, match="k is a nested tensor; pack its sequences"):
        ls.attend(q, nested, v, "window(4)")
