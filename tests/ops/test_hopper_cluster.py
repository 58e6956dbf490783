"""Programs of Hopper's forward that read keys together: which tasks, machine code, results."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tests.ops import cases
from tests.ops.test_flex import gpu, shifted, tensors, window
from tests.ops.test_hopper import GPU_CASES, here, on_gpu
from tests.ops.test_hopper_plan import PLANNED, forget_plans, gaps, plan

import longspan as ls
from longspan.ops.kernels import _hopper_cluster, _hopper_plan
from longspan.ops.kernels._hopper_cluster import compiled, edited

module = importlib.import_module("longspan.ops.kernels.hopper")

COPY = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
ARRIVAL = "mbarrier.arrive.shared::cta.b64 _,"


def code(count=2, copy=COPY):
    """Queries come from the first tensor, keys from the second one."""
    return f"""
.visible .entry forward(
	.param .align 64 .b8 forward_param_0[128],
	.param .u32 forward_param_1,
	.param .align 64 .b8 forward_param_9[128]
)
{{
	mov.b64 	%rd27, forward_param_0;
	mov.b64 	%rd30, forward_param_9;
	cvta.param.u64 	%rd3, %rd30;
	cvta.param.u64 	%rd4, %rd27;
	@%p4 {COPY} [%r93], [%rd4, {{%r94, %r95, %r96, %r97}}], [%r92];
	@%p6 {copy} [%r106], [%rd3, {{%r94, %r33, %r159, %r34}}], [%r105];
	@%p1 {ARRIVAL} [%r16];
	@%p2 {ARRIVAL} [%r17], {count};
	@%p15 mbarrier.arrive.expect_tx.shared.b64 _, [%r155], 32768;
}}
"""


def test_copies_of_keys_go_to_all_programs_and_arrivals_to_each():
    before, after = (x.splitlines() for x in (code(), edited(code(), 2)))
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [old.split()[0] for old, _ in changed] == ["@%p6", "@%p2"]
    (_, copy), (_, arrival) = changed
    assert copy.strip() == (
        "{ .reg .b16 all; mov.b16 all, 3; @%p6 " + COPY + ".multicast::cluster [%r106], "
        "[%rd3, {%r94, %r33, %r159, %r34}], [%r105], all; }"
    )
    assert arrival.strip() == (
        f"@%p2 {ARRIVAL} [%r17]; {{ .reg .b32 own, other; mov.u32 own, %cluster_ctarank; "
        "xor.b32 other, own, 1; mapa.shared::cluster.u32 other, %r17, other; "
        "@%p2 mbarrier.arrive.shared::cluster.b64 _, [other]; }"
    )


def test_four_programs():
    found = edited(code(count=4), 4)
    assert "mov.b16 all, 15;" in found
    assert [f"xor.b32 other, own, {k};" in found for k in range(5)] == [False, *[True] * 3, False]
    assert found.count("mbarrier.arrive.shared::cluster.b64") == 3


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (code(count=3), "0 arrivals for 2 programs"),
        (code(copy="cp.async.bulk.tensor.4d.shared::cluster.global.new"), "0 of keys or values"),
        (code().replace("forward_param_0;", "forward_param_2;"), "0 of queries and 2 of keys"),
        ("", "0 copies"),
    ],
    ids=["arrivals", "copies", "queries", "nothing"],
)
def test_other_machine_code_is_refused(text, word):
    with pytest.raises(RuntimeError, match="not what clusters expect") as error:
        edited(text, 2)
    assert word in str(error.value)


def test_one_kernel_is_edited_while_it_is_compiled(monkeypatch):
    asked = []
    runtime = SimpleNamespace(add_stages_inspection_hook=lambda *given: asked.append(given))
    earlier = runtime.add_stages_inspection_hook
    fake = SimpleNamespace(knobs=SimpleNamespace(runtime=runtime), __version__="3.6.0")
    monkeypatch.setitem(sys.modules, "triton", fake)

    def made(name):
        stages, metadata = {"ptx": lambda source, _: source}, {"name": name, "num_ctas": 1}
        runtime.add_stages_inspection_hook("backend", stages, "options", "language", 90)
        return stages["ptx"](code(), metadata), metadata["num_ctas"]

    with compiled(2):
        assert made("forward") == (edited(code(), 2), 2)
        assert made("backward") == (code(), 1)
    assert len(asked) == 2
    assert asked[0][0] == "backend"
    assert runtime.add_stages_inspection_hook is earlier
    with pytest.raises(KeyError), compiled(2):
        raise KeyError
    assert runtime.add_stages_inspection_hook is earlier
    with compiled(1):
        assert runtime.add_stages_inspection_hook is earlier


@pytest.mark.parametrize(("version", "known"), [("3.6.0", True), ("3.7.0", False), (None, False)])
def test_only_versions_of_triton_that_have_run(version, known, monkeypatch):
    fake = version and SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "triton", fake)
    assert _hopper_cluster.available.__wrapped__() == known


# Tasks.


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", PLANNED)
def test_tasks_that_follow_each_other_read_the_same(name, shared):
    build, batch, heads, key_heads = PLANNED[name]
    made = plan(build(), batch, heads, key_heads, shared=shared)
    read = [
        # Batch row of the keys, key head, first tile and how many.
        (0 if shared or batch == 1 else task[2], task[1] * key_heads // heads, task[3], task[5])
        for task in made.tasks.tolist()
    ]
    assert made.together == (read[::2] == read[1::2])


@pytest.mark.parametrize(
    ("ranges", "shape", "together"),
    [
        (window(1000, 100, heads=8), (1, 8, 2), True),
        (window(1000, 100, heads=8), (3, 8, 2), True),
        (window(1000, 100, heads=8), (1, 8, 8), False),
        (window(1000, 100, heads=3), (1, 3, 1), False),
        (window(1000, 100, heads=3), (2, 3, 1), False),
        (shifted(1000, 256, heads=8), (1, 8, 2), True),
        (gaps(), (1, 4, 2), False),
        (cases.causal(500, 4), (1, 4, 1), True),
    ],
    ids=["GQA", "batch", "MHA", "three heads", "three heads, batch", "half", "per head", "causal"],
)
def test_which_patterns_read_together(ranges, shape, together):
    assert plan(ranges, *shape).together == together


@pytest.mark.parametrize(
    ("width", "key_heads", "available", "processors", "grid"),
    [
        (128, 1, True, 132, 16),
        (128, 1, True, 7, 3),
        (128, 1, True, 1, 1),
        (104, 1, True, 132, 16),
        (64, 1, True, 132, 32),
        (128, 4, True, 132, 32),
        (128, 1, False, 132, 32),
    ],
)
def test_launch(width, key_heads, available, processors, grid, monkeypatch):
    q, k, v = tensors(1, 4, key_heads, 1000, 1000, width, width)
    made = plan(window(1000, 100, heads=4), 1, 4, key_heads)
    cluster = 2 if grid in (16, 3, 1) else 1

    def launched(_, found, args, *, alike, compiling, **__):
        assert found == (grid, 1, 1)
        fetched, edition = args[7], args[-1]
        assert (args[12], args[-2]) == (32, cluster)
        assert (fetched == 0).all()
        assert len(fetched) == (8 + 8 * grid if cluster > 1 else 1)
        assert edition == (_hopper_cluster.EDITION if cluster > 1 else 0)
        assert alike[-1] == cluster
        assert compiling.args == (cluster,)

    kernels = SimpleNamespace(forward=None, described=lambda x, *_: x)
    monkeypatch.setattr(module, "_kernels", lambda: kernels)
    monkeypatch.setattr(module, "_tiles", lambda: kernels)
    monkeypatch.setattr(module, "launch", launched)
    monkeypatch.setattr(module, "processors", lambda _: processors)
    monkeypatch.setattr(_hopper_cluster, "available", lambda: available)
    module._Ready(made, None, 0.3).forward(q, k, v)


# Results on a GPU.


def apart(call, monkeypatch):
    """What it finds where no programs read together, and whether some do."""
    used = []
    known = module.launch

    def launched(*args, compiling=nullcontext, **about):
        used.append(getattr(compiling, "args", (1,))[0])
        return known(*args, compiling=compiling, **about)

    monkeypatch.setattr(module, "launch", launched)
    with torch.no_grad():
        together = call()
        expected_use = max(used)
        monkeypatch.setattr(_hopper_cluster, "available", lambda: False)
        used.clear()
        found = call()
    assert max(used) == 1
    return together, found, expected_use > 1


def clusters_here():
    here()
    if not _hopper_cluster.available():
        pytest.skip("needs a version of Triton whose clusters have run")


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_together_as_apart(name, dtype, monkeypatch):
    clusters_here()
    ranges, q, k, v = on_gpu(name, dtype)
    found, expected, _ = apart(lambda: module.hopper(q, k, v, ranges, 0.125), monkeypatch)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


FAR = [
    "window(300)",
    "chunk(500)",
    "causal()",
    "window(200) | sink(100)",
    "window(200) | global(0, 700, 2000)",
    "random_blocks(64, 8)",
]


@gpu
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("text", FAR)
def test_again_and_again(text, batch, monkeypatch):
    clusters_here()
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(batch, 8, 2, 9001, 9001, 128, 128))

    def call():
        every = [ls.attend(q, k, v, text, impl="hopper", return_lse=True) for _ in range(20)]
        for one in every[1:]:
            for x, y in zip(one, every[0], strict=True):
                assert torch.equal(x, y)
        return every[0]

    found, expected, used = apart(call, monkeypatch)
    assert used or text == "random_blocks(64, 8)"
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@gpu
def test_pairs_of_heads_together(monkeypatch):
    """Four heads of two programs, tiles of two halves."""
    clusters_here()
    forget_plans(monkeypatch)
    monkeypatch.setattr(_hopper_plan, "_FEW", 1)
    _, shape = GPU_CASES["blocks of 64"]
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(2, 8, 2, *shape[3:]))
    ranges = on_gpu("blocks of 64", torch.bfloat16)[0]
    ranges = type(ranges)(
        ranges.lo_GNm,
        ranges.hi_GNm,
        torch.zeros(2, 8, dtype=torch.int64, device="cuda"),
        ranges.keys,
    )
    found, expected, used = apart(lambda: module.hopper(q, k, v, ranges, 0.125), monkeypatch)
    assert used
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@gpu
def test_streams_side_by_side(monkeypatch):
    """Clusters wait for room for all of their programs, which others may hold."""
    clusters_here()
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 8, 2, 9001, 9001, 128, 128))
    with torch.no_grad():
        expected = ls.attend(q, k, v, "causal()", impl="hopper")
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        found = []
        for _ in range(5):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(ls.attend(q, k, v, "causal()", impl="hopper"))
        torch.cuda.synchronize()
    assert all(torch.equal(x, expected) for x in found)
