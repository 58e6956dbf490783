"""Layers against plain masked torch: padding, packing, grouped heads, leaks, compilation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import longspan as ls
from longspan.errors import InputError, PatternError
from longspan.nn.rotary import count_positions
from longspan.position import yarn


def dense_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention by the book; rows without keys give 0."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    logits = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    weights = logits.masked_fill(~mask, -1e30).softmax(dim=-1) * mask.any(dim=-1, keepdim=True)
    return weights @ v


def dense_layer(layer: ls.nn.Attention, x: Tensor, mask: Tensor, turn=lambda t: t) -> Tensor:
    q = layer.query(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    k = layer.key(x).unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2)
    v = layer.value(x).unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2)
    return layer.output(dense_heads(turn(q), turn(k), v, mask).transpose(1, 2).flatten(2))


def grads(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "pattern",
    [ls.SCCA.flow(4), ls.ShiftedChunk(6), ls.Window(5, causal=False) | ls.Prefix(2)],
    ids=str,
)
def test_attention_equals_dense_masked_torch(pattern, kv_heads):
    layer = ls.nn.Attention(16, 4, pattern, kv_heads=kv_heads, bias=True, dtype=torch.float64)
    x = torch.randn(2, 19, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.from_numpy(pattern.mask(19, 4))
    leaves = (x, *layer.parameters())
    found, wanted = layer(x), dense_layer(layer, x, mask)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    toward = torch.randn_like(found)
    for a, b in zip(
        grads((found * toward).sum(), *leaves),
        grads((wanted * toward).sum(), *leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def turn_by_complex_numbers(positions: Tensor, inv_freq: np.ndarray, factor: float = 1.0):
    """RoPE as multiplication by exp(i position theta); the halves are real and imaginary part."""
    angle = positions[:, None] * torch.from_numpy(inv_freq)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        y = torch.complex(first, second) * torch.polar(torch.full_like(angle, factor), angle)
        return torch.cat([y.real, y.imag], dim=-1)

    return turn


def test_rope_turns_by_true_positions():
    pattern = ls.Window(6)
    layer = ls.nn.Attention(16, 2, pattern, rope=500.0, dtype=torch.float64)
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    frequencies = 500.0 ** (-np.arange(4) / 4)
    mask = torch.from_numpy(pattern.mask(11, 2))
    turn = turn_by_complex_numbers(torch.arange(11.0, dtype=torch.float64), frequencies)
    torch.testing.assert_close(layer(x), dense_layer(layer, x, mask, turn), rtol=0, atol=1e-10)
    # Only distances count, so a shift of all positions by the same number changes nothing.
    shifted = layer(x, positions=torch.arange(11) + 100)
    torch.testing.assert_close(shifted, layer(x), rtol=0, atol=1e-10)


def test_rope_takes_scaled_frequencies_and_survives_bfloat16():
    scaled = yarn(8, 10000.0, factor=4.0, trained=64)
    layer = ls.nn.Attention(16, 2, ls.Causal(), rope=scaled, dtype=torch.float64)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    turn = turn_by_complex_numbers(
        torch.arange(9.0, dtype=torch.float64), scaled.inv_freq, scaled.attention_factor
    )
    mask = torch.from_numpy(ls.Causal().mask(9, 2))
    torch.testing.assert_close(layer(x), dense_layer(layer, x, mask, turn), rtol=0, atol=1e-10)
    half = ls.nn.Attention(16, 2, ls.Causal(), rope=scaled).bfloat16()
    assert half._inv_freq.dtype == torch.float64
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_sequence_alone(side):
    layer = ls.nn.Attention(16, 4, ls.SCCA.flow(3), kv_heads=2, rope=1e4, dtype=torch.float64)
    x = torch.randn(3, 12, 16, dtype=torch.float64)
    lengths = [12, 7, 5]
    mask = torch.zeros(3, 12, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(12 - length, 12)] = True
    out = layer(x, mask=mask)
    for row in range(3):
        alone = layer(x[row : row + 1, mask[row]])[0]
        torch.testing.assert_close(out[row, mask[row]], alone, rtol=0, atol=1e-10)
        assert not out[row, ~mask[row]].any()
    torch.testing.assert_close(layer(x, mask=mask.long()), out)


def test_nan_in_padding_reaches_no_gradient():
    layer = ls.nn.Attention(32, 4, pattern=ls.Window(6), bias=True, rope=10000.0)
    mask = torch.arange(20) >= torch.tensor([[0], [4]])
    x = torch.randn(2, 20, 32).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    for rows in ({"mask": mask}, {"segments": mask.long() - 1}):
        x.grad = None
        layer.zero_grad()
        layer(x, **rows).square().sum().backward()
        assert all(g.isfinite().all() for g in (x.grad, *(p.grad for p in layer.parameters())))


@pytest.mark.parametrize(
    "layer", [ls.nn.LocalAttention(32, 6), ls.nn.VerticalSlashAttention(32, 6, 2)]
)
def test_nan_in_padding_reaches_no_gradient_of_one_head(layer):
    mask = torch.arange(20) >= torch.tensor([[0], [4]])
    x = torch.randn(2, 20, 32).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    out = layer(x, mask=mask)
    found = grads(out.square().sum(), x, *layer.parameters())
    assert all(g.isfinite().all() for g in (out, *found))


def test_packed_documents_equal_separate_runs():
    layer = ls.nn.Attention(16, 2, ls.Window(4) | ls.Sink(1), rope=1e4, dtype=torch.float64)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    segments = torch.tensor([4, 4, 4, 4, 4, 9, 9, 9, 1, 1, 1, 1])
    out = layer(x, segments=segments)
    for part in (slice(0, 5), slice(5, 8), slice(8, 12)):
        torch.testing.assert_close(out[:, part], layer(x[:, part]), rtol=0, atol=1e-10)


def test_positions_count_inside_segments_and_skip_padding():
    segments = torch.tensor([[-1, 3, 3, -1, 3, 0, 0], [0, 0, 0, 0, -1, -1, -1]])
    places = count_positions(segments)
    assert places.tolist() == [[0, 0, 1, 0, 2, 0, 1], [0, 1, 2, 3, 0, 0, 0]]


def test_nothing_leaks_from_the_future_through_three_layers():
    stack = nn.Sequential(
        *(ls.nn.Attention(8, 4, ls.ShiftedChunk(4), rope=1e4, layer=i) for i in range(3))
    ).double()
    x = torch.randn(1, 14, 8, dtype=torch.float64, requires_grad=True)
    for row in range(14):
        (grad,) = torch.autograd.grad(stack(x)[0, row].sum(), x)
        assert not grad[0, row + 1 :].any()
        assert grad[0, row].any()


def test_layers_of_a_pattern_that_alternates():
    swin = ls.PerLayer(ls.Chunk(4, causal=False), ls.Chunk(4, offset=2, causal=False))
    second = ls.nn.Attention(8, 2, swin, layer=1, dtype=torch.float64)
    plain = ls.nn.Attention(8, 2, "chunk(4, offset=2, causal=false)", dtype=torch.float64)
    plain.load_state_dict(second.state_dict())
    x = torch.randn(1, 10, 8, dtype=torch.float64)
    torch.testing.assert_close(second(x), plain(x))
    assert "layer=1" in repr(second)


class PlainLocal(nn.Module):
    """The masked form that LocalAttention stands in for, written as one would at first."""

    def __init__(self, d_model: int, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / math.sqrt(x.shape[-1])
        token = torch.arange(x.shape[1])
        far = (token[:, None] - token[None, :]).abs() > self.window_size // 2
        return scores.masked_fill(far, -torch.inf).softmax(dim=-1) @ self.value(x)


@pytest.mark.parametrize("window_size", [1, 2, 3, 8, 99])
def test_local_attention_is_the_plain_masked_layer(window_size):
    plain = PlainLocal(12, window_size).double()
    layer = ls.nn.LocalAttention(12, window_size).double()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 21, 12, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)
    toward = torch.randn(2, 21, 12, dtype=torch.float64)
    found = grads((layer(x) * toward).sum(), x, *layer.parameters())
    wanted = grads((plain(x) * toward).sum(), x, *plain.parameters())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_local_attention_pads():
    layer = ls.nn.LocalAttention(8, 5).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    out = layer(x, mask=mask)
    torch.testing.assert_close(out[1, 4:], layer(x[1:, 4:])[0], rtol=0, atol=1e-12)
    assert not out[1, :4].any()


def test_local_attention_costs_what_its_window_costs():
    layer = ls.nn.LocalAttention(8, 64)
    pairs = [ls.plan(layer.pattern, n=n).pairs for n in (4096, 8192)]
    assert pairs[1] == pytest.approx(2 * pairs[0], rel=0.01)


@pytest.mark.parametrize(("tokens", "places"), [(2, [0, 1]), ([0, 7, 20], [0, 7, 20]), (0, [])])
def test_vertical_slash_attention_is_a_band_and_global_tokens(tokens, places):
    layer = ls.nn.VerticalSlashAttention(12, 5, tokens).double()
    plain = PlainLocal(12, 5).double()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 21, 12, dtype=torch.float64, requires_grad=True)
    token = torch.arange(21)
    mask = (token[:, None] - token[None, :]).abs() <= 2
    mask[places] = True
    mask[:, places] = True
    q, k, v = (project(x)[:, None] for project in (plain.query, plain.key, plain.value))
    wanted, found = dense_heads(q, k, v, mask)[:, 0], layer(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    toward = torch.randn_like(found)
    torch.testing.assert_close(
        grads((found * toward).sum(), x)[0], grads((wanted * toward).sum(), x)[0]
    )
    pairs = [ls.plan(layer.pattern, n=n).pairs for n in (2048, 4096)]
    assert pairs[1] == pytest.approx(2 * pairs[0], rel=0.01)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph_with_the_same_gradients(masked):
    layer = ls.nn.Attention(16, 4, "scca.flow(4)", kv_heads=2, rope=1e4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 13, 16, requires_grad=True)
    rows = {"mask": torch.arange(13) >= torch.tensor([[0], [4]])} if masked else {}
    found, wanted = compiled(x, **rows), layer(x, **rows)
    torch.testing.assert_close(found, wanted)
    leaves = (x, *layer.parameters())
    for a, b in zip(grads(found.sum(), *leaves), grads(wanted.sum(), *leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_operator_passes_torch_opcheck():
    q = torch.randn(1, 4, 7, 8, requires_grad=True)
    k = torch.randn(1, 2, 7, 8, requires_grad=True)
    v = torch.randn(1, 2, 7, 6, requires_grad=True)
    arguments = (q, k, v, "window(3)", None, None, None, None, 0.3, "auto", 0)
    torch.library.opcheck(torch.ops.longspan.attention.default, arguments)


def test_extra_repr_shows_the_pattern():
    layer = ls.nn.Attention(16, 4, ls.Window(8) | ls.Sink(1), kv_heads=2)
    assert "pattern=window(8) | sink(1), heads=4, kv_heads=2" in repr(layer)
    assert "pattern=window(3, causal=false)" in repr(ls.nn.LocalAttention(4, 3))


def test_errors_name_what_is_wrong():
    with pytest.raises(InputError, match="kv_heads must divide heads, got 3 and 4"):
        ls.nn.Attention(16, 4, ls.Causal(), kv_heads=3)
    with pytest.raises(InputError, match="not a multiple of heads 3: give head_dim="):
        ls.nn.Attention(16, 3, ls.Causal())
    with pytest.raises(InputError, match="head_dim must be a whole number of at least 1, got 0"):
        ls.nn.Attention(16, 4, ls.Causal(), head_dim=0)
    with pytest.raises(InputError, match=r"rope must be a base .* got 'yarn'"):
        ls.nn.Attention(16, 4, ls.Causal(), rope="yarn")
    with pytest.raises(PatternError, match="a pattern or its text, got 5"):
        ls.nn.Attention(16, 4, 5)
    with pytest.raises(PatternError, match="use the causal form of that part"):
        ls.nn.Attention(16, 4, "neighborhood(4) & causal()")
    for wrong in (-1, "a"):
        with pytest.raises(InputError, match="layer must be a whole number of at least 0, got"):
            ls.nn.Attention(16, 4, ls.swin(4), layer=wrong)
    with pytest.raises(PatternError, match="did you mean 'window'"):
        ls.nn.Attention(16, 4, "windw(3)")
    with pytest.raises(PatternError, match="evenly over 4 query heads"):
        ls.nn.Attention(16, 4, ls.PerHead(ls.Causal(), ls.Window(2), ls.Sink(1)))
    with pytest.raises(InputError, match="3 frequencies, a head of width 8 needs 4"):
        ls.nn.Attention(16, 2, ls.Causal(), rope=yarn(6, 1e4, factor=2.0, trained=64))
    layer = ls.nn.LocalAttention(8, 3)
    with pytest.raises(
        InputError, match=r"expected x of shape \[batch, tokens, 8\], got \[5, 8\]"
    ):
        layer(torch.randn(5, 8))
    with pytest.raises(InputError, match=r"mask of shape \[1, 5\], got \[5\]"):
        layer(torch.randn(1, 5, 8), mask=torch.ones(5))
    with pytest.raises(InputError, match="global_tokens must not be negative, got -1"):
        ls.nn.VerticalSlashAttention(8, 3, -1)
    with pytest.raises(InputError, match=r"global_tokens must be positions, .* got 2\.0"):
        ls.nn.VerticalSlashAttention(8, 3, 2.0)
    with pytest.raises(InputError, match="d_model must be a whole number"):
        ls.nn.LocalAttention(0, 3)
    layer, x = ls.nn.Attention(16, 4, "window(3)", rope=1e4), torch.randn(2, 5, 16)
    for name in ("positions", "segments"):
        said = rf"expected {name} as a tensor of shape \[5\] or \[2, 5\], got"
        for wrong in (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, 5), [0] * 5):
            with pytest.raises(InputError, match=said):
                layer(x, **{name: wrong})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# The compiler of the kernel there raises warnings of its own.
@pytest.mark.filterwarnings("default")
def test_gpu_agrees_with_cpu_eager_and_compiled():
    layer = ls.nn.Attention(256, 4, "scca.flow(128)", kv_heads=2, rope=1e4)
    x = torch.randn(2, 700, 256)
    wanted = layer(x)
    layer, x = layer.cuda(), x.cuda()
    compiled = torch.compile(layer, fullgraph=True)
    for run in (layer, compiled):
        torch.testing.assert_close(run(x).cpu(), wanted, rtol=1e-3, atol=1e-3)
    eager = grads(layer(x).square().sum(), *layer.parameters())
    for a, b in zip(grads(compiled(x).square().sum(), *layer.parameters()), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
