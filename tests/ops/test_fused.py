"""Gathering and merging in one kernel give what the plain operations give."""

from __future__ import annotations

import pytest
import torch

from longspan.ops.fused import gather, merge_fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (1000, 128), (333, 40)])
def test_gather(dtype, rows, width):
    x = torch.randn(2, 3, rows, width, device="cuda", dtype=dtype)
    for batch in (1, 2):
        row = torch.randint(rows, (batch, 2 * rows + 1), device="cuda")
        wanted = torch.stack([x[b][:, row[b % batch]] for b in range(2)])
        assert torch.equal(gather(x, row), wanted)
        assert torch.equal(gather(x.mT.contiguous().mT, row), wanted)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_merge(parts):
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=make, device="cuda", dtype=torch.float64)

    outs = [normal(2, 3, 77, 48) for _ in range(parts)]
    lses = [3 * normal(2, 3, 77) for _ in range(parts)]
    for i, lse in enumerate(lses):
        lse[..., i * 7 : i * 7 + 20] = -torch.inf
    for x in (*outs, *lses):
        x[:, :, 60:] = -torch.inf if x.dim() == 3 else 0.0
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    small = [x.detach().float().requires_grad_() for x in leaves]
    from longspan.ops.merge import merge

    wanted = merge(list(zip(leaves[:parts], leaves[parts:], strict=True)))
    found = merge_fused(list(zip(small[:parts], small[parts:], strict=True)))
    slopes = [normal(*x.shape) for x in wanted]
    seen = wanted[1].detach() > -torch.inf
    slopes[1] = slopes[1].where(seen, 0.0)
    grads = [
        torch.autograd.grad(out, given, [s.to(out[0].dtype) for s in slopes])
        for out, given in ((wanted, leaves), (found, small))
    ]
    for a, b in zip((*found, *grads[1]), (*wanted, *grads[0]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits():
    x = torch.zeros(1, 9, 1 << 21, 128, device="cuda", dtype=torch.int8)
    x[0, 8, -1] = 7
    row = torch.full((1, 1 << 21), (1 << 21) - 1, device="cuda")
    assert (gather(x, row)[0, 8, -5:] == 7).all()
