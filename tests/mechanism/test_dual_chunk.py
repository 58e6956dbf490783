"""Dual Chunk Attention against its dense form, the paper's table, and its authors' code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.mechanism.oracles import (
    assert_no_leak,
    assert_padding_is_absent,
    assert_same_with_gradients,
    per_head,
    qkv,
    weighted_softmax,
)

from longspan.errors import PatternError
from longspan.mechanism import DualChunk, DualChunkAttention, dual_chunk_attention
from longspan.mechanism._dual_chunk_plan import lay_out
from longspan.position import yarn


def rope(x, position):
    d = x.shape[-1]
    angle = position.to(x.dtype)[:, None] * 1e4 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    c, s = (torch.cat([f, f], -1) for f in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, -1)
    return x * c + torch.cat([-second, first], -1) * s


def oracle(s, w, factor=None):
    """Dense, with the relative positions of each pair; spec form, s = chunk and c = s + w."""
    c = s + w

    def one(q, k, v):
        i = torch.arange(len(q))
        own, chunk = i % s, i // s
        keys = rope(k, own)
        intra, inter = rope(q, own) @ keys.T, rope(q, torch.full_like(i, c - 1)) @ keys.T
        successive = rope(q, (s + own).clamp(max=c - 1)) @ keys.T
        back = chunk[:, None] - chunk[None]
        z = torch.where(back == 0, intra, torch.where(back == 1, successive, inter))
        z = z * len(q[0]) ** -0.5 * (1 if factor is None else factor(i)[:, None])
        return weighted_softmax(z, i[None] <= i[:, None], v)

    return one


def authors_form(chunk_size, local_size):
    """ChunkLlama's three flash calls per chunk with its own position tables, joined by lse."""
    length = chunk_size - local_size

    def one(q, k, v):
        n, d = q.shape
        table = torch.arange(chunk_size + 1)
        out = []
        for start in range(0, n, length):
            rows = torch.arange(start, min(start + length, n))
            r = rows - start
            keys = lambda a, b: rope(k[a:b], torch.arange(a, b) % length)  # noqa: E731
            intra = (rope(q[rows], table[r]) @ keys(start, start + len(r)).T).masked_fill(
                r[None] > r[:, None], -math.inf
            )
            parts = [(intra, v[start : start + len(r)])]
            if start:
                place = table[(length + r).clamp(max=chunk_size)]
                parts.append(
                    (
                        rope(q[rows], place) @ keys(start - length, start).T,
                        v[start - length : start],
                    )
                )
            if start > length:
                end = start - length
                place = torch.full_like(
                    r, int(table[(2 * length - 1 + 0 * r).clamp(max=chunk_size)][-1])
                )
                parts.append((rope(q[rows], place) @ keys(0, end).T, v[:end]))
            scaled = [(z / math.sqrt(d), value) for z, value in parts]
            lse = torch.stack([z.logsumexp(-1) for z, _ in scaled])
            share = lse.softmax(0)
            out.append(
                sum(
                    w[:, None] * (z.softmax(-1) @ value)
                    for w, (z, value) in zip(share, scaled, strict=True)
                )
            )
        return torch.cat(out)

    return one


@pytest.mark.parametrize("n", [1, 5, 6, 7, 13, 40])
@pytest.mark.parametrize(("s", "w"), [(6, 4), (8, 8), (5, 1)])
def test_equals_the_dense_form_with_gradients(n, s, w):
    q, k, v = qkv(n=n, value_dim=5)
    config = DualChunk(chunk=s, local=w)
    assert_same_with_gradients(
        lambda q, k, v: dual_chunk_attention(q, k, v, config),
        lambda q, k, v: per_head(oracle(s, w), q, k, v),
        (q, k, v),
    )


@pytest.mark.parametrize(("chunk_size", "local_size"), [(12, 4), (16, 7), (10, 2)])
def test_equals_the_authors_three_calls(chunk_size, local_size):
    q, k, v = qkv(n=45)
    config = DualChunk.from_code(chunk_size, local_size)
    torch.testing.assert_close(
        dual_chunk_attention(q, k, v, config),
        per_head(authors_form(chunk_size, local_size), q, k, v),
        atol=1e-12,
        rtol=1e-12,
    )


def relative_positions(s, w, n):
    """Distance at which each pair is compared, from the plan."""
    laid = lay_out(DualChunk(chunk=s, local=w), n, 1)
    table = np.full((n, n), -1)
    for one, place in laid.passes:
        seen = one.mask()[0, 0]
        assert (table[seen] == -1).all()
        table[seen] = (place[0][:, None] - np.arange(n)[None] % s)[seen]
    return table


def test_relative_positions_are_those_of_the_papers_figure():
    # Figure 2 of the paper: s = 6, c = 10, w = 4; rows 0, 5, 6, 9, 10 and 11.
    found = relative_positions(6, 4, 12)
    assert found[0].tolist() == [0] + 11 * [-1]
    assert found[5].tolist() == [5, 4, 3, 2, 1, 0] + 6 * [-1]
    assert found[6].tolist() == [6, 5, 4, 3, 2, 1, 0] + 5 * [-1]
    assert found[9].tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1, -1]
    assert found[10].tolist() == [9, 8, 7, 6, 5, 4, 4, 3, 2, 1, 0, -1]
    assert found[11].tolist() == [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]
    assert (relative_positions(6, 4, 14)[13][:6] == [9, 8, 7, 6, 5, 4]).all()


@pytest.mark.parametrize(("s", "w"), [(6, 4), (7, 7), (5, 1)])
def test_distances_are_exact_nearby_and_never_beyond_the_context(s, w):
    n = 40
    found, i = relative_positions(s, w, n), np.arange(n)
    distance, past = i[:, None] - i[None], i[:, None] >= i[None]
    assert ((found >= 0) == past).all()
    assert found.max() == s + w - 1
    exact = past & ((distance <= w) | (i[:, None] // s == i[None] // s))
    assert (found[exact] == distance[exact]).all()


def test_up_to_one_chunk_it_is_plain_rope():
    q, k, v = qkv(n=16)
    longer = dual_chunk_attention(q, k, v, DualChunk(chunk=64, local=8))
    assert torch.equal(longer, dual_chunk_attention(q, k, v, DualChunk(chunk=16, local=3)))


@pytest.mark.parametrize(("name", "rate"), [("chunkllama", 0.05), ("vllm", 0.1)])
def test_temperature(name, rate):
    q, k, v = qkv(n=30)

    def own(i):
        return (1 + rate * ((i.double() + 1) / 10).clamp(min=1).log()) ** 2

    def published(i):
        return torch.full_like(i, (1 + rate * math.log(30 / 8)) ** 2, dtype=torch.float64)

    for rest, factor in (({}, own), ({"trained": 8, "length": 30}, published)):
        found = dual_chunk_attention(
            q, k, v, DualChunk(chunk=6, local=4, temperature=name, **rest)
        )
        wanted = per_head(oracle(6, 4, factor), q, k, v)
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def layer(**kwargs):
    torch.manual_seed(0)
    return DualChunkAttention(16, 4, kv_heads=2, chunk=6, local=4, **kwargs).double()


@pytest.mark.parametrize("temperature", ["chunkllama", "vllm"])
def test_temperatures_are_not_rounded_on_the_way_of_a_mask(temperature):
    one, x = layer(temperature=temperature), torch.randn(1, 47, 16, dtype=torch.float64)
    found = one(x, mask=torch.ones(1, 47, dtype=torch.bool))
    torch.testing.assert_close(found, one(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", ["none", "vllm"])
def test_decoding_equals_prefill(temperature):
    one = layer(temperature=temperature)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :5] = False
    for given in (None, mask):
        wanted = one(x, given)
        first, state = one(x[:, :11], None if given is None else given[:, :11], return_state=True)
        parts = [first]
        for t in range(11, 30):
            part, state = one(x[:, t : t + 1], state=state, return_state=True)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-12, rtol=1e-12)
    assert state.kept[0].shape == (2, 2, 30, 4)


def test_later_tokens_leave_the_past_bit_identical():
    one = DualChunkAttention(16, 2, chunk=6, local=4)
    assert_no_leak(one, torch.randn(2, 30, 16), cuts=[1, 5, 6, 7, 12, 29])


def test_padding_is_absent():
    assert_padding_is_absent(layer(), torch.randn(2, 21, 16, dtype=torch.float64), 5, 9)


def test_padding_may_hold_anything():
    q, k, v = qkv(batch=2, n=20)
    segments = np.zeros((2, 20), np.int64)
    segments[0, :4], segments[1, 9], segments[1, 17:] = -1, -1, -1
    hidden = torch.from_numpy(segments < 0)[:, None, :, None]
    config = DualChunk(chunk=6, local=4)
    found = dual_chunk_attention(
        *(x.masked_fill(hidden, torch.nan) for x in (q, k, v)), config, segments=segments
    )
    wanted = dual_chunk_attention(q, k, v, config, segments=segments)
    torch.testing.assert_close(found, wanted.masked_fill(hidden, 0.0))


# Fewer pairs two chunks back than batch rows: their mean, rounded down, is 0.
@pytest.mark.parametrize("chunk", [1, 2])
def test_rows_of_one_sequence_may_be_all_that_look_far_back(chunk):
    n = 2 * chunk + 1
    q, k, v = (torch.randn(5, 1, n, 6).double() for _ in range(3))
    segments = np.full((5, n), -1)
    segments[1:, :chunk], segments[0] = 0, 0
    config = DualChunk(chunk=chunk, local=1)
    found = dual_chunk_attention(q, k, v, config, segments=segments)
    alone = dual_chunk_attention(q[:1], k[:1], v[:1], config)
    torch.testing.assert_close(found[:1], alone)


def test_packed_documents_equal_separate_runs():
    q, k, v = qkv(batch=1, n=40)
    config = DualChunk(chunk=6, local=4)
    segments = np.repeat([0, 1], [23, 17])
    out = dual_chunk_attention(q, k, v, config, segments=segments)
    parts = [
        dual_chunk_attention(*(t[:, :, rows] for t in (q, k, v)), config)
        for rows in (slice(0, 23), slice(23, 40))
    ]
    torch.testing.assert_close(out, torch.cat(parts, 2), atol=1e-12, rtol=1e-12)


def test_scaled_frequencies_and_low_precision():
    scaled = yarn(8, 1e4, 4.0, 16)
    q, k, v = (x.detach() for x in qkv(n=50))
    config = DualChunk(chunk=12, local=4)
    exact = dual_chunk_attention(q, k, v, config, rope=scaled)
    plain = dual_chunk_attention(q, k, v, config)
    half = dual_chunk_attention(*(x.bfloat16() for x in (q, k, v)), config, rope=scaled)
    assert (exact - plain).norm() / plain.norm() > 0.05
    assert (half.double() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("temperature", ["none", "vllm"])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(temperature, masked):
    one = layer(temperature=temperature)
    x = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(20) >= torch.tensor([[0], [4]]) if masked else None
    found = torch.compile(one, backend="aot_eager", fullgraph=True)(x, mask)
    wanted = one(x, mask)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), [x, one.key.weight]),
        torch.autograd.grad(wanted.square().sum(), [x, one.key.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()


def test_refusals_say_what_to_do():
    with pytest.raises(PatternError, match="local must be at most chunk, got local 7 and chunk 6"):
        DualChunk(chunk=6, local=7)
    with pytest.raises(PatternError, match="chunk must be from 1"):
        DualChunk(chunk=0, local=0)
    with pytest.raises(PatternError, match="none, chunkllama, vllm; got 'yarn'"):
        DualChunk(chunk=6, local=4, temperature="yarn")
    assert str(DualChunk.for_length(512)) == "dual_chunk(chunk=384, local=128)"
    # Numbers of few bits do not overflow on the way.
    assert DualChunk.for_length(np.int8(100)) == DualChunk.for_length(100)
    assert DualChunk.from_code(np.uint8(200), np.uint8(20)) == DualChunk.from_code(200, 20)
    for wrong in (lambda: DualChunk.for_length("x"), lambda: DualChunk.from_code(8, 1.5)):
        with pytest.raises(PatternError, match="must be a whole number"):
            wrong()
