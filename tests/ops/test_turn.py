"""Rotating in one kernel gives what the plain operations give."""

from __future__ import annotations

import pytest
import torch

from longspan.nn.rotary import rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [10, 96, 128])
def test_rotation(dtype, width):
    inv_freq = 10000.0 ** -(torch.arange(0, width, 2) / width)
    for positions in (torch.arange(77), torch.randint(0, 900, (2, 77))):
        y = torch.randn(2, 77, 3, width, device="cuda", dtype=dtype).transpose(1, 2)
        # In the same dtype on the CPU: 900 radians in float32 are off by 5e-5 from float64.
        given = [y.detach().cpu().requires_grad_(), y.requires_grad_()]
        slope = torch.randn(2, 3, 77, width, dtype=dtype)
        results = []
        for x in given:
            found = rotate(x, positions.to(x.device), inv_freq.to(x.device), 1.3)
            results.append([found, torch.autograd.grad(found, x, slope.to(found))[0]])
        near = 1e-5 if dtype == torch.float32 else 1e-2
        for wanted, found in zip(*results, strict=True):
            torch.testing.assert_close(found.cpu(), wanted, rtol=near, atol=near)
