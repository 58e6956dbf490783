"""Scripts may name a default device: tensors of ours lie where they belong all the same."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import longspan as ls

FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros"),
}


def is_placed(call: ast.Call) -> bool:
    """Whether a call says where its tensor lies; ``**place`` does."""
    return any(word.arg in ("device", None) for word in call.keywords)


def test_every_new_tensor_says_where_it_lies():
    source = Path(ls.__file__).parent
    silent = [
        f"{path.relative_to(source)}:{node.lineno}"
        for path in sorted(source.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in FACTORIES
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and not is_placed(node)
    ]
    assert not silent


PATTERNS = [
    "window(7) | sink(2)",
    "strided(3)",
    "dilated(4, [1, 3])",
    "longnet([16, 40], [1, 2])",
    "vertical_slash([1, 9, 20], [0, 5])",
    "blocks([[0], [0, 1], [1, 2]], 16)",
    "neighborhood(5, dilation=2)",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
def test_attention_keeps_off_the_default_device(pattern, impl):
    q = torch.randn(2, 4, 60, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 60, 16, requires_grad=True) for _ in range(2))
    segments = torch.tensor([[-1] * 7 + [0] * 53, [0] * 20 + [1] * 40])
    found = []
    # Nothing can be computed with a tensor on the device without data.
    for device in ("cpu", "meta"):
        with torch.device(device):
            # A parsed pattern is a new one, whose plan nobody kept.
            plan = ls.plan(pattern, 60, 4, segments=segments)
            out, lse = ls.attend(q, k, v, plan, impl=impl, return_lse=True)
            grads = torch.autograd.grad(out.square().sum() + lse[0, :, 7:].sum(), (q, k, v))
            one = ls.attend(q[:, :, -1:].detach(), k.detach(), v.detach(), pattern, impl=impl)
        found.append((out, lse, *grads, one))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a)


LAYERS = {
    "BigBirdAttention": {"block": 4, "random": 1},
    "BlockGate": {"block": 6, "top": 2},
    "DualChunkAttention": {"chunk": 6, "local": 4},
    "LSHAttention": {"buckets": 4, "chunk": 8},
    "LongformerAttention": {"window": 6, "global_tokens": (0, 9)},
    "NSA": {"block": 6, "stride": 3, "select_block": 5, "select": 4, "window": 4},
    "Performer": {},
    "PooledChunkAttention": {"chunk": 6, "combine": "joint", "count_bias": True},
    "Synthesizer": {"kind": "dense"},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_off_the_default_device_and_are_made_on_it(name):
    kind, options = getattr(ls.mechanism, name), LAYERS[name]
    layer, x = kind(16, 4, **options), torch.randn(2, 21, 16)
    mask = torch.arange(21) >= torch.tensor([[0], [4]])
    wanted = layer(x, mask)
    with torch.device("meta"):
        found = layer(x, mask)
        layer.start_near_dense()
        new = kind(16, 4, **options)
    torch.testing.assert_close(found, wanted)
    places = {(t.device.type, t.dtype) for t in [*new.parameters(), *new.buffers()]}
    assert places == {("meta", torch.float32)}
