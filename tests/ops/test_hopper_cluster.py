"""Programs of Hopper's forward that read keys together: which tasks, machine code, results."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.ops import cases
from tests.ops.test_flex import gpu, shifted, tensors, to, window
from tests.ops.test_hopper import GPU_CASES, here, on_gpu
from tests.ops.test_hopper_plan import (
    PLANNED,
    alternating,
    forget_plans,
    gaps,
    plan,
    split_keys,
)

import longspan as ls
from longspan.ops.kernels import _hopper_cluster, _hopper_plan
from longspan.ops.kernels._hopper_cluster import Unknown, compiled, edited
from longspan.ops.ranges import KeyRanges

module = importlib.import_module("longspan.ops.kernels.hopper")

COPY = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
ARRIVAL = "mbarrier.arrive.shared::cta.b64 _,"


def code(count=2, copy=COPY, more=""):
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
	@%p9 cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd1, {{%r5, %r3}}], [%r6];
	cp.async.bulk.commit_group;{more}
}}
"""


def test_copies_of_keys_go_to_all_programs_and_arrivals_to_each():
    before, after = (x.splitlines() for x in (code(), edited(code(), 2, 1)))
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
    found = edited(code(count=4), 4, 1)
    assert "mov.b16 all, 15;" in found
    assert [f"xor.b32 other, own, {k};" in found for k in range(5)] == [False, *[True] * 3, False]
    assert found.count("mbarrier.arrive.shared::cluster.b64") == 3


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (code(count=3), "0 for 2 programs"),
        (code(copy="cp.async.bulk.tensor.4d.shared::cluster.global.new"), "0 of keys or values"),
        (code().replace("forward_param_0;", "forward_param_2;"), "0 were found of queries"),
        # A query that comes through another register would go to all programs.
        (code().replace("[%rd4,", "[%rd9,"), "0 were found of queries"),
        (code(more=f"\n\t@%p4 {COPY} [%r1], [%rd4, {{%r1}}], [%r2];"), "2 were found of queries"),
        # Others that would be left as they are.
        (code(more=f"\n\t@%p4 {COPY}.new [%r1], [%rd3, {{%r1}}], [%r2];"), "of 3 copies"),
        (code(more=f"\n\t@!%p4 {COPY} [%r1], [%rd3, {{%r1}}], [%r2];"), "of 3 copies"),
        (code(more=f"\n\t@%p4 {ARRIVAL} [%r1], %r2;"), "of 3 arrivals"),
        (code(more=f"\n\t@!%p4 {ARRIVAL} [%r1], 2;"), "of 3 arrivals"),
        (code(more=f"\n\t{ARRIVAL} [%r1], 2;"), "of 3 arrivals"),
        (code(more=f"\n\t@%p4 {ARRIVAL} [%r1], 7;"), "of 3 arrivals"),
        (code(more="\n\t@%p4 mbarrier.arrive_drop.shared::cta.b64 _, [%r1];"), "of 3 arrivals"),
        ("", "of 0 copies"),
    ],
)
def test_other_machine_code_is_refused(text, word):
    with pytest.raises(Unknown, match="not what clusters of programs expect") as error:
        edited(text, 2, 1)
    assert word in str(error.value)


class Triton:
    """Compiles a kernel that has a name, as Triton 3.6 does."""

    def __init__(self, monkeypatch):
        self.runtime = SimpleNamespace(add_stages_inspection_hook=None)
        self.knobs = SimpleNamespace(runtime=self.runtime)
        self.__version__ = "3.6.0"
        monkeypatch.setitem(sys.modules, "triton", self)

    def make(self, name="forward", text=""):
        stages, metadata = {"ptx": lambda source, _: source}, {"name": name, "num_ctas": 1}
        if hook := self.runtime.add_stages_inspection_hook:
            hook("backend", stages, "options", "language", 90)
        self.text = stages["ptx"](text or code(), metadata)
        return SimpleNamespace(metadata=SimpleNamespace(num_ctas=metadata["num_ctas"]))

    def warmup(self, *_, grid):
        assert grid == (3, 1, 1)
        return self.make()


def compile_clusters(kernel):
    return compiled(kernel, (3, 1, 1), (), programs=2, copies=1)


def test_a_kernel_is_edited_while_it_is_compiled(monkeypatch):
    triton, asked = Triton(monkeypatch), []
    earlier = triton.runtime.add_stages_inspection_hook = lambda *given: asked.append(given)
    assert compile_clusters(triton).metadata.num_ctas == 2
    assert triton.text == edited(code(), 2, 1)
    assert [given[0] for given in asked] == ["backend"]
    assert triton.runtime.add_stages_inspection_hook is earlier
    assert triton.make().metadata.num_ctas == 1
    assert triton.text == code()


def test_nothing_else_is_edited_meanwhile(monkeypatch):
    triton = Triton(monkeypatch)
    found = []

    def warmup(*_, grid):
        # Another kernel; and one of the same name in another thread, which is not as expected.
        found.append(triton.make("other", "other").metadata.num_ctas)
        thread = threading.Thread(target=lambda: found.append(triton.make("forward", "mine")))
        thread.start()
        thread.join()
        assert triton.text == "mine"
        return triton.make()

    assert compile_clusters(SimpleNamespace(warmup=warmup)).metadata.num_ctas == 2
    assert found[0] == found[1].metadata.num_ctas == 1


@pytest.mark.parametrize("why", ["hook", "machine code", "nothing compiled"])
def test_what_was_not_edited_is_not_launched(why, monkeypatch):
    triton, other = Triton(monkeypatch), object()

    def warmup(*_, grid):
        if why == "hook":
            triton.runtime.add_stages_inspection_hook = None
            found = triton.make()
            triton.runtime.add_stages_inspection_hook = other
            return found
        return triton.make("forward", "mine") if why == "machine code" else None

    with pytest.raises(Unknown):
        compile_clusters(SimpleNamespace(warmup=warmup))
    # A hook that somebody has set meanwhile stays.
    assert triton.runtime.add_stages_inspection_hook is (other if why == "hook" else None)


def test_after_a_failure_it_goes_on_without(monkeypatch):
    monkeypatch.setattr(_hopper_cluster, "_failed", threading.Event())
    monkeypatch.setattr(_hopper_cluster, "edition", lambda: 7)
    grids = []

    def launched(_, grid, args, *, compiled, **__):
        grids.append(grid)
        if compiled is not None:
            raise Unknown("not so")
        args[5].copy_(args[0])

    q, k, v = tensors(1, 4, 1, 1000, 1000, 128, 128)
    with_launch(monkeypatch, launched)
    ready = module._Ready(plan(window(1000, 100, heads=4), 1, 4, 1), None, 0.3)
    with pytest.warns(RuntimeWarning, match="not so; hopper goes on without"):
        out, _ = ready.forward(q, k, v)
    assert torch.equal(out, q)
    assert grids == [(16, 1, 1), (32, 1, 1)]
    ready.forward(q, k, v)
    assert grids[2:] == [(32, 1, 1)]


@pytest.mark.parametrize(("version", "known"), [("3.6.0", True), ("3.7.0", False), (None, False)])
def test_only_versions_of_triton_that_have_run(version, known, monkeypatch):
    fake = version and SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "triton", fake)
    assert (_hopper_cluster.edition.__wrapped__() > 0) == known


def test_without_its_text_there_are_none(monkeypatch):
    Triton(monkeypatch)
    monkeypatch.setattr(_hopper_cluster, "__file__", "archive.zip/longspan/_hopper_cluster.py")
    assert _hopper_cluster.edition.__wrapped__() == 0


# Tasks.


def read(made, group, batch, *, shared):
    """What each task reads: batch row and head of its keys, and the first keys of its tiles."""
    for task in made.tasks.tolist():
        first, tiles = task[3], task[5]
        columns = [0, 2] if made.paired else [0]
        keys = made.entries[first : first + tiles, columns].tolist()
        # That of the first one is read from the task.
        keys[0] = [task[6], task[8]] if made.paired else [task[6]]
        yield 0 if shared else task[2] % batch, task[1] // group, keys


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", PLANNED)
def test_tasks_that_follow_each_other_read_the_same(name, shared, parts, monkeypatch):
    build, batch, heads, key_heads = PLANNED[name]
    if parts > 1:
        split_keys(monkeypatch, parts)
    made = plan(build(), batch, heads, key_heads, shared=shared)
    if made.together:
        every = list(read(made, heads // key_heads, batch, shared=shared))
        assert every[::2] == every[1::2]


def test_a_part_without_keys_reads_something_else(monkeypatch):
    """A task of one tile that is split has parts without any, which name the same entry."""
    split_keys(monkeypatch, 8)
    lo_GNm, hi_GNm = torch.zeros(2, 2, 100, 1, dtype=torch.int32)
    hi_GNm[0], hi_GNm[1] = 16_384, 20
    ranges = KeyRanges(lo_GNm, hi_GNm, torch.tensor([[0, 0, 1]]), 16_384)
    made = plan(ranges, 1, 3, 1)
    assert made.parts == 8
    every = list(read(made, 3, 1, shared=False))
    alike = [(x[3], x[5]) for x in made.tasks.tolist()]
    assert alike[::2] == alike[1::2]
    assert every[::2] != every[1::2]
    assert not made.together


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

    def launched(_, found, args, *, alike, compiled, **__):
        assert found == (grid, 1, 1)
        fetched, edition = args[7], args[-1]
        assert (args[12], args[-2]) == (32, cluster)
        assert (fetched == 0).all()
        assert len(fetched) == (8 + 8 * grid if cluster > 1 else 1)
        assert edition == (7 if cluster > 1 else 0)
        assert alike[-1] == cluster
        assert (compiled is None) == (cluster == 1)
        # Two times 64 rows of queries, 64 columns at a time.
        assert compiled is None or compiled.keywords == {"programs": 2, "copies": 4}

    with_launch(monkeypatch, launched)
    monkeypatch.setattr(module, "processors", lambda _: processors)
    monkeypatch.setattr(_hopper_cluster, "_failed", threading.Event())
    monkeypatch.setattr(_hopper_cluster, "edition", lambda: 7 if available else 0)
    module._Ready(made, None, 0.3).forward(q, k, v)


def with_launch(monkeypatch, launched):
    kernels = SimpleNamespace(forward=None, described=lambda x, *_: x)
    monkeypatch.setattr(module, "_kernels", lambda: kernels)
    monkeypatch.setattr(module, "_tiles", lambda: kernels)
    monkeypatch.setattr(module, "launch", launched)
    monkeypatch.setattr(module, "processors", lambda _: 132)


# Results on a GPU.

# Of those at widths above 64.
TOGETHER = {
    "rows share, alike",
    "window of 128",
    "odd, 96",
    "dense",
    "per head",
    "sink",
    "blocks of 64",
    "blocks of 64, many",
    "blocks of 64, wider values",
    "global rows",
    "many tasks",
}


def clusters_here():
    here()
    if not _hopper_cluster.available():
        pytest.skip("needs a version of Triton whose clusters have run")


def as_apart(call, monkeypatch, *, used=True):
    """Whether it finds the same, to the last bit, as where no programs read together."""
    clusters = []
    known = module.launch

    def launched(kernel, grid, args, **about):
        if kernel is module._kernels().forward:
            clusters.append(args[-2])
        return known(kernel, grid, args, **about)

    monkeypatch.setattr(module, "launch", launched)
    with torch.no_grad():
        found = call()
        assert (max(clusters) > 1) == used
        clusters.clear()
        monkeypatch.setattr(_hopper_cluster, "available", lambda: False)
        expected = call()
    assert max(clusters) == 1
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_together_as_apart(name, dtype, monkeypatch):
    clusters_here()
    ranges, q, k, v = on_gpu(name, dtype)
    call = lambda: module.hopper(q, k, v, ranges, 0.125)  # noqa: E731
    as_apart(call, monkeypatch, used=name in TOGETHER)


@gpu
@pytest.mark.parametrize("processors", [1, 2, 7, 132])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "text",
    [
        "window(300)",
        "window(1)",
        "chunk(64)",
        "chunk(500)",
        "causal()",
        "window(200) | sink(100)",
        # Further keys behind the others.
        "window(200) | global(0, 700, 2000)",
    ],
)
def test_again_and_again(text, batch, processors, monkeypatch):
    clusters_here()
    monkeypatch.setattr(module, "processors", lambda _: processors)
    n = 9001 if processors > 7 else 1501
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(batch, 8, 2, n, n, 128, 128))

    def call():
        every = [ls.attend(q, k, v, text, impl="hopper", return_lse=True) for _ in range(20)]
        for one in every[1:]:
            for x, y in zip(one, every[0], strict=True):
                assert torch.equal(x, y)
        return every[0]

    as_apart(call, monkeypatch)


@gpu
def test_pairs_of_heads_together(monkeypatch):
    """Four heads of two programs, tiles of two halves."""
    clusters_here()
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(2, 8, 2, 1400, 4096, 128, 128))
    ranges = to(alternating(1400, 4096, 9, 8), "cuda")
    assert _hopper_plan.plan_of(ranges, (2, 8), (2, 2), 512).paired
    as_apart(lambda: module.hopper(q, k, v, ranges, 0.125), monkeypatch)


@gpu
def test_parts_of_keys_together(monkeypatch):
    clusters_here()
    split_keys(monkeypatch, 8)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 8, 2, 700, 4096, 128, 128))
    ranges = to(window(700, 3000, keys=4096, heads=8), "cuda")
    as_apart(lambda: module.hopper(q, k, v, ranges, 0.125), monkeypatch)


@gpu
def test_streams_side_by_side_and_graphs(monkeypatch):
    """Clusters wait for room for all of their programs, which others may hold."""
    clusters_here()
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 8, 2, 9001, 9001, 128, 128))

    def attend():
        return ls.attend(q, k, v, "causal()", impl="hopper")

    def call():
        expected = attend()
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        found = []
        for _ in range(5):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(attend())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.append(attend())
        for _ in range(3):
            found[-1].zero_()
            graph.replay()
            assert torch.equal(found[-1], expected)
        return found

    as_apart(call, monkeypatch)


@gpu
@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_every_place_is_edited(pairs, further, monkeypatch):
    clusters_here()
    found = []
    known = _hopper_cluster.edited

    def spied(ptx, programs, copies):
        found.append(known(ptx, programs, copies))
        return found[-1]

    # Compiled anew.
    text = Path(_hopper_cluster.__file__).read_bytes()
    monkeypatch.setattr(_hopper_cluster, "edited", spied)
    monkeypatch.setattr(_hopper_cluster, "edition", lambda: len(text) + time.time_ns() % 2**20)
    monkeypatch.setattr(importlib.import_module("longspan.ops.launch"), "_compiled", {})
    wide = "window(200) | global(0, 700, 2000)" if further else "window(300)"
    patterns = {False: wide, True: "window(64)" + (" | global(0, 700, 2000)" if further else "")}
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(1, 8, 2, 9001, 9001, 128, 128))
    monkeypatch.setattr(_hopper_plan, "_IN_VAIN", 0.0 if pairs else 1e9)
    monkeypatch.setattr(_hopper_plan, "_WORTH", 1e9)
    forget_plans(monkeypatch)
    with torch.no_grad():
        ls.attend(q, k, v, patterns[pairs], impl="hopper")
    (text,) = found
    assert text.count(".multicast::cluster") == 8 * (1 + pairs) * (1 + further)
    assert text.count("mapa.") == (16 if pairs else 20)
