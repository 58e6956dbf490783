"""The ragged store against plain lists of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longspan.kv.store import SPARE, Store

WIDTH = 3


class Lists:
    """The oracle: a list of (key, number) for every batch row and head."""

    def __init__(self, batch, heads):
        self.rows = [[[] for _ in range(heads)] for _ in range(batch)]

    def append(self, keys, numbers, real):
        for b, row in enumerate(self.rows):
            for g, head in enumerate(row):
                for n in range(keys.shape[2]):
                    if real is None or real[b, n]:
                        head.append((keys[b, g, n], numbers[b, g, n]))

    def check(self, store):
        lengths = [[len(head) for head in row] for row in self.rows]
        assert store.length.tolist() == lengths
        assert store.longest == max(map(max, lengths))
        assert (store.room >= store.length).all()
        keys, numbers, valid = store.padded("keys"), store.padded("numbers"), store.valid()
        assert keys.shape == (*store.length.shape, store.longest, WIDTH)
        assert keys.isfinite().all()
        for b, row in enumerate(self.rows):
            for g, head in enumerate(row):
                assert valid[b, g].tolist() == [n < len(head) for n in range(store.longest)]
                for n, (key, number) in enumerate(head):
                    assert (keys[b, g, n] == key).all()
                    assert numbers[b, g, n] == number


@given(st.integers(0, 10**6), st.booleans())
@example(72, False)
@settings(max_examples=30, deadline=None)
def test_any_order_of_operations(seed, padded):
    draw = torch.Generator().manual_seed(seed)
    batch, heads = 3, 2
    like = {"keys": torch.empty(1, WIDTH), "numbers": torch.tensor(0.0)}
    store, lists = Store(batch, heads, like), Lists(batch, heads)
    for step in range(8):
        kind = int(torch.randint(6, (), generator=draw)) if step else 0
        if kind <= 1:
            n = int(torch.randint(1, 25, (), generator=draw))
            keys = torch.rand(len(lists.rows), heads, n, WIDTH, generator=draw)
            numbers = torch.rand(len(lists.rows), heads, n, generator=draw)
            real = None
            if padded:
                real = torch.rand(len(lists.rows), n, generator=draw) < 0.7
            store.append({"keys": keys, "numbers": numbers}, real)
            lists.append(keys, numbers, real)
        elif kind in (2, 5):
            score = torch.rand(store.valid().shape, generator=draw)
            mask = store.valid() & (score < 0.6)
            if kind == 5 and store.longest:
                # One of every head goes, as at each step of a full cache.
                mask = store.valid() & (
                    score > score.masked_fill(~store.valid(), 2.0).amin(-1)[..., None]
                )
            store.keep(mask)
            for b, row in enumerate(lists.rows):
                for g, head in enumerate(row):
                    row[g] = [item for n, item in enumerate(head) if mask[b, g, n]]
        elif kind == 3:
            rows = torch.randint(len(lists.rows), (4,), generator=draw)
            store.select(rows)
            lists.rows = [[list(head) for head in lists.rows[int(r)]] for r in rows]
        else:
            store.add("numbers", torch.ones(store.valid().shape))
            for row in lists.rows:
                row[:] = [[(key, number + 1) for key, number in head] for head in row]
        lists.check(store)


def test_freed_memory_is_free():
    store = Store(1, 4, {"keys": torch.empty(1, 64), "values": torch.empty(1, 64)})
    rows = torch.rand(1, 4, 1000, 64)
    store.append({"keys": rows, "values": rows})
    per_token = 2 * 64 * 4
    assert store.bytes == 4 * (1000 + SPARE) * per_token
    counts = torch.tensor([10, 500, 30, 60])
    store.keep(torch.arange(1000) < counts[None, :, None])
    assert store.bytes == (600 + 4 * SPARE) * per_token


def test_appends_mostly_write_in_place():
    store = Store(2, 2, {"keys": torch.empty(1, 4)})
    moves = 0
    for step in range(100):
        before = store.buffers["keys"].data_ptr()
        store.append({"keys": torch.full((2, 2, 1, 4), float(step))})
        moves += store.buffers["keys"].data_ptr() != before
    assert moves <= 100 / SPARE + 1
    assert store.padded("keys")[1, 1, :, 0].tolist() == list(range(100))


@pytest.mark.parametrize("even", [True, False])
def test_gather(even):
    store = Store(2, 2, {"keys": torch.empty(1, 4)})
    real = None if even else torch.tensor([[True] * 9, [False] * 3 + [True] * 6])
    store.append({"keys": torch.rand(2, 2, 9, 4)}, real)
    store.keep(store.valid() & (torch.arange(store.longest) != 2))
    places = torch.tensor([[[0, 3], [1, 1]], [[2, 4], [4, 0]]])
    expected = store.padded("keys").gather(2, places[..., None].expand(-1, -1, -1, 4))
    assert (store.gather("keys", places) == expected).all()


def test_a_full_cache_moves_rows_within_its_room():
    store = Store(2, 3, {"keys": torch.empty(1, WIDTH)})
    store.append({"keys": torch.rand(2, 3, 20, WIDTH)})
    buffer = store.buffers["keys"].data_ptr()
    for step in range(3 * SPARE):
        new = torch.rand(2, 3, 1, WIDTH)
        before = torch.cat([store.padded("keys"), new], 2)
        store.append({"keys": new})
        keep = torch.ones(2, 3, 21, dtype=torch.bool)
        gone = torch.arange(6).view(2, 3, 1) + step % 15
        assert store.keep(keep.scatter(2, gone, False))
        assert store.buffers["keys"].data_ptr() == buffer
        left = torch.arange(20).expand(2, 3, -1)
        left = left + (left >= gone)
        assert torch.equal(
            store.padded("keys"), before.gather(2, left[..., None].expand(-1, -1, -1, WIDTH))
        )
    assert not store.keep(torch.ones(2, 3, 20, dtype=torch.bool))


def test_what_went_in_bulk_is_free():
    store = Store(1, 2, {"keys": torch.empty(1, WIDTH)})
    store.append({"keys": torch.rand(1, 2, 500, WIDTH)})
    keep = torch.arange(500).expand(1, 2, -1) < 10
    assert store.keep(keep)
    assert store.bytes == 2 * (10 + SPARE) * WIDTH * 4


def test_rows_made_in_inference_mode_can_be_added_to_outside():
    store = Store(1, 2, {"keys": torch.empty(1, WIDTH), "numbers": torch.tensor(0.0)})
    rows = {"keys": torch.rand(1, 2, 4, WIDTH), "numbers": torch.rand(1, 2, 4)}
    with torch.inference_mode():
        store.append(rows)
    store.append(rows)
    store.add("numbers", torch.ones(1, 2, 8))
    assert store.keep(torch.arange(8).expand(1, 2, -1) % 2 == 0)
    assert torch.equal(store.padded("keys"), rows["keys"][:, :, ::2].repeat(1, 1, 2, 1))
    assert torch.equal(store.padded("numbers"), rows["numbers"][:, :, ::2].repeat(1, 1, 2) + 1)


def test_a_copy_goes_its_own_way():
    like = {"keys": torch.zeros(2), "sums": torch.zeros(())}
    store = Store(1, 2, like)
    store.append({"keys": torch.ones(1, 2, 5, 2), "sums": torch.ones(1, 2, 5)})
    copied = store.copy(["sums"])
    assert set(copied.buffers) == {"keys"}
    copied.keep(torch.tensor([[[True, False, False, True, True], [True] * 5]]))
    copied.append({"keys": torch.zeros(1, 2, 1, 2)})
    assert copied.length.tolist() == [[4, 6]]
    assert store.length.tolist() == [[5, 5]]
    assert torch.equal(store.padded("keys"), torch.ones(1, 2, 5, 2))
