"""Linear attention in GPU kernels gives what the chunks give in float64 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longspan.mechanism import Favor, linear_attention
from longspan.mechanism._linear_fused import fits
from longspan.mechanism.feature_maps import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Of the largest number. 16-bit inputs: as much as the rounding of what is written.
NEAR = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def map_of(name, width, kv_heads=2):
    torch.manual_seed(5)
    phi = Favor(width) if name == "favor" else build(name, width, 1000, kv_heads)
    if name == "laplace":
        # Frequencies have the tails of a Cauchy distribution: angles of hundreds of radians, which
        # float32 holds to 1e-4 on whatever device.
        phi.frequencies.clamp_(-1.0, 1.0)
    return phi


def inputs(rows, width, values, group, dtype, batch=2, kv_heads=2):
    """q, k and v, with heads between rows as projections leave them."""
    shapes = [(kv_heads * group, width), (kv_heads, width), (kv_heads, values)]
    g = torch.Generator().manual_seed(rows)
    return [
        torch.randn(batch, rows, heads, w, generator=g).transpose(1, 2).to(dtype)
        for heads, w in shapes
    ]


def assert_near(found, wanted, near):
    scale = wanted.abs().max().clamp_min(1e-6)
    worst = (found.detach().cpu().double() - wanted).abs().max()
    assert worst <= near * scale, f"{worst / scale:.1e} of the largest number"


def compare(phi, given, near, mask=None, earlier=None):
    """Output, sums and all gradients, after ``earlier`` rows if there are any."""
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", given[0].dtype)):
        own = phi.to(device, dtype if dtype == torch.float64 else torch.float32)
        leaves = [x.to(device, dtype).detach().requires_grad_() for x in given]
        valid = None if mask is None else mask.to(device)
        state = None
        if earlier is not None:
            _, state = linear_attention(
                *(x.to(device, dtype) for x in earlier), feature_map=own, return_state=True
            )
            state = replace(state, sum_BKRE=state.sum_BKRE.detach().requires_grad_())
        out, after = linear_attention(
            *leaves, feature_map=own, mask=valid, state=state, return_state=True
        )
        if device == "cuda":
            assert fits(*leaves)
        g = torch.Generator().manual_seed(1)
        slopes = [torch.randn(x.shape, generator=g).to(given[0]) for x in (out, after.sum_BKRE)]
        total = (out * slopes[0].to(out)).sum() + (after.sum_BKRE * slopes[1].to(device)).sum() / 9
        wrt = leaves if state is None else [*leaves, state.sum_BKRE]
        results.append([out, after.sum_BKRE, after.log_BK, *torch.autograd.grad(total, wrt)])
    for wanted, found in zip(*results, strict=True):
        assert_near(found, wanted.detach(), near)


# Every kernel is compiled for a map's features and a dtype: not all of them.
CASES = [
    *(("elu", dtype) for dtype in NEAR),
    ("relu", torch.bfloat16),
    ("mega", torch.bfloat16),
    ("cosformer", torch.bfloat16),
    ("exp", torch.bfloat16),
    ("favor", torch.bfloat16),
    ("hedgehog", torch.float32),
    ("laplace", torch.float32),
]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_maps(name, dtype):
    phi = map_of(name, 64)
    compare(phi, inputs(333, 64, 64, 1, dtype), NEAR[dtype])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("elu", torch.float32),
        ("elu", torch.bfloat16),
        ("exp", torch.float32),
        ("cosformer", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [16, 127, 128, 129, 700])
def test_groups_padding_and_earlier_rows(name, rows, dtype):
    mask = torch.ones(2, rows, dtype=torch.bool)
    mask[0, :5], mask[1, -3:], mask[1, 7:9] = False, False, False
    phi = map_of(name, 40)
    given = inputs(rows, 40, 24, 3, dtype)
    compare(phi, given, NEAR[dtype], mask, inputs(150, 40, 24, 3, dtype))


@pytest.mark.parametrize(
    ("name", "width", "values", "dtype"),
    [
        ("elu", 10, 7, torch.float32),
        ("laplace", 96, 128, torch.bfloat16),
        ("elu", 128, 64, torch.bfloat16),
        ("elu", 256, 192, torch.bfloat16),
        ("exp", 256, 192, torch.float32),
    ],
    ids=str,
)
def test_widths(name, width, values, dtype):
    compare(map_of(name, width), inputs(200, width, values, 1, dtype), NEAR[dtype])


def test_features_of_mega_keep_their_digits_far_below_the_mean():
    q, k, v = inputs(200, 64, 64, 1, torch.float32)
    compare(map_of("mega", 64), [0.2 * q - 1, 0.2 * k - 1, v], NEAR[torch.float32])


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_later_tokens_leave_the_past_bit_identical(name, dtype):
    phi = map_of(name, 64).cuda()
    given = [x.cuda() for x in inputs(700, 64, 64, 1, dtype)]
    base = linear_attention(*given, feature_map=phi)
    for cut in (1, 63, 64, 100, 128, 129, 511, 699):
        other = [torch.cat([x[:, :, :cut], 3 - 2 * x[:, :, cut:]], dim=2) for x in given]
        changed = linear_attention(*other, feature_map=phi)
        assert torch.equal(changed[:, :, :cut], base[:, :, :cut]), f"leak before {cut}"
        assert not torch.equal(changed[:, :, cut:], base[:, :, cut:])


@pytest.mark.parametrize("name", ["elu", "exp"])
def test_prefill_in_parts_and_decoding(name):
    given = [x.cuda() for x in inputs(300, 64, 64, 1, torch.float32)]
    wanted = linear_attention(*given, feature_map=name)
    parts, state = [], None
    cut = [x.split([200, 60, *[1] * 40], dim=2) for x in given]
    for piece in zip(*cut, strict=True):
        part, state = linear_attention(*piece, feature_map=name, state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=2), wanted, atol=1e-4, rtol=1e-4)


def test_a_row_without_weight_gives_zero():
    q, k, v = (x.cuda().requires_grad_() for x in inputs(100, 64, 64, 1, torch.float32))
    out = linear_attention(q, -k.abs(), v, "relu")
    assert torch.equal(out, torch.zeros_like(out))
    for slope in torch.autograd.grad(out.sum(), (q, k, v)):
        assert slope.isfinite().all()


def test_padding_may_hold_nan_and_gets_no_gradient():
    q, k, v = (x.cuda() for x in inputs(100, 64, 64, 1, torch.float32))
    mask = torch.ones(2, 100, dtype=torch.bool, device="cuda")
    mask[0, :40] = False
    k[0, :, :40], v[0, :, :40] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = linear_attention(*leaves, feature_map="elu", mask=mask)
    assert out.isfinite().all()
    _, dk, dv = torch.autograd.grad(out.sum(), leaves)
    for slope in (dk, dv):
        assert torch.equal(slope[0, :, :40], torch.zeros_like(slope[0, :, :40]))
        assert slope.isfinite().all()


def test_nothing_grows_with_rows_times_features_in_float32():
    q, k, v = (x.cuda() for x in inputs(8192, 64, 64, 1, torch.bfloat16))
    linear_attention(q, k, v, "elu")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_attention(q, k, v, "elu")
    # The output, and states half as large as float32 features of the keys would be.
    assert torch.cuda.max_memory_allocated() - before < 3 * q.nbytes
