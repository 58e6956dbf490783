"""Counts and offsets that do not fit into 32 bits, at the lengths where they occur."""

from __future__ import annotations

import torch

import longspan as ls
from longspan.ops.kernels._cudnn_plan import MOST_ENDPOINTS, MOST_WORDS, endpoint_count, mask_words
from longspan.ops.kernels._flex_tiles import TileCounts
from longspan.ops.measured import shape_of
from longspan.ops.ranges import KeyRanges
from longspan.ops.rows import _flat

N, HEADS = 1 << 20, 32


def causal(n: int, *, every_second: bool = False) -> KeyRanges:
    hi = torch.arange(1, n + 1, dtype=torch.int32)
    if every_second:
        hi = torch.where(hi % 2 == 0, hi, 0)
    group = torch.zeros(1, HEADS, dtype=torch.int64)
    return KeyRanges(torch.zeros(1, n, 1, dtype=torch.int32), hi.view(1, n, 1), group, n)


def test_a_plan_of_a_million_rows_counts_all_its_pairs():
    plan = ls.plan(ls.Causal(), N, HEADS)
    pairs = HEADS * N * (N + 1) // 2
    assert plan.pairs == pairs > 2**43
    assert plan.flops(128) == 4 * 128 * pairs
    assert plan.tiles(4096) == HEADS * 256 * 257 // 2
    assert plan.tiles(128) == HEADS * 8192 * 8193 // 2
    assert abs(plan.density - 0.5) < 1e-6


def test_keys_of_a_query_are_averaged_over_more_pairs_than_fit():
    keys, apart, *_ = shape_of(causal(N))
    assert keys == (N + 1) / 2
    assert not apart


def test_cudnn_is_refused_by_counts_that_do_not_wrap():
    lo = torch.zeros(1, 1, 1, dtype=torch.int32).expand(HEADS, N, 32)
    ranges = KeyRanges(lo, lo, torch.arange(HEADS)[None], N)
    assert endpoint_count(ranges, 1, HEADS) == HEADS * 65 * N > MOST_ENDPOINTS
    # Every tile up to the diagonal is partly visible.
    n = 1 << 17
    words = HEADS * (1024 * 1025 // 2) * 512
    assert mask_words(causal(n, every_second=True), 1, HEADS) == words > max(MOST_WORDS, 2**32)


def test_bytes_of_tile_lists_do_not_wrap():
    tiles = N // 128
    count = torch.zeros(1, 1, dtype=torch.int32).expand(HEADS, tiles)
    counts = TileCounts(
        tile=128,
        kv_GQ=count,
        full_kv_GQ=count,
        q_GC=count,
        full_q_GC=count,
        width=tiles,
        height=tiles,
        group_ZY=torch.arange(HEADS)[None],
    )
    assert counts.list_bytes == 16 * HEADS * tiles * (tiles + 1) > 2**34


def test_rows_of_all_heads_are_numbered_in_64_bits():
    x = torch.empty(2, 4 * HEADS, N, 128, device="meta")
    row = torch.empty(1, 1, N, dtype=torch.int32, device="meta")
    assert _flat(x, row).dtype == torch.int64
    # The same on values: the last head of four thousand begins behind 2**32 rows.
    x = torch.empty(1, 1, 1, 1).expand(1, 4097, N, 1)
    row = torch.tensor([[[N - 1]]], dtype=torch.int32)
    assert _flat(x, row)[-1] == 4097 * N - 1 > 2**32
