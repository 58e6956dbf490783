"""A few queries over many keys: passes as they lie, refusals, and results on a GPU."""

from __future__ import annotations

import gc
import importlib
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.ops.test_flex import TOLERANCE, gpu, relative

import longspan as ls
from longspan.errors import Refusal
from longspan.ops import capability, launch, loading
from longspan.ops.kernels.reference import reference
from longspan.ops.merge import merge
from longspan.ops.places import Places
from longspan.ops.ranges import KeyRanges
from longspan.planning import Pass

module = importlib.import_module("longspan.ops.kernels.decode")
native = importlib.import_module("longspan.ops.kernels.native")

HEADS, KEY_HEADS, KEYS = 8, 2, 777
PATTERNS = [
    "window(100) | sink(4)",
    "causal()",
    "scca.flow(64)",
    "strided(8)",
    "dilated(32, 4)",
    "dilated(32, [1, 2, 4, 8])",
    "ssa(64, 8)",
    "sda(128, 4)",
    "longnet([64, 256, 512], [1, 4, 16])",
    "window(64) | global(0, 100)",
    "bigbird(16, 2)",
    "random_blocks(16, 3)",
    "heads(causal(), causal(), strided(4), window(7))",
]
# One query of a batch whose first row is padded on the left, or sees no key at all.
PADDED = {
    "positions": np.array([[KEYS - 201], [KEYS - 1]]),
    "segments": np.array([[0], [0]]),
    "key_positions": np.stack([np.maximum(np.arange(KEYS) - 200, 0), np.arange(KEYS)]),
    "key_segments": np.stack([np.where(np.arange(KEYS) < 200, -1, 0), np.zeros(KEYS, int)]),
}
UNSEEN = PADDED | {"segments": np.array([[-1], [0]])}
PACKED = {
    "positions": np.array([[30, 31, 32], [5, 6, 7]]),
    "segments": np.array([[1, 1, 1], [2, 2, 2]]),
    "key_positions": np.stack([np.arange(KEYS) % 300, np.arange(KEYS) % 500]),
    "key_segments": np.stack([np.arange(KEYS) // 300, np.arange(KEYS) // 500 * 2]),
}


def inputs(batch, rows, width=24, *, heads=HEADS, key_heads=KEY_HEADS, keys=KEYS, device="cpu"):
    make = torch.Generator().manual_seed(0)
    shapes = (heads, rows, width), (key_heads, keys, width), (key_heads, keys, width + 8)
    return [torch.randn(batch, *shape, generator=make).to(device) for shape in shapes]


def by_hand(q, k, v, lying, scale):
    """What a kernel that reads rows where they lie should make of its passes."""
    parts = []
    for ranges, places in lying:
        batch, heads, rows, _ = q.shape
        out = q.new_zeros(batch, heads, rows, v.shape[3])
        lse = q.new_full((batch, heads, rows), -torch.inf)
        taking = range(heads) if places.query_heads is None else places.query_heads.tolist()
        keep = range(k.shape[1]) if places.key_heads is None else places.key_heads.tolist()
        mask_GPM = ranges.mask_GNM()
        for b in range(batch):
            for i, h in enumerate(taking):
                own_k = i // (len(taking) // len(keep))
                rows_P = torch.arange(rows)
                if places.query_rows is not None:
                    table = places.query_rows[b % len(places.query_rows)]
                    rows_P = table[i // (len(taking) // len(table))].long()
                mask_PM = mask_GPM[ranges.group_BH[b % len(ranges.group_BH), i]]
                key = torch.arange(ranges.keys)
                if places.key_rows is not None:
                    key = places.key_rows[b % len(places.key_rows), 0].long()
                    mask_PM = mask_PM & (key >= 0)
                at = key.clamp(min=0)
                s_PM = scale * q[b, h, rows_P.clamp(min=0)] @ k[b, keep[own_k], at].T
                s_PM = s_PM.masked_fill(~mask_PM, -torch.inf)
                found = torch.logsumexp(s_PM, -1)
                weight = torch.exp(s_PM - found[:, None]).nan_to_num(0.0)
                live = rows_P >= 0
                out[b, h, rows_P[live]] = (weight @ v[b, keep[own_k], at])[live]
                lse[b, h, rows_P[live]] = found[live]
        parts.append((out, lse))
    return merge(parts)


CASES = [(pattern, rows, {}) for pattern in PATTERNS for rows in (1, 3)]
CASES += [("window(100) | sink(4)", 1, PADDED), ("ssa(64, 8)", 1, UNSEEN), ("causal()", 3, PACKED)]


@pytest.mark.parametrize(("pattern", "rows", "how"), CASES)
def test_a_pass_says_where_its_rows_lie(pattern, rows, how):
    q, k, v = (x.double() for x in inputs(2, rows))
    laid = ls.plan(pattern, rows, HEADS, keys=KEYS, **how)
    lying = [loading.load_where_rows_lie(one, q, k) for one in laid.passes]
    found = by_hand(q, k, v, lying, 0.3)
    wanted = ls.attend(q, k, v, laid, impl="reference", return_lse=True, scale=0.3)
    torch.testing.assert_close(found, wanted)
    for ranges, places in lying:
        alone = by_hand(q, k, v, [(ranges, places)], 0.3)[1]
        if places.covers and ranges.empty_GN().logical_not().all():
            assert alone.isfinite().all()


@pytest.mark.skipif(native.library() is None, reason="native was not compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pattern", "rows", "how"), CASES)
def test_a_kernel_of_a_cpu_reads_rows_where_they_lie(pattern, rows, how, dtype):
    q, k, v = (x.to(dtype) for x in inputs(2, rows))
    laid = ls.plan(pattern, rows, HEADS, keys=KEYS, **how)
    exact = q.double(), k.double(), v.double()
    wanted = ls.attend(*exact, laid, impl="reference", return_lse=True)
    for impl in ("native", "auto"):
        found = ls.attend(q, k, v, laid, impl=impl, return_lse=True)
        assert relative(found[0], wanted[0]) < TOLERANCE[dtype]
        assert torch.equal(found[1].isneginf(), wanted[1].isneginf())


@pytest.mark.skipif(native.library() is None, reason="native was not compiled")
def test_keys_in_an_order_are_not_gathered_for_new_tokens_on_a_cpu(monkeypatch):
    q, k, v = inputs(1, 1)
    assert "kernel native" in ls.explain(q, k, v, "strided(8)")
    wanted = ls.attend(q, k, v, "strided(8)", impl="tiled")

    def order(*_):
        raise AssertionError("an order was made")

    monkeypatch.setattr(loading.Order, "of", order)
    laid = ls.plan("strided(8)", 1, HEADS, keys=KEYS)
    torch.testing.assert_close(ls.attend(q, k, v, laid), wanted)
    with pytest.raises(AssertionError, match="an order was made"):
        ls.attend(q.requires_grad_(), k, v, laid)


def test_what_a_pass_says_is_kept_and_goes_with_it():
    q, k, _ = inputs(1, 1)
    laid = ls.plan("strided(8)", 1, HEADS, keys=KEYS)
    (one,) = laid.passes
    assert loading.load_where_rows_lie(one, q, k) is loading.load_where_rows_lie(one, q, k)
    gone = weakref.ref(loading.load_where_rows_lie(one, q, k)[0])
    del laid, one
    gc.collect()
    assert gone() is None


def test_it_is_for_few_rows_on_a_gpu():
    q, k, v = inputs(1, 1)
    with pytest.raises(Refusal, match="runs on cuda"):
        ls.attend(q, k, v, "causal()", impl="decode")
    assert capability.may_read_in_place("auto", q, k, v)
    assert not capability.may_read_in_place("decode", q, k, v)
    meta = torch.empty(1, HEADS, 9, 16, device="meta")
    assert not capability.may_read_in_place("auto", meta, k, v)


def permuted(x):
    """The same numbers, the last axis but one the fastest in memory."""
    return x.mT.contiguous().mT


def listed_pass():
    """Three of nine rows of each batch row and class, keys by remainder, tables as numpy leaves
    them that picks columns."""
    make = np.random.default_rng(0)
    lo = np.sort(make.integers(0, 20, (2, 2, 3, 2)), axis=3).astype(np.int32)
    hi = np.stack([np.minimum(lo[..., 0] + 3, lo[..., 1]), lo[..., 1] + 5], axis=3)
    order = np.stack([make.permutation(9)[:3] for _ in range(4)]).reshape(2, 2, 3)
    key_order = np.stack([np.arange(24).reshape(6, 4).T.ravel(), np.arange(24)])
    lo, hi, order = (np.asfortranarray(x.astype(np.int32)) for x in (lo, hi, order))
    classes = (0, 0, 1, 1, 0, 0, 1, 1)
    return Pass(lo, hi, classes, key_order.astype(np.int32), order, (4,))


def test_the_kernel_gets_tables_whose_rows_lie_one_after_another(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_kernels", lambda: SimpleNamespace(decode=None))
    monkeypatch.setattr(module, "launch", lambda *given, **how: seen.append((given, how)))
    monkeypatch.setattr(module, "merge_stacked", lambda outs, lses, out: lses[0])
    monkeypatch.setattr(module, "processors", lambda device: 132)
    q, k, v = inputs(2, 9, keys=24)
    lying = loading.load_where_rows_lie(listed_pass(), q, k)
    heads = torch.zeros(1, 1, dtype=torch.int64).expand(2, HEADS)
    whole = KeyRanges(*(permuted(torch.zeros(1, 9, 2).int()) for _ in range(2)), heads, 24)
    assert not whole.lo_GNm.is_contiguous()
    rows = torch.zeros(2, 24, 2, dtype=torch.int64).mT
    places = Places(query_rows=rows[..., :9], key_rows=rows[:, :1], covers=False)
    module.decode_passes(q, k, v, [lying, (whole, places)], 1.0)
    for given, _ in seen:
        names = dict(zip(("lo", "hi", "group", "q_rows", "k_rows"), given[2][3:8], strict=True))
        assert all(x.is_contiguous() for x in names.values())
        assert all(names[x].dtype == torch.int32 for x in ("lo", "hi", "q_rows", "k_rows"))
    assert len(seen) == 2


def test_passes_by_hand_say_where_their_rows_lie():
    one = listed_pass()
    q, k, v = (x.double() for x in inputs(2, 9, keys=24))
    found = by_hand(q, k, v, [loading.load_where_rows_lie(one, q, k)], 0.3)
    loaded = loading.load(one, q, k)
    wanted = loaded.outputs(*reference(*loaded.inputs(q, k, v), loaded.ranges, 0.3)).placed()
    torch.testing.assert_close(found, wanted)
    assert found[1].isneginf().any()


@pytest.mark.parametrize(("programs", "keys", "passes"), [(8, 5000, 1), (8, 70, 1), (600, 900, 3)])
def test_parts(programs, keys, passes, monkeypatch):
    monkeypatch.setattr(module, "processors", lambda device: 132)
    q, k, _ = inputs(programs // 2, 1, keys=keys, key_heads=2)
    laid = ls.plan("causal()", 1, HEADS, keys=keys)
    ranges, places = loading.load_where_rows_lie(laid.passes[0], q, k)
    parts = module._parts(q, k, ranges, places, passes)
    assert parts == {5000: 40, 70: 1, 900: 1}[keys]


# Results on a GPU.


def check(q, k, v, laid, dtype, **how):
    found = ls.attend(q, k, v, laid, impl="decode", return_lse=True, **how)
    exact = q.double(), k.double(), v.double()
    wanted = ls.attend(*exact, laid, impl="reference", return_lse=True, **how)
    assert found[0].dtype == dtype
    assert relative(found[0], wanted[0]) < TOLERANCE[dtype]
    assert torch.equal(found[1].isneginf(), wanted[1].isneginf())
    seen = ~wanted[1].isneginf()
    assert relative(found[1][seen], wanted[1][seen]) < TOLERANCE[dtype]
    assert not found[0][~seen].any()


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("pattern", "rows", "how"), CASES)
def test_on_a_gpu(pattern, rows, how, dtype):
    q, k, v = (x.to(dtype) for x in inputs(2, rows, 64, device="cuda"))
    check(q, k, v, ls.plan(pattern, rows, HEADS, keys=KEYS, **how), dtype)


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "keys", "rows"),
    [(3, 3, 40, 70, 2), (32, 8, 128, 20000, 1), (32, 1, 80, 3000, 8), (4, 2, 248, 500, 1),
     (2, 1, 8, 5, 1), (6, 2, 112, 1, 1)],
)  # fmt: skip
def test_shapes_on_a_gpu(heads, key_heads, width, keys, rows, dtype):
    sizes = {"heads": heads, "key_heads": key_heads, "keys": keys, "device": "cuda"}
    q, k, v = (x.to(dtype) for x in inputs(2, rows, width, **sizes))
    for scale in (None, -0.2, 0.0):
        check(q, k, v, ls.plan("causal()", rows, heads, keys=keys), dtype, scale=scale)


@gpu
def test_a_pass_of_a_few_of_many_rows_on_a_gpu():
    q, k, v = inputs(2, 9, 64, keys=24, device="cuda")
    lying = loading.load_where_rows_lie(listed_pass(), q, k)
    found = module.decode_passes(q, k, v, [lying], 0.3)
    loaded = loading.load(listed_pass(), q, k)
    wanted = loaded.outputs(*reference(*loaded.inputs(q, k, v), loaded.ranges, 0.3)).placed()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@gpu
def test_global_rows_of_several_documents_on_a_gpu():
    segments = np.stack([np.zeros(KEYS, int), np.repeat([0, 1], [500, KEYS - 500])])
    q, k, v = inputs(2, KEYS, 64, device="cuda")
    how = {"segments": segments, "return_lse": True}
    pattern = "window(64) | global(0, 100, 200, 300)"
    found = ls.attend(q, k, v, pattern, **how)
    wanted = ls.attend(*(x.double() for x in (q, k, v)), pattern, impl="reference", **how)
    assert relative(found[0], wanted[0]) < TOLERANCE[torch.float32]


@gpu
def test_layouts_on_a_gpu():
    q, k, v = inputs(2, 2, 64, device="cuda")
    laid = ls.plan("window(300) | sink(4)", 2, HEADS, keys=KEYS)
    wanted = ls.attend(q, k, v, laid, impl="decode", return_lse=True)
    room = torch.full((2, KEYS + 50, KEY_HEADS, 200), torch.nan, device="cuda")
    own_k, own_v = (room[:, 25:-25, :, at : at + x.shape[3]] for at, x in ((0, k), (100, v)))
    own_k.copy_(k.transpose(1, 2))
    own_v.copy_(v.transpose(1, 2))
    views = permuted(q), own_k.transpose(1, 2), own_v.transpose(1, 2)
    torch.testing.assert_close(
        ls.attend(*views, laid, impl="decode", return_lse=True), wanted, rtol=0, atol=0
    )


@gpu
def test_what_is_not_seen_moves_nothing_on_a_gpu():
    q, k, v = inputs(1, 2, 64, device="cuda")
    mask_KM = ls.plan("ssa(64, 8)", 2, HEADS, keys=KEYS).mask()[0].any(1)
    seen = torch.from_numpy(mask_KM).view(KEY_HEADS, -1, KEYS).any(1).to("cuda")
    wanted = ls.attend(q, k, v, "ssa(64, 8)", impl="decode")
    for x in (k, v):
        x[0, ~seen] = torch.nan
    assert torch.equal(ls.attend(q, k, v, "ssa(64, 8)", impl="decode"), wanted)


@gpu
def test_it_is_taken_for_new_tokens_without_gradients_on_a_gpu():
    q, k, v = inputs(1, 1, 64, device="cuda")
    assert "kernel decode" in ls.explain(q, k, v, "window(64)")
    torch.testing.assert_close(
        ls.attend(q, k, v, "strided(8)"), ls.attend(q, k, v, "strided(8)", impl="decode")
    )
    q.requires_grad_()
    assert "not decode: has no backward" in ls.explain(q, k, v, "window(64)")
    assert ls.attend(q, k, v, "window(64)").requires_grad
    with pytest.raises(Refusal, match="has no backward"):
        ls.attend(q, k, v, "window(64)", impl="decode")
    q, k, v = inputs(1, 9, 64, device="cuda")
    with pytest.raises(Refusal, match="takes up to 8 query rows, got 9"):
        ls.attend(q, k, v, "window(64)", impl="decode")


@gpu
def test_new_lengths_are_not_compiled_on_a_gpu():
    def one(keys):
        q, k, _ = (x.bfloat16() for x in inputs(1, 1, 64, keys=keys, device="cuda"))
        return ls.attend(q, k, k, "window(300) | sink(4)", impl="decode")

    def compiled():
        return [name for name in launch._compiled if name[0] == id(module._kernels().decode)]

    one(3000)
    before = len(compiled())
    assert before
    for keys in (3001, 3008, 4096, 5000):
        one(keys)
    assert len(compiled()) == before


@gpu
def test_a_graph_can_be_captured():
    q, k, v = inputs(1, 1, 64, device="cuda")
    laid = ls.plan("window(300) | sink(4)", 1, HEADS, keys=KEYS)
    wanted = ls.attend(q, k, v, laid, impl="decode")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ls.attend(q, k, v, laid, impl="decode")
    found.zero_()
    graph.replay()
    assert torch.equal(found, wanted)
