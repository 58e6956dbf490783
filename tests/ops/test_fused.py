"""Gathering and merging in one kernel give what the plain operations give."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from longspan.ops.fused import gather, merge_fused, merge_stacked
from longspan.ops.merge import Part, merge, merge_parts
from longspan.ops.rows import Order, spread

rows_module = importlib.import_module("longspan.ops.rows")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (1000, 128), (333, 40)])
def test_gather(dtype, rows, width):
    x = torch.randn(2, 6, rows, width, device="cuda", dtype=dtype)
    for batch, groups, count in ((1, 1, 1), (2, 3, 1), (1, 6, 3)):
        row = torch.randint(-1, rows, (count, batch, groups, 2 * rows + 1), device="cuda")
        each = row.expand(count, 2, groups, -1).repeat_interleave(6 // groups, 2)
        at = each.clamp(min=0)[..., None].expand(-1, -1, -1, -1, width)
        taken = x.float()[None].expand(count, -1, -1, -1, -1).gather(3, at)
        wanted = taken.masked_fill((each < 0)[..., None], 0.0).sum(0).to(dtype)
        for layout in (x, x.mT.contiguous().mT, x.transpose(1, 2).contiguous().transpose(1, 2)):
            torch.testing.assert_close(gather(layout, row.int()), wanted)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("parts", "rows", "width"), [(2, 300, 128), (5, 3, 96), (7, 77, 40), (32, 1, 64), (19, 9, 8)]
)
def test_merge_of_parts_that_lie_one_behind_another(parts, rows, width, dtype):
    outs = torch.randn(parts, 2, 3, rows, width, device="cuda").to(dtype)
    lses = 3 * torch.randn(parts, 2, 3, rows, device="cuda")
    none = torch.rand(lses.shape, device="cuda") < 0.3
    none[:, 0, 0, 0] = True
    outs[none], lses[none] = 0.0, -torch.inf
    wanted = merge([(out.double(), lse.double()) for out, lse in zip(outs, lses, strict=True)])
    out = torch.empty(2, rows, 3, width, device="cuda", dtype=dtype).transpose(1, 2)
    lse = merge_stacked(outs, lses.flatten(0, 1), out)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), wanted[0], rtol=limit, atol=limit)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-5, atol=1e-5)
    assert (out[0, 0, 0] == 0).all()
    assert lse[0, 0, 0] == -torch.inf
    outs[0, 1, 1, 0], lses[0, 1, 1, 0] = torch.nan, torch.nan
    lse = merge_stacked(outs, lses.flatten(0, 1), out)
    assert out[1, 1, 0].isnan().all()
    assert lse.isnan().nonzero().tolist() == [[1, 1, 0]]


def test_parts_in_orders_of_their_own():
    make = torch.Generator().manual_seed(0)
    table = torch.stack([torch.randperm(77, generator=make)[:30] for _ in range(3)])
    table[1, 20:] = -1
    order = Order.of(table[None].numpy().astype(np.int32), 77, torch.device("cuda"))
    outs = [torch.randn(2, n, 6, 48, device="cuda").transpose(1, 2) for n in (77, 30)]
    lses = [torch.randn(2, 6, n, device="cuda") for n in (77, 30)]
    leaves = [x.detach().requires_grad_() for x in (*outs, *lses)]
    parts = [Part(leaves[0], leaves[2]), Part(leaves[1], leaves[3], order)]
    results = []
    for join in (merge_parts, lambda parts: merge([part.placed() for part in parts])):
        found = join(parts)
        loss = (found[0] ** 2).sum() + found[1].sin().sum()
        results.append((*found, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, [1, 4], [0, 2, 3]])
@pytest.mark.parametrize("places", [None, 1, 30])
def test_merge_in_place(places, heads, dtype):
    make = torch.Generator().manual_seed(0)
    n, all_heads = 77, 6
    own = all_heads if heads is None else len(heads)
    order = None
    if places is not None:
        table = torch.stack([torch.randperm(n, generator=make)[:places] for _ in range(own)])
        table[-1, 20:] = -1
        order = Order.of(table[None].numpy().astype(np.int32), n, torch.device("cuda"))
    which = None if heads is None else (torch.tensor(heads, device="cuda"), all_heads)

    def part(count, rows, *more):
        # Heads side by side, as models lay them.
        out = torch.randn(2, rows, count, 40, generator=make).to("cuda", dtype).transpose(1, 2)
        lse = 3 * torch.randn(2, count, rows, generator=make).cuda()
        lse[:, :, 5:9], out[:, :, 5:9] = -torch.inf, 0.0
        return Part(out, lse, *more)

    parts = [part(all_heads, n), part(own, places or n, order, which)]
    wanted = merge([tuple(x.float() for x in one.placed()) for one in parts])
    found = merge_parts(parts, overwrite=True)
    assert found[0] is parts[0].out
    assert found[1] is parts[0].lse
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=limit, atol=limit)


def test_what_is_not_overwritten():
    parts = [Part(torch.randn(1, 2, 9, 8).cuda(), torch.randn(1, 2, 9).cuda()) for _ in range(3)]
    kept = [(part.out.clone(), part.lse.clone()) for part in parts]
    # Three parts of all rows are read once each; gradients need what the parts hold.
    merge_parts(parts, overwrite=True)
    merge_parts(parts[:2])
    parts[1].out.requires_grad_()
    merge_parts(parts[:2], overwrite=True)
    for part, (out, lse) in zip(parts, kept, strict=True):
        assert torch.equal(part.out, out)
        assert torch.equal(part.lse, lse)


def test_spread_adds_gradients_up():
    tables = [np.array([[2, 1, 2, -1, 2, 3, 2, 2, -1, 2]]), np.array([[[0, 2]], [[3, 1]]]), None]
    x = torch.randn(2, 6, 4, 64, dtype=torch.float64, requires_grad=True)
    y = x.detach().to("cuda", torch.float32).requires_grad_()
    results = []
    for given in (x, y):
        orders = [None if t is None else Order.of(t, 4, given.device) for t in tables]
        found = spread(given, orders)
        loss = sum((one**2).cumsum(2).sum() for one in found)
        results.append([*found, torch.autograd.grad(loss, given)[0]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.cpu().double(), a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 16])
def test_merge_of_parts_of_one_row(heads):
    # Triton takes a number that is 1 as a constant.
    outs = torch.randn(8, 1, heads, 1, 64, device="cuda")
    lses = torch.randn(8, 1, heads, 1, device="cuda")
    out = torch.empty_like(outs[0])
    lse = merge_stacked(outs, lses, out)
    wanted = merge(list(zip(outs, lses, strict=True)))
    torch.testing.assert_close(out, wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gradients_of_few_rows_are_added_to_those_of_all(groups, monkeypatch):
    monkeypatch.setattr(rows_module, "add_rows", lambda *_: pytest.fail("all rows are read"))
    make = np.random.default_rng(0)
    tables = []
    for batch, places in ((1, 30), (2, 17)):
        table = [make.permutation(100)[:places] for _ in range(batch * groups)]
        tables.append(np.stack(table).reshape(batch, groups, places))
    tables[1][:, :, 5] = -1
    x = torch.randn(2, 6, 100, 40, dtype=torch.float64, requires_grad=True)
    y = x.detach().to("cuda", torch.float32).requires_grad_()
    results = []
    for given in (x, y):
        orders = [None if t is None else Order.of(t, 100, given.device) for t in (None, *tables)]
        found = spread(given, orders)
        slopes = [(one.detach() * 3).sin() for one in found]
        results.append([*found, *torch.autograd.grad(found, given, slopes)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.cpu().double(), a, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits():
    x = torch.zeros(1, 9, 1 << 21, 128, device="cuda", dtype=torch.int8)
    x[0, 8, -1] = 7
    row = torch.full((1, 1, 1, 1 << 21), (1 << 21) - 1, device="cuda", dtype=torch.int32)
    assert (gather(x, row)[0, 8, -5:] == 7).all()
