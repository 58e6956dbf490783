"""Recall by the definition, and lists of tiles that hold what was selected."""

from __future__ import annotations

import pytest
import torch
from tests.select import oracles
from tests.select.test_prefill import METHODS, H, K, mask_of, tensors

from longspan.select import measure
from longspan.select.attention import select
from longspan.select.tiles import _columns, block_lists, causal

TILE = 128


@pytest.mark.parametrize("text", METHODS)
def test_recall_is_the_mass_that_dense_attention_gives_to_what_is_kept(text):
    q, k, v = tensors(40, 100)
    found = select(q, k, v, text, layer=1, layers=3)
    mass = oracles.probs(q[0], oracles.rep(k[0], H), oracles.causal(40, 100))
    wanted = (mass * mask_of(found, 40)[0]).sum(-1).mean(-1)
    # As many looked at as there are rows: each is looked at once.
    torch.testing.assert_close(measure.recall(found, 40)[0], wanted, atol=1e-10, rtol=0)


def test_recall_skips_padding():
    q, k, v = tensors(60, 60, batch=2)
    text = "block_topk(2, block=16)"
    place = torch.stack([torch.arange(60), torch.arange(60) - 23]).clamp(min=-1)
    rolled = [torch.stack([x[0], x[1].roll(-23, 1)]) for x in (k, v)]
    padded = measure.recall(select(q, *rolled, text, place=place), 37)
    alone = select(q[1:, :, 23:], k[1:, :, 23:], v[1:, :, 23:], text)
    torch.testing.assert_close(padded[1:], measure.recall(alone, 37), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("n", "m"), [(400, 400), (300, 700), (100, 100)])
def test_lists_of_tiles_hold_the_selected_blocks(n, m):
    q, k, v = tensors(n, m, batch=2)
    found = select(q, k, v, "block_topk(2) + sinks(4)")
    prompt, blocks = found.layout.prompt, found.selection.blocks
    lists = block_lists(prompt, blocks)
    dense = torch.zeros(2, H, blocks.shape[2], blocks.shape[3], dtype=torch.int64)
    for count, index in ((lists[0], lists[1]), (lists[2], lists[3])):
        assert count.dtype == index.dtype == torch.int32
        for b in range(2):
            for h in range(H):
                for a in range(blocks.shape[2]):
                    for block in index[b, h, a, : count[b, h, a]].tolist():
                        dense[b, h, a, block] += 1
    assert torch.equal(dense, blocks.long())
    # The own block, and nothing else, needs the mask.
    assert (lists[0][:, :, : blocks.shape[2]] == 1).all()
    assert (lists[1][:, :, : blocks.shape[2], 0] == prompt.own[:, None]).all()
    ranges = causal(prompt)
    assert ranges.mask_GNM()[ranges.group_BH].sum((2, 3)).unique().tolist() == [
        int(oracles.causal(n, m).sum())
    ]


def test_columns_of_the_second_pass_complete_the_first(monkeypatch):
    """The mask function of the CUDA pass, evaluated densely, shows what blocks do not."""
    q, k, v = tensors(300, 300, batch=2)
    found = select(q, k, v, "block_topk(2) + keynorm(9) + every(50)")
    prompt, selection = found.layout.prompt, found.selection
    seen = {}

    def instead(prompt, values, dtype):
        def attend(q, keys, values, at, column, shown, *lists):
            key = torch.arange(column.shape[-1])
            block = torch.arange(at.shape[1]) // TILE
            here = shown[:, :, block][..., key] & (column[:, :, None] <= at[:, None, :, None])
            some = lists[0][:, :, block, None] * TILE > key
            assert not (here & ~some).any()
            seen["columns"] = (column, here)
            seen["keys"] = keys
            return q, at

        return attend

    monkeypatch.setattr("longspan.select.tiles._compiled", instead)
    _columns(prompt, found.v, selection)
    column, here = seen["columns"]
    assert column.shape[-1] == TILE
    mask = selection.mask(prompt)
    rows = prompt.at >= 0
    blocks = type(selection)(blocks=selection.blocks).mask(prompt)
    more = torch.zeros(*here.shape[:3], mask.shape[-1] + 1, dtype=torch.int64)
    place = column.long().masked_fill(column < 0, mask.shape[-1])[:, :, None].expand_as(here)
    more.scatter_add_(-1, place, here.long())
    assert torch.equal((more[..., :-1] + blocks)[:, :, rows[0]], mask.long()[:, :, rows[0]])
    heads = k.repeat_interleave(H // K, 1)
    real = column >= 0
    own = heads.gather(2, column.long().clamp(min=0)[..., None].expand(-1, -1, -1, k.shape[3]))
    assert torch.equal(seen["keys"][real], own[real])


def test_break_even_is_measured_once_and_between_the_lengths_tried():
    sizes = {"heads": 2, "kv_heads": 1, "width": 16, "seconds": 0.0, "longest": 2048}
    measure._break_even.cache_clear()
    found = measure.break_even("sinks(4) + recent(64)", **sizes)
    assert found in (1024, 2048)
    assert measure.break_even("sinks(4) + recent(64)", **sizes) == found
    assert measure._break_even.cache_info().hits == 1


def test_a_method_that_does_everything_never_pays(monkeypatch):
    times = iter([2.0, 1.0] * 20)
    monkeypatch.setattr(measure, "best_time", lambda run, device: next(times))
    measure._break_even.cache_clear()
    sizes = {"heads": 2, "kv_heads": 1, "width": 16, "longest": 4096}
    assert measure.break_even("recent(100000)", **sizes) == 8192
    # Slower, faster, faster: from the second length on.
    times = iter([2.0, 1.0, 1.0, 2.0, 1.0, 2.0])
    measure._break_even.cache_clear()
    assert measure.break_even("recent(100000)", **sizes) == 2048


def test_a_sample_has_heavy_keys_and_near_ones():
    q, k, _ = measure.sample(512, 4, 2, 32, dtype=torch.float32, device="cpu")
    mass = oracles.probs(q[0].double(), oracles.rep(k[0], 4).double(), oracles.causal(512, 512))
    rows = mass[:, 256:]
    near = torch.stack([rows[:, i, 256 + i - 63 : 257 + i].sum(-1) for i in range(256)]).mean()
    # Even attention would give 64 of about 384 keys a sixth, and 4 keys a hundredth.
    assert near > 0.2
    assert rows[..., :4].sum(-1).mean() > 0.03
