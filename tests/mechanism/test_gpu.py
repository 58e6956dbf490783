"""Every layer on a GPU gives what it gives on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.mechanism.test_layers import LAYERS, build

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
