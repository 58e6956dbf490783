"""Kernels for blocks that rows choose, against dense forms in float64.

On a GPU; or on a CPU by Triton's interpreter, where triton is installed and TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from longspan.mechanism import _blocks, _chosen
from longspan.mechanism._blocks import Lay, best_blocks, over_blocks
from longspan.mechanism._chosen_lists import cut, sorted_entries

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and bool(
    importlib.util.find_spec("triton")
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device, and no interpreted triton"
)
# The compiler and the interpreter of the kernels raise warnings of their own.
pytestmark = pytest.mark.filterwarnings("default")


def inputs(batch, kv_heads, group, rows, keys, width, v_width, size, slots, apart=False):
    torch.manual_seed(0)
    heads, blocks = kv_heads * group, -(-keys // size)
    q = torch.randn(batch, heads, rows, width, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, keys, width, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, keys, v_width, dtype=torch.float64)
    lists = heads if apart else kv_heads
    block = torch.rand(batch, lists, rows, blocks).argsort(dim=-1)[..., :slots]
    # Gaps anywhere, rows that chose nothing, and numbers beyond the last.
    block = block.masked_fill(torch.rand(block.shape) < 0.25, blocks)
    return (q, k, v), block.masked_fill((torch.arange(rows) % 7 == 5)[:, None], blocks + 3)


def dense(q, k, v, block, size, scale):
    heads, keys = q.shape[1], k.shape[2]
    blocks = -(-keys // size)
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    block = block.repeat_interleave(heads // block.shape[1], dim=1).clamp_max(blocks)
    seen = torch.zeros(*q.shape[:3], blocks + 1, dtype=torch.bool).scatter_(-1, block, True)
    seen = seen[..., torch.arange(keys) // size]
    logit = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    lse = logit.logsumexp(dim=-1)
    weight = (logit - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return weight @ v, lse


def with_gradients(run, given):
    given = [x.detach().requires_grad_() for x in given]
    out, lse = run(*given)
    make = torch.Generator().manual_seed(1)
    slopes = [torch.randn(x.shape, generator=make, dtype=torch.float64).to(x) for x in (out, lse)]
    known = lse.masked_fill(lse.isneginf(), 0.0)
    total = (out * slopes[0]).sum() + (known * slopes[1]).sum()
    return out, lse, *torch.autograd.grad(total, given)


SMALL = [
    # batch, kv_heads, group, rows, keys, width, v_width, size, slots, each head for itself
    (2, 2, 3, 70, 66, 10, 10, 8, 4),
    (1, 1, 16, 67, 80, 64, 64, 16, 3),
    (2, 1, 1, 65, 100, 20, 12, 24, 4),
    (1, 2, 2, 66, 77, 16, 16, 40, 2, True),
    (1, 1, 2, 66, 130, 128, 128, 64, 2),
]
LARGE = [
    (2, 2, 16, 1001, 1000, 128, 128, 64, 5),
    (1, 2, 4, 777, 2050, 64, 64, 128, 4),
    (1, 2, 4, 777, 2050, 128, 128, 512, 2, True),
    (1, 1, 3, 500, 900, 256, 256, 64, 4),
    (1, 1, 16, 500, 900, 192, 128, 32, 4),
]


@pytest.mark.parametrize(("rows", "part_rows"), [(20, 20), (20, 7), (1, 1)])
def test_each_choice_is_one_entry_of_one_piece(rows, part_rows):
    torch.manual_seed(0)
    blocks, slots, parts = 6, 3, -(-rows // part_rows)
    block = torch.rand(2, rows, blocks + 2).argsort(dim=-1)[..., :slots]
    order, offset = sorted_entries(block, blocks, parts, part_rows)
    count = offset.diff(dim=1).unflatten(1, (blocks, parts)).mT.contiguous()
    table, first = cut(count, 2, part_rows * slots)
    found = set()
    for one in range(2):
        for part in range(parts):
            for piece, number in enumerate(table[one, part].tolist()):
                if number == blocks:
                    continue
                begin = offset[one, number * parts + part] + 2 * (piece - first[one, part, number])
                end = min(begin + 2, offset[one, number * parts + part + 1])
                assert begin < end
                for copy in order[one, begin:end].tolist():
                    row = copy // slots
                    assert row // part_rows == part
                    assert block[one, row, copy % slots] == number
                    assert (one, copy) not in found
                    found.add((one, copy))
    assert len(found) == int((block < blocks).sum())


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize("several", [False, True])
def test_equals_the_dense_form_with_gradients(sizes, several, monkeypatch):
    if several:
        # Several slices of rows, and several programs for the keys of a block.
        monkeypatch.setattr(_chosen, "_PARTS", 1 << 14)
        monkeypatch.setattr(_chosen, "_PIECE", 64)
    given, block = inputs(*sizes)
    size, scale = sizes[7], sizes[5] ** -0.5
    wanted = with_gradients(lambda *x: dense(*x, block, size, scale), given)
    own = block.to(DEVICE)
    found = with_gradients(
        lambda *x: _chosen.over_chosen(*x, own, size, scale),
        [x.to(DEVICE, torch.float32) for x in given],
    )
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        torch.testing.assert_close(
            a.cpu().double(), b, atol=5e-5, rtol=5e-5, msg=lambda m, at=name: f"{at}: {m}"
        )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize(
    ("sizes", "dtype"), [*((one, torch.bfloat16) for one in LARGE), (LARGE[0], torch.float16)]
)
def test_halves_are_as_near_as_they_can_be(sizes, dtype):
    given, block = inputs(*sizes)
    given = [x.to(dtype).double() for x in given]
    size, scale = sizes[7], sizes[5] ** -0.5
    wanted = with_gradients(lambda *x: dense(*x, block, size, scale), given)
    own = block.to(DEVICE)

    def run():
        return with_gradients(
            lambda *x: _chosen.over_chosen(*x, own, size, scale),
            [x.to(DEVICE, dtype) for x in given],
        )

    found, again = run(), run()
    for a, b, c in zip(found, wanted, again, strict=True):
        a, c = a.cpu().double(), c.cpu().double()
        known = ~b.isneginf()
        assert torch.equal(a.isneginf(), b.isneginf())
        assert (a - b)[known].abs().max() <= 0.02 * b[known].abs().max()
        # No atomics: the same bits.
        assert torch.equal(a, c)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("lay", [None, Lay(4, 1, 12), Lay(1, 0, 47)], ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_the_best_blocks_are_those_of_sorting(lay, first, monkeypatch):
    torch.manual_seed(0)
    score = torch.randn(2, 3, 30, 47)
    score[..., 5] = -torch.inf
    stop = torch.arange(-3, 27)[None] if lay else torch.randint(0, 48, (2, 30))
    wanted = best_blocks(score, stop, 6, first, lay)
    monkeypatch.setattr(_blocks, "can_fuse", lambda *_: True)
    found = best_blocks(score.to(DEVICE), stop.to(DEVICE), 6, first, lay)
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.gpu
@needs_kernels
def test_no_bit_of_the_past_moves(monkeypatch):
    monkeypatch.setattr(_chosen, "can_fuse", lambda *_: True)
    (q, k, v), _ = inputs(1, 2, 2, 96, 96, 16, 16, 16, 2)
    q, k, v = (x.to(DEVICE, torch.float32) for x in (q, k, v))
    place = torch.arange(96, device=DEVICE)[None]
    own = place // 16
    block = torch.stack([own - 1, own - 3], dim=-1)[:, None].expand(1, 2, -1, -1)
    block = block.where(block >= 0, 6)
    near = [(own * 16, place + 1)]

    def run(k, v):
        return over_blocks(q, k, v, near, block, 16, 0.25, "auto")

    before = run(k, v)
    for end in (17, 48, 90):
        other = [torch.cat([x[:, :, :end], torch.randn_like(x[:, :, end:])], 2) for x in (k, v)]
        assert torch.equal(run(*other)[:, :, :end], before[:, :, :end])
