"""Passes with one backward: the gradients of the oracle, from the joint output and log-sum-exp."""

from __future__ import annotations

import math
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.ops import test_cudnn, test_hopper
from tests.ops.cases import added_in_place
from tests.ops.test_flex import gpu, relative

import longspan as ls
from longspan.ops import capability, joint, loading, measured, run
from longspan.ops.loaded import Loaded
from longspan.ops.views import Views

N, HEADS, KEY_HEADS = 384, 4, 2
# The first rows of one batch row are padding, the last ones of the other.
SEGMENTS = np.stack([np.repeat([-1, 0, 1], [40, 200, 144]), np.repeat([0, 1, -1], [200, 181, 3])])
PATTERNS = {
    "rows of one remainder for each head": "longnet([64, 128, 384], [1, 2, 4])",
    "no pass of all rows in place": "longnet([64, 384], [2, 4])",
    "a few rows": "longformer(64, tokens=[0, 100, 200])",
    "rows by remainder": "window(32) | dilated(64, 4)",
    "some heads": "heads(window(64), window(32) | dilated(64, 4))",
    "some heads, some rows": "heads(window(64), longnet([64, 256], [1, 4]))",
}


def passes_of(text, batch, segments):
    plan = ls.plan(ls.parse(text), N, HEADS, segments=segments)
    q, k = (torch.zeros(batch, heads, N, 8) for heads in (HEADS, KEY_HEADS))
    return plan, [loading.load(one, q, k) for one in plan.passes]


def made(batch, width, n=N, heads=HEADS, key_heads=KEY_HEADS, **how):
    make = torch.Generator(how.get("device", "cpu")).manual_seed(0)
    return [
        torch.randn(batch, h, n, width, generator=make, **how).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


def attend(inputs, plan, impl, **how):
    q, k, v = inputs
    return ls.attend(q, k, v, plan, impl=impl, **how)


def both(inputs, plan, impl, *, use_lse, poison=math.nan):
    """Output, log-sum-exp and gradients; those of rows without keys are poisoned."""
    out, lse = attend(inputs, plan, impl, return_lse=True)
    make = torch.Generator().manual_seed(1)
    slopes = [
        torch.randn(x.shape, generator=make, dtype=torch.float64).to(x.device, x.dtype)
        for x in (out, lse)
    ]
    empty = lse == -math.inf
    slopes[0] = slopes[0].masked_fill(empty[..., None], poison)
    slopes[1] = slopes[1].masked_fill(empty, poison)
    each = 2 if use_lse else 1
    grads = torch.autograd.grad([out, lse][:each], inputs, slopes[:each])
    return out.detach(), lse.detach(), *grads


@pytest.fixture
def library(monkeypatch):
    """The stand-in for cudnn.flex_attention on a CPU; returns what its backward was given."""
    test_cudnn.stand_in(monkeypatch)
    on_any = [replace(x, devices=()) if x.name == "cudnn" else x for x in capability.KERNELS]
    monkeypatch.setattr(capability, "KERNELS", on_any)
    given = []
    execute = test_cudnn.FlexAttentionBwd.execute

    def noted(self, *tensors, **how):
        given.append(tensors)
        execute(self, *tensors, **how)

    monkeypatch.setattr(test_cudnn.FlexAttentionBwd, "execute", noted)
    return given


@pytest.mark.parametrize(
    ("batch", "packed", "use_lse"),
    [(1, False, False), (1, False, True), (2, False, True), (2, True, True)],
)
@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
def test_over_a_stand_in(text, batch, packed, use_lse, library):
    plan, loaded = passes_of(text, batch, SEGMENTS[:batch] if packed else None)
    inputs = made(batch, 8, dtype=torch.float64)
    found = both(inputs, plan, "cudnn", use_lse=use_lse)
    wanted = both(inputs, plan, "reference", use_lse=use_lse, poison=0.0)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    # No pass has a gradient of its log-sum-exp, unless the joint one has.
    assert len(library) == len(loaded)
    if len(loaded) > 1:
        assert {tensors[-1] is None for tensors in library} == {not use_lse}
    assert (found[1] == -math.inf).any() == packed


class Places:
    """Halves that write gradients where they belong, in the place of a kernel for GPUs."""

    def __init__(self, halves, seen):
        self.halves, self.seen = halves, seen

    def forward(self, *inputs):
        return self.halves.forward(*inputs)

    def backward(self, *given, into=(), after=None):
        self.seen.append(after)
        return added_in_place(self.halves.backward(*given), into, after)


@pytest.mark.parametrize("least", [8, N])
@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
def test_gradients_of_keys_are_added_in_place(text, use_lse, least, library, monkeypatch):
    monkeypatch.setattr(joint, "_LEAST", least)
    plan, _ = passes_of(text, 1, None)
    on_places = [replace(x, places=True) if x.name == "cudnn" else x for x in capability.KERNELS]
    monkeypatch.setattr(capability, "KERNELS", on_places)
    seen, marks = [], []
    load_halves = capability.Capability.load_halves
    monkeypatch.setattr(
        capability.Capability,
        "load_halves",
        lambda self: lambda *given: Places(load_halves(self)(*given), seen),
    )
    monkeypatch.setattr(joint, "_now", lambda _: marks.append(len(seen)) or len(seen))
    inputs = made(1, 8, dtype=torch.float64)
    found = both(inputs, plan, "cudnn", use_lse=use_lse)
    wanted = both(inputs, plan, "reference", use_lse=use_lse, poison=0.0)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    # Each pass that adds waits for the one before it that wrote or added.
    waited = [after for after in seen if after is not None]
    assert waited == marks[: len(waited)]
    # Other passes have an order of keys, or some of the key heads.
    adding = ["rows by remainder", "some heads", *["a few rows"] * (least > 8)]
    assert bool(waited) == (text in [PATTERNS[name] for name in adding])


def test_what_the_patterns_are_here_for():
    kinds = {name: passes_of(text, 1, None)[1] for name, text in PATTERNS.items()}
    assert all(len(loaded) > 1 for loaded in kinds.values())
    assert any(isinstance(one, Views) for one in kinds["rows by remainder"])
    assert any(isinstance(one, Views) for one in kinds["some heads"])
    _, packed = passes_of(PATTERNS["some heads, some rows"], 2, SEGMENTS)
    few = [one for one in packed if isinstance(one, Loaded)]
    assert [one.heads is None for one in few] == [True, False]
    assert few[1].queries is not None
    assert not few[1].queries.table.full[0]


def test_of_the_log_sum_exp_alone(library):
    plan, _ = passes_of(PATTERNS["a few rows"], 1, None)
    inputs = made(1, 8, dtype=torch.float64)
    results = []
    for impl in ("cudnn", "reference"):
        _, lse = attend(inputs, plan, impl, return_lse=True)
        results.append(torch.autograd.grad(lse.sin().sum(), inputs, allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            0 * inputs[2] if a is None else a, 0 * inputs[2] if b is None else b
        )


def test_inputs_without_gradients(library):
    plan, _ = passes_of(PATTERNS["rows of one remainder for each head"], 1, None)
    q, k, v = made(1, 8, dtype=torch.float64)
    for needed in ([q], [k, v]):
        for x in (q, k, v):
            x.requires_grad_(any(x is y for y in needed))
        results = [
            torch.autograd.grad(attend((q, k, v), plan, impl).sin().sum(), needed)
            for impl in ("cudnn", "reference")
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_outputs_of_passes_are_not_held(library, monkeypatch):
    plan, loaded = passes_of(PATTERNS["rows of one remainder for each head"], 1, None)
    outs = []
    merge_parts = joint.merge_parts

    def noted(parts, **how):
        outs.extend(weakref.ref(part.out) for part in parts)
        return merge_parts(parts, **how)

    monkeypatch.setattr(joint, "merge_parts", noted)
    inputs = made(1, 8, dtype=torch.float64)
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attend(inputs, plan, "cudnn")
    assert len(outs) == len(loaded) == 3
    assert not any(one() is not None for one in outs)
    # Queries, keys and values of every pass, one output and one log-sum-exp.
    assert len(kept) == 3 * len(loaded) + 2
    assert sum(x.shape == out.shape and x.data_ptr() == out.data_ptr() for x in kept) == 1


def test_other_kernels_merge_as_before(monkeypatch):
    monkeypatch.setattr(run, "attend_jointly", lambda *_: pytest.fail("no halves"))
    plan, _ = passes_of(PATTERNS["some heads, some rows"], 2, None)
    inputs = made(2, 8, dtype=torch.float64)
    found, wanted = (both(inputs, plan, impl, use_lse=True) for impl in ("tiled", "reference"))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_rows_that_no_pass_sees():
    for batch in (1, 2):
        for text in PATTERNS.values():
            _, loaded = passes_of(text, batch, SEGMENTS[:batch])
            batches = [one.step if isinstance(one, Views) else batch for one in loaded]
            index = joint.unseen(loaded, batches)
            empty = torch.zeros(batch, HEADS, N, dtype=torch.bool)
            empty[index] = True
            wanted = torch.from_numpy(SEGMENTS[:batch, None] < 0).expand_as(empty)
            assert torch.equal(empty, wanted)
            assert joint.unseen(loaded, batches) is index
            _, loaded = passes_of(text, batch, None)
            batches = [one.step if isinstance(one, Views) else batch for one in loaded]
            assert joint.unseen(loaded, batches) is None


# On a GPU with the library.

GPU_PATTERNS = [
    "longnet([256, 1024, 4096], [1, 2, 4])",
    "longnet([256, 1024], [2, 4])",
    "longformer(256, tokens=[0, 100, 2000])",
    "window(256) | global(0, 100, 2000)",
    "window(256) | global(0, 1000, causal=true)",
    "bigbird(128, 3)",
    "sda(1024, 8)",
    "longmixed(256, 8)",
    "window(128) | dilated(256, 4)",
    "window(128) | sda.neighborhood(1024, 8)",
    "heads(window(256), window(128) | dilated(256, 4))",
    "heads(window(256), longnet([256, 1024], [1, 4]))",
]


def need(impl="cudnn"):
    if impl == "hopper":
        test_hopper.here()
    elif not test_cudnn.installed(test_cudnn.cudnn_module):
        pytest.skip("needs cudnn.flex_attention")


each_kernel = pytest.mark.parametrize("impl", ["cudnn", "hopper"])


@gpu
@each_kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("text", GPU_PATTERNS)
def test_on_a_gpu(text, batch, packed, impl):
    need(impl)
    n = 4096
    segments = None
    if packed:
        rows = [np.repeat([-1, 0, 1], [130, 2000, 1966]), np.repeat([0, 1, -1], [3000, 1093, 3])]
        segments = np.stack(rows[:batch])
    plan = ls.plan(ls.parse(text), n, HEADS, segments=segments)
    inputs = made(batch, 64, n, device="cuda", dtype=torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    # Alone at first, then on streams side by side; then without gradients, joined in place.
    for use_lse in (True, True, False):
        found = both(inputs, plan, impl, use_lse=use_lse)
        wanted = both(exact, plan, "reference", use_lse=use_lse, poison=0.0)
        with torch.no_grad():
            alone = attend(inputs, plan, impl, return_lse=True)
        seen = wanted[1] > -math.inf
        for lse in (found[1], alone[1]):
            assert torch.equal(lse > -math.inf, seen)
            assert (lse[seen] - wanted[1][seen]).abs().max() < 1e-3
        assert not alone[0][~seen].any()
        assert relative(alone[0], wanted[0]) < 1e-2
        for a, b in zip((found[0], *found[2:]), (wanted[0], *wanted[2:]), strict=True):
            assert a.isfinite().all()
            assert relative(a, b) < 1e-2


@gpu
@pytest.mark.parametrize("text", [GPU_PATTERNS[i] for i in (0, 2)])
def test_auto_picks_kernels_with_halves(text, monkeypatch):
    need()
    if torch.cuda.get_device_name() not in measured.table():
        pytest.skip("nothing was measured on this GPU")
    # Passes of a few rows stay passes here.
    monkeypatch.setattr(run, "few_rows", lambda _: None)
    seen = []

    def noted(passes, *more, **how):
        seen.append(len(passes))
        return joint.attend_jointly(passes, *more, **how)

    monkeypatch.setattr(run, "attend_jointly", noted)
    plan = ls.plan(ls.parse(text), 4096, HEADS)
    inputs = made(1, 128, 4096, device="cuda", dtype=torch.bfloat16)
    q, k, v = inputs
    found = both(inputs, plan, "auto", use_lse=False)
    assert seen == [len(plan.passes)]
    said = ls.explain(q, k, v, plan)
    assert re.search(rf"pass {len(plan.passes) - 1}: kernel (cudnn|hopper)", said)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    for a, b in zip(found, both(exact, plan, "reference", use_lse=False), strict=True):
        assert relative(a, b) < 1e-2


@gpu
@each_kernel
def test_streams_and_memory_that_is_used_again(impl):
    need(impl)
    plan = ls.plan(ls.parse(GPU_PATTERNS[0]), 4096, HEADS)
    inputs = made(1, 64, 4096, device="cuda", dtype=torch.bfloat16)
    wanted = both(inputs, plan, impl, use_lse=True)
    for _ in range(8):
        # Memory that is used again too early would hold these.
        spoilt = [torch.full_like(inputs[0], torch.nan) for _ in range(8)]
        del spoilt
        for a, b in zip(both(inputs, plan, impl, use_lse=True), wanted, strict=True):
            assert relative(a, b) < 1e-2


@gpu
@each_kernel
@pytest.mark.parametrize("text", [GPU_PATTERNS[i] for i in (0, 4, 7, 8)])
def test_nothing_leaks_from_later_rows(text, impl):
    need(impl)
    n, cut = 2048, 1111
    plan = ls.plan(ls.parse(text), n, HEADS)
    assert plan.pattern.is_causal
    inputs = made(1, 64, n, device="cuda", dtype=torch.bfloat16)
    later = torch.arange(n, device="cuda")[:, None] >= cut
    other = [torch.randn_like(x).where(later, x.detach()).requires_grad_() for x in inputs]
    results = []
    for given in (inputs, other):
        out = attend(given, plan, impl)
        before = out[:, :, :cut]
        results.append((before, *torch.autograd.grad(before.float().sin().sum(), given)))
    assert torch.equal(results[0][0], results[1][0])
    for grad in results[0][1:]:
        assert not grad[:, :, cut:].any()


@gpu
def test_memory_between_the_passes_and_the_backward():
    need()
    n, text = 16384, "longformer(512, tokens=[0, 100, 2000])"
    plan = ls.plan(ls.parse(text), n, HEADS)
    assert len(plan.passes) == 2
    inputs = made(1, 128, n, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        attend(inputs, plan, "cudnn").sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = attend(inputs, plan, "cudnn")
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    # One output and one log-sum-exp, besides keys and values with copies and three rows.
    copies = sum(x.nbytes for x in inputs[1:])
    assert held < 1.2 * out.nbytes + 2 * copies
