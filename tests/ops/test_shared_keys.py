"""Queries as views where all of them share one row of keys, and keys as views, those of one
remainder after another: who takes that, and what comes out.

On the CPU the kernel is a stand-in that goes through the plans of ``hopper``.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch
from tests.ops.cases import On, added_in_place
from tests.ops.test_flex import gpu, relative, window
from tests.ops.test_hopper import (
    here,
    module,
)
from tests.ops.test_hopper import on_hopper as on_hopper
from tests.ops.test_hopper_backward import executed as executed_back
from tests.ops.test_hopper_plan import executed

import longspan as ls
from longspan.ops import capability, joint, loading, run
from longspan.ops.kernels.reference import reference

N, HEADS, KEY_HEADS = 1024, 4, 2
PATTERNS = {
    "one pass": "sda.neighborhood(128, 4)",
    "wide": "sda.neighborhood(4096, 8)",
    "with a sink": "sda.neighborhood(64, 8) | sink(3)",
    "with a window": "window(50) | sda.neighborhood(128, 4)",
    "orders side by side": "dilated(64, [1, 2, 4, 8])",
}


@pytest.fixture
def library(monkeypatch):
    """The stand-in, which takes no keys in turn; returns what its calls were given."""
    return stand_in(monkeypatch, takes_keys_in_turn=False)


@pytest.fixture
def turning(monkeypatch):
    """The same, which does."""
    # As on a GPU, where heads share an order of keys.
    monkeypatch.setattr(loading, "own_keys", lambda *_: None)
    return stand_in(monkeypatch)


def stand_in(monkeypatch, **more):
    on_any = [
        replace(x, devices=(), **more) if x.name == "hopper" else x for x in capability.KERNELS
    ]
    monkeypatch.setattr(capability, "KERNELS", on_any)
    # Plans are kept, and what was loaded with them.
    monkeypatch.setattr(loading, "_loaded", WeakKeyDictionary())
    monkeypatch.setattr(module, "reasons", lambda *_: [])
    monkeypatch.setattr(joint, "_now", lambda _: object())
    calls: dict[str, list] = {"forward": [], "backward": [], "added": []}

    def forward(self, q, k, v):
        calls["forward"].append((q, k, v))
        out, lse = executed(self.plan, q, k, v, self.scale, self.length)
        return torch.empty_like(q).copy_(out), lse

    def backward(self, q, k, v, out, lse, dout, dlse, into=(), after=None):
        dout, dlse = (torch.zeros_like(x) if d is None else d for x, d in ((q, dout), (lse, dlse)))
        given = (q, k, v, out), lse, dout, dlse, self.scale, self.length
        found = executed_back(self.plan, self.back, *given)
        calls["backward"].append(found)
        calls["added"].append(after is not None)
        return added_in_place(found, into, after)

    monkeypatch.setattr(module.Ready, "forward", forward)
    monkeypatch.setattr(module.Ready, "backward", backward)
    return calls


def made(batch=1, n=N):
    make = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, heads, n, 8, generator=make, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def both(inputs, pattern, impl, *, return_lse):
    """Output, gradients, and if it is asked for the log-sum-exp."""
    out, *lse = (
        ls.attend(*inputs, pattern, impl=impl, return_lse=True)
        if return_lse
        else (ls.attend(*inputs, pattern, impl=impl),)
    )
    loss = out.sin().sum() + sum(x.cos().sum() for x in lse)
    return out, *torch.autograd.grad(loss, inputs), *lse


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
def test_attention_and_gradients(text, return_lse, library):
    inputs = made()
    found = both(inputs, text, "hopper", return_lse=return_lse)
    wanted = both(inputs, text, "reference", return_lse=return_lse)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    rows = [(len(q), len(k), len(v)) for q, k, v in library["forward"]]
    assert any(q > 1 == k == v for q, k, v in rows)
    with torch.no_grad():
        alone = ls.attend(*inputs, text, impl="hopper")
    torch.testing.assert_close(alone, wanted[0], rtol=1e-9, atol=1e-9)


def test_queries_outputs_and_gradients_are_never_copied(library):
    inputs = made()
    out, dq, *_ = both(inputs, PATTERNS["one pass"], "hopper", return_lse=False)
    ((own_q, own_k, _),) = library["forward"]
    (grads,) = library["backward"]
    assert own_q.shape == (4, HEADS, N // 4, 8)
    assert own_k.shape == (1, KEY_HEADS, N, 8)
    for one, other in ((own_q, inputs[0]), (grads[0], dq)):
        assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert out.is_contiguous()


def test_gradients_of_passes_are_added_up_at_once(library, monkeypatch):
    seen = []
    spread = run.spread
    monkeypatch.setattr(run, "spread", lambda x, orders: seen.append(orders) or spread(x, orders))
    both(made(), PATTERNS["with a window"], "hopper", return_lse=False)
    queries, keys, values = seen
    assert queries == (None, None)
    assert keys[0] is None is not keys[1]
    assert values == keys


@pytest.mark.parametrize(
    ("text", "batch", "n"),
    [
        # Two batch rows, remainders of less than a tile, a length that the step does not divide.
        ("sda.neighborhood(64, 4)", 2, N),
        ("sda.neighborhood(64, 16)", 1, N),
        ("sda.neighborhood(64, 4)", 1, N - 1),
    ],
)
def test_where_rows_stay_in_order(text, batch, n, library):
    inputs = made(batch, n)
    found = both(inputs, text, "hopper", return_lse=False)
    for a, b in zip(found, both(inputs, text, "reference", return_lse=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert [(len(q), len(k)) for q, k, _ in library["forward"]] == [(batch, batch)]


def test_views_that_the_kernel_refuses(library, monkeypatch):
    def reasons(q, k, v, ranges):
        return ["no"] if len(k) != len(q) else []

    monkeypatch.setattr(module, "reasons", reasons)
    # Views are kept with a plan.
    plan, inputs = ls.plan(ls.parse(PATTERNS["one pass"]), N, HEADS), made()
    found, wanted = (
        both(inputs, plan, impl, return_lse=False) for impl in ("hopper", "reference")
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert [(len(q), len(k)) for q, k, _ in library["forward"]] == [(1, 1)]


def test_explain_says_who_computes_the_views(monkeypatch):
    """Another kernel may come first for views than for the pass in its order."""
    stand_in(monkeypatch, takes_keys_in_turn=False)
    (mine,) = (x for x in capability.KERNELS if x.name == "hopper")
    other = replace(mine, name="tiled", note="for views alone")
    monkeypatch.setattr(capability, "KERNELS", [other, mine])
    tiled = importlib.import_module("longspan.ops.kernels.tiled")

    def reasons(q, k, *_):
        return [] if len(k) < len(q) else ["no"]

    monkeypatch.setattr(tiled, "reasons", reasons, raising=False)
    seen = []

    def load(self):
        seen.append(self.name)
        return lambda q, *kv: reference(
            q, *(x.expand(len(q), -1, -1, -1) for x in kv[:2]), *kv[2:]
        )

    monkeypatch.setattr(capability.Capability, "load", load)
    inputs = [x.detach() for x in made()]
    ls.attend(*inputs, PATTERNS["one pass"])
    said = ls.explain(*inputs, PATTERNS["one pass"])
    assert seen == ["tiled"]
    assert "pass 0: kernel tiled: for views alone" in said
    assert "not hopper: possible" in said


IN_TURN = {
    "strided": ("strided(8)", [(1, 8)]),
    "heads by remainder": ("sda(512, 8)", [(1, 8)]),
    "queries by remainder": ("sda.neighborhood(128, 4)", [(4, 4)]),
    "branches": ("longnet([128, 512, 1024], [1, 4, 8])", [(1, 1), (1, 4), (1, 8)]),
    # Ranges go on from one remainder to the next, and remainders that end within a tile.
    "all": ("sda.neighborhood(4096, 8)", [(8, 8)]),
    "ragged": ("strided(16)", [(1, 1)]),
}


@pytest.mark.parametrize(("text", "rows"), IN_TURN.values(), ids=IN_TURN)
def test_keys_in_turn(text, rows, turning):
    inputs = made()
    # Twice, as passes run side by side the second time.
    found = [both(inputs, text, "hopper", return_lse=True) for _ in range(2)]
    wanted = both(inputs, text, "reference", return_lse=True)
    for one in found:
        for a, b in zip(one, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert [(len(q), len(k)) for q, k, _ in turning["forward"]] == 2 * rows
    # Gradients of keys are complete in the first branch, to which the others add.
    assert turning["added"] == 2 * [at > 0 for at in range(len(rows))]
    with torch.no_grad():
        alone = ls.attend(*inputs, text, impl="hopper")
    torch.testing.assert_close(alone, wanted[0], rtol=1e-9, atol=1e-9)


def test_keys_in_turn_and_their_gradients_are_never_copied(turning):
    inputs = made()
    _, _, dk, dv = both(inputs, "strided(8)", "hopper", return_lse=False)
    ((_, own_k, own_v),) = turning["forward"]
    (grads,) = turning["backward"]
    for one, other in (
        (own_k, inputs[1]),
        (own_v, inputs[2]),
        (grads[1], dk),
        (grads[2], dv),
    ):
        assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_two_batch_rows_have_their_keys_gathered(turning):
    inputs = made(batch=2)
    found = both(inputs, "strided(8)", "hopper", return_lse=False)
    for a, b in zip(found, both(inputs, "strided(8)", "reference", return_lse=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert [(len(q), len(k)) for q, k, _ in turning["forward"]] == [(2, 2)]


@pytest.mark.parametrize("keys", [2, 3])
def test_keys_are_in_turn_only_where_ranges_say_so(keys, library):
    # As many keys in the order of the pass as in both batch rows: those of two remainders.
    inputs = made(batch=keys, n=256)
    for text in ("ssa(32, 8)", "longmixed(32, 8)", "sda.neighborhood(64, 2)"):
        for impl in ("auto", "hopper"):
            found = both(inputs, text, impl, return_lse=False)
            wanted = both(inputs, text, "reference", return_lse=False)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_reasons_of_keys_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(module, "missing_gluon", lambda: None)
    ranges = replace(window(1024, 100, heads=4), key_rows=8)
    q = On(1, 4, 1024, 64)
    assert module.reasons(q, On(8, 2, 128, 64), On(8, 2, 128, 64), ranges) == []
    for k, v in ((On(4, 2, 256, 64), On(4, 2, 256, 64)), (On(8, 2, 128, 64), On(1, 2, 128, 64))):
        (why,) = module.reasons(q, k, v, ranges)
        assert "keys and values of 8 batch rows in turn" in why


def test_who_takes_keys_in_turn():
    ranges = replace(window(4096, 100), key_rows=8)
    for kernel in capability.KERNELS:
        q, k = On(1, HEADS, 4096, 128), On(8, KEY_HEADS, 512, 128)
        assert kernel.takes_keys_in_turn == (kernel.name == "hopper")
        if kernel.name != "hopper" and (not kernel.devices or "cuda" in kernel.devices):
            (found,) = kernel.reasons(q, k, k, ranges, use_lse=False)
            assert "not of several in turn" in found


@pytest.mark.parametrize("grad", [False, True])
def test_who_takes_shared_keys(grad, monkeypatch):
    for kernel in capability.KERNELS:
        q = On(8, HEADS, 4096, 128, grad=grad)
        k = On(1, KEY_HEADS, 4096, 128)
        takes = kernel.takes_shared_keys(q, k, k)
        assert takes == (kernel.name == "hopper" or (kernel.name == "flex" and not grad))
        if not takes and (not kernel.devices or "cuda" in kernel.devices):
            (found,) = kernel.reasons(q, k, k, window(4096, 100), use_lse=False)
            assert "as many batch rows as queries; got 1 for 8" in found


@pytest.mark.parametrize("grad", [False, True])
def test_auto_stays_with_it(grad, on_hopper):
    q, k = On(8, HEADS, 4096, 128, grad=grad), On(1, KEY_HEADS, 4096, 128)
    ranges = window(4096, 1024, heads=HEADS)
    assert capability.choose("auto", q, k, k, ranges).name == "hopper"


@gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("text", [*PATTERNS.values(), *(text for text, _ in IN_TURN.values())])
def test_on_a_gpu(text, width):
    here()
    make = torch.Generator("cuda").manual_seed(0)
    n = 4096
    given = [
        torch.randn(1, heads, n, width, generator=make, device="cuda").bfloat16()
        for heads in (8, 2, 2)
    ]
    results = []
    # Alone at first, then passes on streams side by side.
    for impl in ("hopper", "hopper", "reference"):
        inputs = [(x if impl == "hopper" else x.float()).requires_grad_() for x in given]
        out, lse = ls.attend(*inputs, text, impl=impl, return_lse=True)
        loss = out.float().sin().sum() + lse.cos().sum()
        with torch.no_grad():
            alone = ls.attend(*inputs, text, impl=impl)
        results.append((alone, out, *torch.autograd.grad(loss, inputs)))
    for found in results[:2]:
        for a, b in zip(found, results[2], strict=True):
            assert a.isfinite().all()
            assert relative(a, b) < 1e-2
