"""Peers compute what we compute; those that need a GPU are called as their documentation says.

Where a library cannot run here, a stand-in takes its place that has its documented signature,
checks what it is given and computes the result in the plainest way.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tests.ops import block_sparse as library

import longspan as ls
from longspan.bench import peers, run
from longspan.bench.dense import sdpa
from longspan.bench.peers import block_sparse
from longspan.bench.peers.block_maps import BlockMap, block_map
from longspan.bench.peers.flex_masks import mask_of
from longspan.bench.peers.longlora import longlora
from longspan.bench.run import Bench
from longspan.bench.setting import Setting
from longspan.errors import Refusal
from longspan.eval.records import Records

PEERS = {peer.name: peer for peer in peers.PEERS}
SMALL = Setting(n=512, heads=4, key_heads=2, width=16)
UNFUSED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BLOCKS = ls.Blocks(((0,), (0, 1), (1, 2), (0, 3)), 128)


def masked(q, k, v, mask, scale=None):
    """Dense attention [B, H, N, D], keys repeated for their groups."""
    each = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(each, 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def check(name, pattern, setting=SMALL, *, gradients=True, border=0):
    """The peer's output and gradients are those of our pattern."""
    pattern = ls.parse(pattern) if isinstance(pattern, str) else pattern
    call = PEERS[name].make(pattern, setting)
    leaves = [x.requires_grad_(gradients) for x in setting.tensors()]
    inner = slice(border, setting.n - border)
    theirs, found = (
        out[:, :, inner] for out in (call(*leaves), ls.attend(*leaves, pattern, impl="reference"))
    )
    torch.testing.assert_close(theirs, found, rtol=1e-4, atol=1e-5)
    if gradients:
        slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        pairs = zip(*(torch.autograd.grad(x, leaves, slope) for x in (theirs, found)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one[:, :, inner], other[:, :, inner], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LongLoRA's roll and reshape", "shifted_chunk(32)"),
        ("transformers Longformer layer", "window(17, causal=false)"),
        ("transformers BigBird layer", "bigbird(8, 2, seed=5)"),
    ],
)
def test_peers_that_run_here(name, text):
    if PEERS[name].absent():
        pytest.skip(f"needs {PEERS[name].package}")
    setting = Setting(n=1, heads=4, key_heads=2, width=16)
    asked = Bench(
        patterns=(text,), lengths=(128,), setting=setting, rounds=2, memory=False, peers=True
    )
    for record in run.run(asked, Records(None, {})):
        row = next(row for row in record["rows"] if row["name"] == name)
        assert row["wrong"] == {}
        assert row["seconds"] > 0


@pytest.mark.parametrize("n", [1024, 1088])
def test_bigbird_at_the_lengths_of_its_paper_and_others(n):
    pytest.importorskip("transformers")
    setting = Setting(n=n, heads=3, key_heads=3, width=8)
    check("transformers BigBird layer", "bigbird(64, 3)", setting)


@pytest.mark.parametrize("text", ["bigbird(16, 0)", "bigbird(16, 2, causal=true)", "window(9)"])
def test_bigbird_refuses_what_it_is_not(text):
    with pytest.raises(Refusal, match="random blocks only"):
        PEERS["transformers BigBird layer"].make(ls.parse(text), SMALL)


def test_local_attention():
    pytest.importorskip("local_attention")
    check("local-attention", "window(33)")


def test_longlora_folds_key_heads_too():
    setting = Setting(n=256, heads=8, key_heads=2, width=16)
    inputs = setting.tensors()
    found = longlora(64, sdpa)(*inputs)
    ours = ls.attend(*inputs, "shifted_chunk(64)")
    torch.testing.assert_close(found[:, :, 32:-32], ours[:, :, 32:-32], rtol=1e-4, atol=1e-5)
    # The published form leaks at its seam, ours does not.
    assert (found - ours)[:, 4:, :32].abs().max() > 1e-2


@UNFUSED
def test_flex_on_a_cpu(monkeypatch):
    # Unfused, so that nothing is compiled here.
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    setting = Setting(n=256, heads=4, key_heads=4, width=16)
    check("FlexAttention, mask by hand", "shifted_chunk(64)", setting, gradients=False)


@pytest.mark.parametrize(
    ("text", "per_head"),
    [
        ("causal()", False),
        ("window(20)", False),
        ("window(20, causal=false)", False),
        ("window(9) | sink(3)", False),
        ("chunk(32)", False),
        ("shifted_chunk(32)", True),
        ("scca.fixed(16)", True),
        ("scca.fixed(16, shift=5)", True),
        ("scca.flow(16)", True),
        ("strided(7)", True),
        ("dilated(5, 7)", False),
        ("ssa(9, 7)", True),
        ("sda(16, 3)", True),
        ("sda.neighborhood(5, 3)", True),
        ("neighborhood(15)", False),
        ("neighborhood(100)", False),
    ],
)
def test_masks_by_hand_are_the_patterns(text, per_head):
    mask, apart = mask_of(ls.parse(text), 4, 90)
    assert apart == per_head
    h, i, j = (torch.arange(x) for x in (4, 90, 90))
    seen = mask(torch.tensor(0), h[:, None, None], i[:, None], j).expand(4, 90, 90)
    assert (seen.numpy() == ls.parse(text).mask(90, 4)).all()


@pytest.mark.parametrize("text", ["bigbird(4)", "sink(3) | strided(7)", "dilated(5, [1, 2])"])
def test_masks_that_nobody_wrote_are_refused(text):
    with pytest.raises(Refusal, match="no mask is written"):
        mask_of(ls.parse(text), 4, 90)


@pytest.mark.parametrize("size", [128, 64])
def test_block_maps_are_the_patterns(size):
    pattern = ls.bigbird(size, 1)
    plan = ls.plan(pattern, size * 8, 3)
    found = block_map(plan)
    assert found.size == size
    expected = np.kron(found.seen_HQT.numpy(), np.ones((size, size), bool))
    assert (expected == pattern.mask(size * 8, 3)).all()
    assert found.pairs == plan.pairs


@pytest.mark.parametrize("text", ["window(128)", "strided(2)", "chunk(96, causal=false)"])
def test_what_is_no_map_of_blocks_is_refused(text):
    with pytest.raises(Refusal, match="whole blocks of 128 or 64"):
        block_map(ls.plan(ls.parse(text), 512, 4))


def test_maps_of_groups_count_for_every_head():
    seen = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    given = BlockMap(seen, 64, 6)
    assert given.seen_HQT.shape == (6, 4, 4)
    assert (given.seen_HQT[2] == seen[0]).all()
    assert (given.seen_HQT[3] == seen[1]).all()
    assert given.pairs == int(given.seen_HQT.sum()) * 64 * 64
    some, whole = given.coarser(128)
    for g, a, b in np.ndindex(2, 2, 2):
        part = seen[g, 2 * a : 2 * a + 2, 2 * b : 2 * b + 2]
        assert bool(whole[g, a, b]) == bool(part.all())
        assert bool(some[g, a, b]) == bool(part.any() and not part.all())


@UNFUSED
@pytest.mark.parametrize("tile", [64, 128])
def test_flex_over_a_map(tile):
    given = block_map(ls.plan(ls.RandomBlocks(64, 3, causal=False), 512, 4))
    q, k, v = SMALL.tensors()
    out = block_sparse.flex(given, SMALL.scale, tile, fused=False)(q, k, v)
    mask = given.seen_HQT.repeat_interleave(64, 1).repeat_interleave(64, 2)
    torch.testing.assert_close(out, masked(q, k, v, mask)[0], rtol=1e-4, atol=1e-5)


# Stand-ins of what needs a GPU.


def stand_in(monkeypatch, name, **content):
    """A module of a name, its parents included."""
    parts = name.split(".")
    for at in range(1, len(parts) + 1):
        path = ".".join(parts[:at])
        if path not in sys.modules or at == len(parts):
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


def from_lists(index, count, blocks, size):
    """Dense mask [B, H, N, N] of lists of blocks."""
    assert index.dtype == count.dtype == torch.int32
    assert index.is_contiguous()
    assert count.is_contiguous()
    batch, heads, rows, _ = index.shape
    seen = torch.zeros(batch, heads, rows, blocks, dtype=torch.bool)
    for b, h, a in np.ndindex(batch, heads, rows):
        some = index[b, h, a, : count[b, h, a]].tolist()
        assert some == sorted(set(some))
        seen[b, h, a, some] = True
    return seen.repeat_interleave(size, 2).repeat_interleave(size, 3)


@pytest.mark.parametrize("size", [64, 128])
def test_cudnn_block_sparse(monkeypatch, size):
    """Its backward knows no grouped queries."""
    seen = []

    def backward(*given, **about):
        seen.append(given[0].shape)
        return library.backward(*given, **about)

    stand_in(
        monkeypatch,
        "cudnn.block_sparse_attention",
        block_sparse_attention_forward=library.forward,
        block_sparse_attention_backward=backward,
    )
    check("cuDNN block-sparse", ls.RandomBlocks(size, 2, causal=False))
    assert seen


def test_flash_attention_4_block_sparse(monkeypatch):
    """Tensors [B, S, H, D]; the backward takes lists from key blocks to query blocks."""

    def function(q, k, v, *, softmax_scale, block_sparse_tensors, block_sparse_tensors_bwd):
        forth, back = block_sparse_tensors, block_sparse_tensors_bwd
        assert not forth.mask_block_cnt.any()
        assert forth.block_size == (128, 128)
        blocks = k.shape[1] // 128
        mask = from_lists(forth.full_block_idx, forth.full_block_cnt, blocks, 128)
        turned = from_lists(back.full_block_idx, back.full_block_cnt, blocks, 128)
        assert (mask == turned.mT).all()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = masked(q, k, v, mask, softmax_scale)
        return out.transpose(1, 2), lse

    stand_in(monkeypatch, "flash_attn.cute", flash_attn_func=function)
    stand_in(
        monkeypatch, "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=SimpleNamespace
    )
    check("FlashAttention-4, lists of blocks", BLOCKS)
    small = PEERS["FlashAttention-4, lists of blocks"].make(ls.Blocks(((0,),) * 8, 64), SMALL)
    with pytest.raises(Refusal, match="gradients of blocks of 128"):
        small(*(x.requires_grad_() for x in SMALL.tensors()))


def test_block_sparse_attention(monkeypatch):
    """Packed tensors [tokens, H, D], a mask for each head whose type is positive."""

    def function(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        head_mask_type,
        streaming_info,
        base_blockmask,
        max_seqlen_q_,
        max_seqlen_k_,
        p_dropout,
        deterministic=False,
        softmax_scale=None,
        is_causal=False,
        exact_streaming=False,
        return_attn_probs=False,
    ):
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, max_seqlen_q_]
        assert cu_seqlens_q.dtype == head_mask_type.dtype == torch.int32
        assert head_mask_type.tolist() == [1] * q.shape[1]
        assert streaming_info is None
        assert not p_dropout
        assert not is_causal
        mask = base_blockmask.repeat_interleave(128, 2).repeat_interleave(128, 3)
        turned = (x.transpose(0, 1)[None] for x in (q, k, v))
        return masked(*turned, mask, softmax_scale)[0][0].transpose(0, 1)

    stand_in(monkeypatch, "block_sparse_attn", block_sparse_attn_func=function)
    check("Block-Sparse-Attention", ls.RandomBlocks(128, 2, causal=False))
    with pytest.raises(Refusal, match="blocks of 128"):
        PEERS["Block-Sparse-Attention"].make(ls.Blocks(((0,),) * 8, 64), SMALL)


def test_flashinfer(monkeypatch):
    """A matrix of blocks in compressed rows; tensors [tokens, H, D]."""

    class Wrapper:
        def __init__(self, float_workspace_buffer, backend="auto"):
            assert float_workspace_buffer.dtype == torch.uint8

        def plan(self, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, **named):
            assert indptr.dtype == indices.dtype == torch.int32
            assert (num_qo_heads, num_kv_heads, head_dim) == (4, 2, 16)
            self.scale = named["sm_scale"]
            self.mask = torch.zeros(M // R, N // C, dtype=torch.bool)
            for row in range(M // R):
                self.mask[row, indices[indptr[row] : indptr[row + 1]].long()] = True
            self.mask = self.mask.repeat_interleave(R, 0).repeat_interleave(C, 1)

        def run(self, q, k, v):
            turned = (x.transpose(0, 1)[None] for x in (q, k, v))
            return masked(*turned, self.mask, self.scale)[0][0].transpose(0, 1)

    stand_in(monkeypatch, "flashinfer", BlockSparseAttentionWrapper=Wrapper)
    check("FlashInfer", BLOCKS, gradients=False)
    with pytest.raises(Refusal, match="one map for all heads"):
        PEERS["FlashInfer"].make(ls.RandomBlocks(128, 2, causal=False), SMALL)


def in_rows(mask_of):
    """A function of [B, N, H, D] tensors with keys for every head."""

    def attend(q, k, v, scale, **named):
        assert q.shape == k.shape
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return masked(q, k, v, mask_of(q.shape[2], **named), scale)[0].transpose(1, 2)

    return attend


def grid(n):
    return torch.arange(n)[:, None], torch.arange(n)


@pytest.mark.parametrize(
    "text", ["window(40)", "window(41, causal=false)", "chunk(100)", "chunk(64, causal=false)"]
)
def test_xformers(monkeypatch, text):
    """memory_efficient_attention(q, k, v, attn_bias, scale=), biases of its fmha module."""

    def lower(window_size):
        def mask(n):
            i, j = grid(n)
            return (j <= i) & (i - j < window_size)

        return mask

    def local(window_left, window_right):
        def mask(n):
            i, j = grid(n)
            return (i - j <= window_left) & (j - i <= window_right)

        return mask

    def kind(causal):
        def from_seqlens(lengths):
            def mask(n):
                assert sum(lengths) == n
                own = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
                i, j = grid(n)
                return (own[:, None] == own) & ((j <= i) | (not causal))

            return mask

        return SimpleNamespace(from_seqlens=from_seqlens)

    stand_in(
        monkeypatch,
        "xformers.ops.fmha.attn_bias",
        LowerTriangularFromBottomRightLocalAttentionMask=lower,
        LocalAttentionFromBottomRightMask=local,
        BlockDiagonalCausalMask=kind(True),
        BlockDiagonalMask=kind(False),
    )
    function = in_rows(lambda n, attn_bias: attn_bias(n))
    stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=function)
    check("xformers", text)


@pytest.mark.parametrize(
    "text", ["neighborhood(33)", "neighborhood(9, dilation=4)", "neighborhood(9, causal=true)"]
)
def test_natten(monkeypatch, text):
    """na1d(query, key, value, kernel_size, stride, dilation, is_causal, scale=)."""
    pattern = ls.parse(text)

    def mask(n, kernel_size, stride, dilation, is_causal):
        given = ls.Neighborhood(kernel_size, stride=stride, dilation=dilation, causal=is_causal)
        return torch.from_numpy(given.mask(n)[0])

    stand_in(monkeypatch, "natten", na1d=in_rows(mask))
    check("NATTEN", pattern)


@pytest.mark.parametrize(
    ("name", "module"), [("flash-attn 2", "flash_attn"), ("FlashAttention-4", "flash_attn.cute")]
)
def test_flash_attention(monkeypatch, name, module):
    """window_size counts the keys besides the query's own."""

    def function(q, k, v, *, causal, window_size, softmax_scale):
        assert causal
        i, j = grid(q.shape[1])
        mask = (j <= i) & (i - j <= window_size[0])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return masked(q, k, v, mask, softmax_scale)[0].transpose(1, 2)

    stand_in(monkeypatch, module, flash_attn_func=function)
    check(name, "window(40)")


@pytest.mark.parametrize(
    "peer", [peer for peer in peers.PEERS if peer.package], ids=lambda p: p.name
)
def test_peers_refuse_a_pattern_they_do_not_know(monkeypatch, peer):
    if peer.absent():
        stand_in(monkeypatch, peer.module)
    with pytest.raises(Refusal):
        peer.make(ls.parse("ssa(16, 4)"), SMALL)
