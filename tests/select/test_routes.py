"""Routes from a selection to attention: each sees exactly what was selected.

The kernels of a GPU are stood in for by their definitions here; ``test_gpu`` runs them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.ops import block_sparse
from tests.select import oracles
from tests.select.test_prefill import H, K, mask_of, tensors

from longspan.errors import Refusal
from longspan.ops.capability import Capability
from longspan.select import columns as column_pass
from longspan.select import cudnn_blocks, ranges
from longspan.select.attention import prefill, select
from longspan.select.lists import listed
from longspan.select.tiles import block_lists, causal

TILE = 128
TEXTS = (
    "block_topk(2) + sinks(4)",
    "vertical_slash(20, 60, probe=8, first=2, last=3)",
    "recent(100) + every(7)",
    "tail(30)",
)


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


def test_lists_are_made_a_few_heads_at_a_time(monkeypatch):
    chosen = oracles.random(3, 2, 5, 7, 9) > 0.3
    whole = listed(chosen)
    monkeypatch.setattr("longspan.select.lists._AT_ONCE", 2 * 2 * 7 * 9)
    for own, other in zip(listed(chosen), whole, strict=True):
        assert torch.equal(own, other)
    assert whole[1].shape[-1] == int(chosen.sum(-1).max())


@pytest.mark.parametrize(("n", "m"), [(400, 400), (300, 700), (1, 260)])
@pytest.mark.parametrize("text", TEXTS)
def test_ranges_hold_the_selected_blocks(text, n, m):
    q, k, v = tensors(n, m, batch=2)
    found = select(q, k, v, text)
    seen = ranges.runs(found.layout.prompt, found.selection.blocks)
    mask = seen.mask_GNM()[seen.group_BH]
    blocks = type(found.selection)(blocks=found.selection.blocks).mask(found.layout.prompt)
    assert torch.equal(mask, blocks & (found.layout.prompt.at >= 0)[:, None, :, None])
    # Neighbouring blocks are one range.
    some = seen.lo_GNm < seen.hi_GNm
    assert (seen.hi_GNm[..., :-1] < seen.lo_GNm[..., 1:])[some[..., 1:]].all()


@pytest.fixture
def hopper(monkeypatch):
    """A machine that takes every prompt on the fastest route."""
    module = SimpleNamespace(block_sparse_attention_forward=block_sparse.forward)
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(block_sparse_attention=module))
    monkeypatch.setitem(sys.modules, "cudnn.block_sparse_attention", module)
    run = cudnn_blocks.cudnn_blocks
    monkeypatch.setitem(
        sys.modules["longspan.select.attention"].ROUTES,
        "cudnn_blocks",
        (lambda prompt, v: [], run),
    )


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("n", "m"), [(400, 400), (300, 700)])
@pytest.mark.parametrize("text", [*TEXTS, "block_topk(3, block=64) + sinks(4)"])
def test_whole_blocks_own_block_and_columns_are_the_selection(text, n, m):
    q, k, v = tensors(n, m, batch=2)
    found = select(q, k, v, text)
    assert found.layout.prompt.size == (64 if "64" in text else 128)
    mask = mask_of(found, n)
    out, lse = found.attend("cudnn_blocks")
    for b in range(2):
        wanted, total = oracles.attend(q[b], k[b], v[b], mask[b])
        torch.testing.assert_close(out[b], wanted, atol=1e-10, rtol=0)
        torch.testing.assert_close(lse[b], total, atol=1e-10, rtol=0)


@pytest.mark.usefixtures("hopper")
def test_whole_blocks_leave_padding_out():
    q, k, v = tensors(300, 300, batch=2)
    token = torch.ones(2, 300, dtype=torch.bool)
    token[1, :150] = False
    out = prefill(q, k, v, "block_topk(2) + every(9)", mask=token, impl="cudnn_blocks")
    wanted = prefill(q, k, v, "block_topk(2) + every(9)", mask=token, impl="ranges")
    torch.testing.assert_close(out, wanted, atol=1e-10, rtol=0)


@pytest.mark.usefixtures("hopper")
def test_the_fastest_route_that_can_is_taken(monkeypatch):
    q, k, v = tensors(200, 200)
    taken = []
    monkeypatch.setattr(cudnn_blocks, "earlier", lambda *given: taken.append(1) or earlier(*given))
    prefill(q, k, v, "block_topk(1)")
    assert taken


earlier = cudnn_blocks.earlier


def test_kernels_are_chosen_as_for_every_pattern(monkeypatch):
    """The route of ranges asks ``choose`` with what it is about to compute."""
    q, k, v = tensors(100, 100)
    asked = []

    def choose(impl, *given):
        asked.append((impl, given[3]))
        return Capability(name="reference", devices=(), note="")

    monkeypatch.setattr(ranges, "choose", choose)
    found = select(q, k, v, "block_topk(2, block=16)")
    out, _ = found.attend()
    ((impl, seen),) = asked
    assert impl == "auto"
    assert seen.queries == found.layout.prompt.q.shape[2]
    wanted, _ = oracles.attend(q[0], k[0], v[0], mask_of(found, 100)[0])
    torch.testing.assert_close(out[0], wanted, atol=1e-10, rtol=0)


def test_what_layers_share_is_made_once():
    q, k, v = tensors(300, 700)
    first, second = (select(q, k, v, "block_topk(2)").layout.prompt for _ in range(2))
    assert ranges.own_block(first) is ranges.own_block(second)
    place = torch.arange(300)[None]
    padded = select(q, k, v, "block_topk(2)", place=place + 400).layout.prompt
    alike = ranges.own_block(first), ranges.own_block(padded)
    assert alike[0] is not alike[1]
    for name in ("lo_GNm", "hi_GNm"):
        assert torch.equal(getattr(alike[0], name), getattr(alike[1], name))


def test_columns_of_the_second_pass_complete_the_first(monkeypatch):
    """The mask function of the CUDA pass, evaluated densely, shows what blocks do not."""
    q, k, v = tensors(300, 300, batch=2)
    found = select(q, k, v, "block_topk(2) + keynorm(9) + every(5)")
    prompt, selection = found.layout.prompt, found.selection
    seen = {}

    def instead(prompt, values, dtype):
        def attend(q, keys, values, shown, *lists):
            key = torch.arange(shown.shape[-1])
            tile = shown.unflatten(-1, (-1, TILE))
            walked, whole = (
                torch.zeros_like(tile[..., 0]).scatter_add(
                    -1,
                    index[:, :, : shown.shape[2]].long(),
                    torch.arange(index.shape[-1]) < count[:, :, : shown.shape[2], None],
                )
                for count, index in ((lists[0], lists[1]), (lists[2], lists[3]))
            )
            assert torch.equal(walked | whole, tile.any(-1))
            assert torch.equal(whole, tile.all(-1))
            seen["shown"], seen["keys"] = shown[..., key], keys
            return q, q[..., 0]

        return attend

    monkeypatch.setattr(column_pass, "_compiled", instead)
    wide = column_pass._sorted(prompt, selection, TILE)
    column_pass._walked(prompt, found.v, type(selection)(blocks=selection.blocks, columns=wide))
    assert wide.shape[-1] == TILE
    block = torch.arange(prompt.q.shape[2]) // TILE
    here = seen["shown"][:, :, block]
    mask = selection.mask(prompt)
    rows = prompt.at[0] >= 0
    blocks = type(selection)(blocks=selection.blocks).mask(prompt)
    more = torch.zeros(*here.shape[:3], mask.shape[-1] + 1, dtype=torch.int64)
    place = wide.masked_fill(wide < 0, mask.shape[-1])[:, :, None].expand_as(here)
    more.scatter_add_(-1, place, here.long())
    assert torch.equal((more[..., :-1] + blocks)[:, :, rows], mask.long()[:, :, rows])
    heads = k.repeat_interleave(H // K, 1)
    own = heads.gather(2, wide.clamp(min=0)[..., None].expand(-1, -1, -1, k.shape[3]))
    assert torch.equal(seen["keys"][wide >= 0], own[wide >= 0])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", ["heads first", "rows first"])
def test_prompts_of_all_lengths_share_a_graph_of_columns(layout, monkeypatch):
    """Compiled and run without a code generator: graphs are counted, results are compared."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(column_pass, "_backend", count)
    monkeypatch.setattr(column_pass, "_fused", {})
    for n in (900, 512, 300, 640, 1024, 513):
        q, k, v = (x.float() for x in tensors(n, n))
        if layout == "rows first":
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        found = select(q, k, v, "block_topk(1) + every(40)")
        wide = column_pass._sorted(found.layout.prompt, found.selection, TILE)
        chosen = replace(found.selection, columns=wide)
        with torch.no_grad():
            out, lse = column_pass._walked(found.layout.prompt, found.v, chosen)
            wanted, total = column_pass._row_by_row(found.layout.prompt, found.v, chosen)
        some = torch.isfinite(total)
        torch.testing.assert_close(out[some], wanted[some], atol=2e-5, rtol=0)
        torch.testing.assert_close(lse[some], total[some], atol=2e-5, rtol=0)
    # Rows first stay so only where the prompt is whole blocks and nothing had to be moved.
    assert len(graphs) == (2 if layout == "rows first" else 1)


def test_routes_that_need_a_gpu_say_so():
    q, k, v = tensors(20, 20)
    for impl in ("tiles", "cudnn_blocks"):
        with pytest.raises(Refusal, match=f"{impl} cannot take this prompt: needs CUDA tensors"):
            prefill(q, k, v, "sinks(4)", impl=impl)
    with pytest.raises(Refusal, match="impl must be"):
        prefill(q, k, v, "sinks(4)", impl="fast")
