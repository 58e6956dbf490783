"""A copy of a cache that goes on as another policy's equals a cache that had it from the start."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import longspan as ls
from longspan.errors import InputError
from longspan.hf.fork import fork, waiting

POLICIES = (
    "everything()",
    "sinks(2) + recent(9)",
    "recent(4) + heavy(6)",
    "recent(4) + heavy(6, age=true)",
    "recent(4) + tova(6)",
    "snapkv(6, window=5, kernel=3)",
    "pyramidkv(8, window=4)",
    "adakv(8)",
    "recent(3) + keydiff(5)",
    "recent(3) + keynorm(5)",
    "recent(3) + expected_attention(7, future=16)",
    "duo([[0.2, 0.9], [0.8, 0.1]], 0.5, 2, 6)",
    "every(7, recent(4) + heavy(6))",
    "quest(12, page=4, dense_layers=0)",
)


@pytest.fixture(scope="module")
def model(tiny_model):
    return ls.hf.load_model(tiny_model, dtype="float64")[0]


def prompt(padding):
    ids = torch.randint(0, 250, (2, 43), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def read(model, cache, ids, mask, pieces):
    """Logits of the last piece, fed as these pieces of columns."""
    place = (mask.cumsum(1) - 1).clamp(min=0)
    for start, stop in pieces:
        logits = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=place[:, start:stop],
            past_key_values=cache,
        ).logits
    return logits


STEPS = [(30 + i, 31 + i) for i in range(13)]


@pytest.mark.parametrize("text", POLICIES)
@pytest.mark.parametrize("padding", [0, 7])
@torch.inference_mode()
def test_a_copy_goes_on_like_a_cache_of_its_policy(model, text, padding):
    ids, mask = prompt(padding)
    reader = ls.kv.cache(model, waiting(POLICIES))
    read(model, reader, ids, mask, [(0, 30)])
    own = ls.kv.cache(model, text)
    read(model, own, ids, mask, [(0, 30)])
    own.compress()
    copied = fork(reader, text)
    for mine, theirs in zip(copied.layers, own.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
    expected = read(model, own, ids, mask, STEPS)
    torch.testing.assert_close(read(model, copied, ids, mask, STEPS), expected, rtol=0, atol=1e-9)
    assert reader.report().seen == 30
    assert all(layer.most == 30 for layer in reader.report().layers)


@torch.inference_mode()
def test_one_reader_serves_many_policies_and_goes_on_reading(model):
    ids, mask = prompt(0)
    reader = ls.kv.cache(model, waiting(POLICIES))
    read(model, reader, ids, mask, [(0, 20)])
    fork(reader, POLICIES[2])
    read(model, reader, ids, mask, [(20, 30)])
    for text in POLICIES[1:12]:
        own = ls.kv.cache(model, f"after_prefill({text})")
        read(model, own, ids, mask, [(0, 20), (20, 30)])
        own.compress()
        kept = [layer.positions for layer in fork(reader, text).layers]
        assert all(map(torch.equal, kept, (layer.positions for layer in own.layers)))


@torch.inference_mode()
def test_what_cannot_be_copied_is_said(model):
    ids, mask = prompt(0)
    empty = ls.kv.cache(model, "everything()")
    with pytest.raises(InputError, match="has read a prompt"):
        fork(empty, "recent(4)")
    read(model, empty, ids, mask, [(0, 30)])
    with pytest.raises(InputError, match="not noted attention received"):
        fork(empty, "heavy(4)")
    with pytest.raises(InputError, match="not noted the last queries"):
        fork(empty, "snapkv(4)")
    forgets = ls.kv.cache(model, "recent(8)")
    read(model, forgets, ids, mask, [(0, 30)])
    with pytest.raises(InputError, match="evicted nothing"):
        fork(forgets, "recent(4)")
