"""What every layer of the package promises."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import longspan as ls
from longspan.errors import InputError
from longspan.mechanism.layer import MechanismLayer

LAYERS = {
    "AdaptiveSpan": {"max_span": 9, "ramp": 4, "start": 0.5},
    "BigBirdAttention": {"block": 4, "random": 1},
    "BlockGate": {"block": 6, "top": 2},
    "DualChunkAttention": {"chunk": 6, "local": 4},
    "HierarchicalAttention": {"chunk": 6},
    "LSHAttention": {"buckets": 4, "chunk": 8},
    "LinearAttention": {},
    "Linformer": {"max_length": 64, "rank": 5},
    "LongformerAttention": {"window": 6, "global_tokens": (0, 9)},
    "MoBA": {"block": 6, "top": 2},
    "NSA": {"block": 6, "stride": 3, "select_block": 5, "select": 4, "window": 4},
    "Nystromformer": {"landmarks": 4, "conv_kernel": 3},
    "Performer": {},
    "PooledChunkAttention": {"chunk": 6, "pool": "learned"},
    "RoutingAttention": {"clusters": 3, "window": 6},
    "Synthesizer": {"max_length": 64},
    "TopK": {"keep": 5},
}
# What the others share among the heads of a group is more than keys and values.
GROUPED = sorted(set(LAYERS) - {"BlockGate", "LSHAttention", "NSA"})
SELECT = ("BlockGate", "LSHAttention", "MoBA", "NSA", "RoutingAttention", "TopK")


def build(name, **changes):
    torch.manual_seed(0)
    return getattr(ls.mechanism, name)(16, 4, **LAYERS[name] | changes)


def test_the_public_surface_is_sorted_and_complete():
    names = list(ls.mechanism.__all__)
    assert names == sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert set(names) == set(dir(ls.mechanism)) == set(ls.mechanism._HOME)
    for name in names:
        assert getattr(ls.mechanism, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ls.mechanism.nothing


def test_the_documentation_lists_every_layer():
    page = (Path(__file__).parents[2] / "docs" / "mechanisms.md").read_text(encoding="utf-8")
    table = page.partition("## All of them")[2].partition("\n\nThose without")[0]
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    layers = {
        name: kind
        for name in ls.mechanism.__all__
        if isinstance(kind := getattr(ls.mechanism, name), type)
        and issubclass(kind, MechanismLayer)
    }
    assert set(rows) == set(layers) == set(LAYERS)
    for name, kind in layers.items():
        assert bool(kind.no_causal_form) == ("two-sided" in rows[name])


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_drops_in_and_trains(name):
    layer = build(name, bias=True)
    x = torch.randn(2, 21, 16, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    out.square().mean().backward()
    assert x.grad.isfinite().all()
    for key, parameter in layer.named_parameters():
        if key in ("gate_query", "gate_key"):
            # Trained by distillation.
            continue
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_heads_equal_repeated_ones(name):
    grouped, whole = build(name, kv_heads=2).double(), build(name).double()
    state = grouped.state_dict()
    for key, value in whole.state_dict().items():
        own = state[key]
        # Whatever belongs to a key head is given to each query head that reads it.
        if own.shape != value.shape:
            split = own.unflatten(0, (2, -1)).repeat_interleave(2, dim=0)
            own = split.flatten(0, 1)
        value.copy_(own)
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    torch.testing.assert_close(grouped.eval()(x), whole.eval()(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_saving_and_loading_gives_the_same_layer(name):
    first, second = build(name), build(name)
    for p in [*second.parameters(), *second.buffers()]:
        p.data += 1
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 21, 16)
    assert torch.equal(first.eval()(x), second.eval()(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_compiles_to_one_graph_with_its_gradients(name):
    # Small graphs compile fast. Only operators of our own need the slower backend, which checks
    # what they say about shapes.
    small = {"LSHAttention": {"rounds": 1}, "Nystromformer": {"iterations": 1}}
    own = name in ("LSHAttention", "RoutingAttention")
    layer = build(name, **small.get(name, {}))
    x = torch.randn(2, 21, 16, requires_grad=True)
    mask = torch.arange(21) >= torch.tensor([[0], [4]])
    compiled = torch.compile(layer, backend="aot_eager" if own else "eager", fullgraph=True)
    found, wanted = compiled(x, mask), layer(x, mask)
    torch.testing.assert_close(found, wanted)
    inputs = [x, layer.value.weight]
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(wanted.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.parametrize("name", LAYERS)
def test_padding_may_hold_nan(name):
    layer = build(name).eval()
    mask = torch.arange(21) >= torch.tensor([[0], [4]])
    mask[0, 9] = False
    x = torch.randn(2, 21, 16)
    wanted = layer(x, mask)
    torch.testing.assert_close(layer(x.masked_fill(~mask[..., None], torch.nan), mask), wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_nan_in_padding_reaches_no_gradient(name):
    layer = build(name, bias=True)
    mask = torch.arange(21) >= torch.tensor([[0], [4]])
    x = torch.randn(2, 21, 16).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    layer(x, mask).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert all(b.isfinite().all() for b in layer.buffers())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [0.01, 1.0])
def test_float16_holds_gradients_of_short_rows_and_padding(name, size):
    layer = build(name).half()
    mask = torch.arange(21) >= torch.tensor([[0], [4]])
    x = (size * torch.randn(2, 21, 16)).half().requires_grad_()
    layer(x, mask).float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert all(b.isfinite().all() for b in layer.buffers())


@pytest.mark.parametrize(
    "name", ["LinearAttention", "Linformer", "Nystromformer", "Performer", "TopK"]
)
def test_shapes_are_known_without_data(name):
    """Of layers that go through no kernel of attention."""
    x = torch.empty(2, 20, 16, device="meta")
    assert build(name, device="meta")(x).shape == x.shape


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_is_close_to_float64(name):
    exact = build(name).double().eval()
    low = copy.deepcopy(exact).bfloat16()
    # Rounded weights and tokens on both sides: what is compared is the computation.
    exact.load_state_dict(low.state_dict())
    x = torch.randn(2, 21, 16).bfloat16()
    out = low(x)
    assert out.dtype == torch.bfloat16
    if name not in SELECT:
        # Rounding changes what those select.
        wanted = exact(x.double())
        assert (out.double() - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdaptiveSpan", {"start": "a"}),
        ("LSHAttention", {"buckets": 2.5}),
        ("LSHAttention", {"buckets": "a"}),
        ("LSHAttention", {"buckets": ()}),
        ("LSHAttention", {"before": -1}),
        ("LSHAttention", {"after": 0.5}),
        ("LinearAttention", {"max_length": 0, "feature_map": "cosformer"}),
        ("LongformerAttention", {"global_tokens": 3}),
        ("MoBA", {"top": True}),
        ("NSA", {"head_dim": -1}),
        ("PooledChunkAttention", {"rope": "a"}),
        ("RoutingAttention", {"decay": 2.5}),
        ("Synthesizer", {"kind": 3}),
        ("NSA", {"select": "a"}),
        ("Nystromformer", {"landmarks": 0}),
        ("Nystromformer", {"landmarks": 2.5}),
        ("Nystromformer", {"iterations": 0}),
        ("Nystromformer", {"conv_kernel": -1}),
    ],
)
def test_options_that_are_no_sizes_are_named(name, options):
    with pytest.raises(InputError, match=f"{next(iter(options))} must be .* got "):
        build(name, **options)


def test_functions_name_what_does_not_fit():
    q, k, v = torch.randn(3, 2, 4, 20, 8)
    mask = torch.ones(2, 20)
    for wrong, message in (
        ({"q": q.numpy()}, "mask .or None. as tensors; got ndarray, Tensor, Tensor, NoneType"),
        ({"mask": [[1] * 20] * 2}, "as tensors; got Tensor, Tensor, Tensor, list"),
        (
            {"v": v.double()},
            "one floating-point dtype; got .* v torch.float64",
        ),
        (
            {"q": q.long(), "k": k.long(), "v": v.long()},
            "dtype; got q torch.int64",
        ),
        ({"q": q[:, :, :0], "k": k[:, :, :0], "v": v[:, :, :0]}, "expected no empty axis"),
        ({"mask": mask[:1]}, r"padding mask of shape \[2, 20\], got \[1, 20\]"),
        ({"mask": mask[:, :19]}, r"padding mask of shape \[2, 20\], got \[2, 19\]"),
    ):
        given = {"q": q, "k": k, "v": v} | wrong
        with pytest.raises(InputError, match=message):
            ls.mechanism.topk_attention(**given, keep=3)


DECODING = {
    **{name: {} for name in LAYERS if not getattr(ls.mechanism, name).no_causal_form},
    "LSHAttention": {"selection": "window"},
    "RoutingAttention": {"selection": "window"},
}


@pytest.mark.parametrize("name", DECODING)
def test_states_of_other_sequences_and_layers_are_refused(name):
    own = build(name, **DECODING[name]).eval()
    x = torch.randn(2, 21, 16)
    state = own(x, return_state=True)[1]
    with pytest.raises(InputError, match=r"that of 2 sequences and 4 key heads, .* 1 and"):
        own(x[:1], state=state)
    other = getattr(ls.mechanism, name)(16, 2, **LAYERS[name] | DECODING[name]).eval()
    with pytest.raises(InputError, match=r"of 2 sequences and 4 key heads, .* of 2 and 2"):
        other(x, state=state)
    with pytest.raises(InputError, match=r"expected a state as .* \(\w+State\), got list"):
        own(x, state=[state])


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_sizes_are_named(name):
    with pytest.raises(InputError, match=r"expected x of shape \[batch, tokens, 16\]"):
        build(name)(torch.randn(2, 21, 15))
    for given in ([[0.0]], torch.zeros(2, 21, 16, dtype=torch.int64)):
        with pytest.raises(InputError, match="tensor of floating-point numbers, got "):
            build(name)(given)
    for shape in ((2, 0, 16), (0, 21, 16)):
        with pytest.raises(InputError, match="at least one sequence of one token"):
            build(name)(torch.randn(shape))
    for mask, given in ((torch.ones(2, 20), r"\[2, 20\]"), ([[1] * 21] * 2, "list")):
        with pytest.raises(InputError, match=rf"padding mask of shape \[2, 21\], got {given}"):
            build(name)(torch.randn(2, 21, 16), mask)
    with pytest.raises(InputError, match="give head_dim="):
        getattr(ls.mechanism, name)(10, 4, **LAYERS[name])
