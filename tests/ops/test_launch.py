"""Kernels are launched again as they were compiled, for arguments that Triton would call alike."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import launch as module

DEVICE = torch.device("cuda", 0)


class Kernel:
    """Counts how often Triton looks at arguments, and what is launched without it."""

    def __init__(self):
        self.looks, self.launches = 0, 0

    def __getitem__(self, grid):
        assert grid == (3, 1, 1)

        def look(*_, **__):
            self.looks += 1
            return Compiled(self)

        return look


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert grid == (3, 1, 1)

        def run(*_):
            self.kernel.launches += 1

        return run


@pytest.fixture
def looked(monkeypatch):
    """Whether Triton looks at these arguments after those."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_compiled", {})

    def looked(first, then, **how):
        kernel = Kernel()
        for args in (first, first, then):
            module.launch(kernel, (3, 1, 1), args, device=DEVICE, **how)
        assert kernel.launches + kernel.looks == 3
        assert kernel.looks in (1, 2)
        return kernel.looks == 2

    return looked


FLAT = torch.zeros(64)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (1, 2),
        (15, 16),
        (2, 1 << 31),
        (1, True),
        (1, 1.0),
        (1, None),
        (0, None),
        (torch.float32, torch.bfloat16),
        (FLAT, None),
        (FLAT, FLAT.half()),
        (FLAT, FLAT[1:]),
        (FLAT, 1),
        ((FLAT, FLAT), (FLAT,)),
        ((FLAT, FLAT), (FLAT, FLAT[1:])),
        ((FLAT, (1, 2)), (FLAT, 1, 2)),
        ((FLAT, None), (None, FLAT)),
    ],
)
def test_what_makes_a_difference(first, then, looked):
    assert looked((first,), (then,))
    assert looked((0, first), (0, then))
    assert looked((first, 5), (5, first))


@pytest.mark.parametrize(
    ("first", "then"),
    [(0.5, 1.0), (FLAT, FLAT[4:]), (FLAT, FLAT.view(8, 8)), ((FLAT, 3), (FLAT[8:], 3))],
)
def test_what_makes_none(first, then, looked):
    assert not looked((first,), (then,))


def test_amd_reaches_two_gibibytes(looked, monkeypatch):
    # Reserved, not written.
    far = torch.empty((1 << 31) + 64, dtype=torch.uint8)
    near = far.new_empty(64)
    far = far[-far.data_ptr() % 16 :]
    assert not looked((near,), (far,))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert looked((near,), (far,))
    assert not looked((far,), (far[16:32],))


def test_what_alone_decides(looked):
    assert not looked((1, FLAT), (2, FLAT[1:]), alike="same")


def test_options_are_compiled_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_compiled", {})
    kernel = Kernel()
    for most in (64, 64, 128):
        module.launch(kernel, (3, 1, 1), (FLAT,), device=DEVICE, alike="same", maxnreg=most)
    assert (kernel.looks, kernel.launches) == (2, 1)


def test_memory_has_an_end(looked, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 2)
    for size in range(20):
        looked((size,), (size + 1,))
        assert len(module._compiled) <= 2


def test_other_devices_have_their_own(monkeypatch):
    here = []

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            here.append(self.device.index)

        def __exit__(self, *_):
            here.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(module, "_compiled", {})
    kernel = Kernel()
    for index in (0, 1, 1, 0):
        module.launch(kernel, (3, 1, 1), (FLAT,), device=torch.device("cuda", index))
    assert (kernel.looks, kernel.launches) == (2, 2)
    assert here == [1, None, 1, None]


def test_nothing_is_kept_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_compiled", {})
    calls = []
    kernel = {(3, 1, 1): lambda *args: calls.append(args)}
    for _ in range(2):
        module.launch(kernel, (3, 1, 1), (1,), device=DEVICE)
    assert calls == [(1,), (1,)]
    assert not module._compiled
