"""Every layer on a GPU gives what it gives on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.mechanism.test_layers import LAYERS, build

from longspan.mechanism._nsa_scores import group_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # The compiler of the kernel there raises warnings of its own.
    pytest.mark.filterwarnings("default"),
]

OPTIONS = [
    *((name, {}) for name in LAYERS),
    ("BlockGate", {"level": "block", "kv_heads": 2}),
    ("LSHAttention", {"counting": "union"}),
    ("LSHAttention", {"selection": "window"}),
    ("LinearAttention", {"feature_map": "exp"}),
    ("RoutingAttention", {"selection": "window", "kv_heads": 2}),
]


@pytest.fixture(autouse=True)
def small_calls_are_sorted_too(monkeypatch):
    """Rows are copied and sorted by block as in long calls."""
    monkeypatch.setattr("longspan.mechanism._blocks._FEW_ROWS", 4)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_the_gpu_agrees_with_the_cpu(name, options):
    # Heads as wide as kernels like them.
    host = build(name, head_dim=64, **options).eval()
    device = copy.deepcopy(host).cuda()
    x = torch.randn(2, 61, 16)
    mask = torch.arange(61) >= torch.tensor([[0], [9]])
    given = [x.clone().requires_grad_(), x.cuda().requires_grad_()]
    wanted, found = host(given[0], mask), device(given[1], mask.cuda())
    # Tensor cores may round products to tf32.
    torch.testing.assert_close(found.cpu(), wanted, atol=5e-3, rtol=5e-3)
    for out in (wanted, found):
        out.square().sum().backward()
    torch.testing.assert_close(given[1].grad.cpu(), given[0].grad, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_trains(name):
    layer = build(name, head_dim=64).cuda()
    x = torch.randn(2, 61, 16, device="cuda", requires_grad=True)
    compiled = torch.compile(layer)
    found, wanted = compiled(x), layer(x)
    # Tensor cores may round products to tf32.
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=5e-3)
    inputs = [x, layer.value.weight]
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(wanted.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [40, 128, 256])
def test_scores_of_compressed_blocks_fit_heads_of_any_width(width, dtype):
    rows, blocks, scale = 150, 70, width**-0.5
    q, k = torch.randn(2, 12, rows, width), torch.randn(2, 2, blocks, width)
    q, k = q.to(dtype).float(), k.to(dtype).float()
    ended = torch.arange(rows)[None] // 2
    logits = (q.unflatten(1, (2, 6)) @ k.mT[:, :, None]).flatten(1, 2) * scale
    hidden = torch.arange(blocks) >= ended[:, :, None]
    lse = logits.masked_fill(hidden[:, None], -torch.inf).logsumexp(dim=-1)
    wanted = group_weights(q, k, lse, ended, scale)
    found = group_weights(
        q.to("cuda", dtype), k.to("cuda", dtype), lse.cuda(), ended.cuda(), scale
    )
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-4, rtol=1e-4)
