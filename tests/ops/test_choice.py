"""A kernel is chosen once for tensors that look the same, and again for all that it depends on."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tests.ops.test_flex import window

from longspan.ops import capability

HEADS, N = 2, 64


def made(grad=(False, False, False), dtype=torch.float32, batch=1, width=8):
    return [torch.zeros(batch, HEADS, N, width, dtype=dtype, requires_grad=one) for one in grad]


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def transformed():
    torch._C._functorch._grad_increment_nesting()
    try:
        yield
    finally:
        torch._C._functorch._grad_decrement_nesting()


@pytest.fixture
def asked(monkeypatch):
    """How often kernels are asked."""
    calls = []
    choose = capability._choose
    monkeypatch.setattr(
        capability, "_choose", lambda *given, **how: calls.append(given) or choose(*given, **how)
    )
    return calls


TRAINED = (True, True, True)


@pytest.mark.parametrize(
    ("where", "how", "impl", "use_lse"),
    [
        (torch.no_grad, {"grad": TRAINED}, "auto", True),
        (torch.inference_mode, {"grad": TRAINED}, "auto", True),
        (deterministic, {"grad": TRAINED}, "auto", True),
        (transformed, {"grad": TRAINED}, "auto", True),
        *(
            (nullcontext, {"grad": tuple(i != j for i in range(3))}, "auto", True)
            for j in range(3)
        ),
        (nullcontext, {"grad": TRAINED, "dtype": torch.float64}, "auto", True),
        (nullcontext, {"grad": TRAINED, "batch": 2}, "auto", True),
        (nullcontext, {"grad": TRAINED, "width": 16}, "auto", True),
        (nullcontext, {"grad": TRAINED}, "tiled", True),
        (nullcontext, {"grad": TRAINED}, "auto", False),
    ],
)
def test_what_a_choice_depends_on(where, how, impl, use_lse, asked):
    ranges = window(N, 5)
    first = capability.choose("auto", *made(TRAINED), ranges)
    assert capability.choose("auto", *made(TRAINED), ranges) is first
    assert len(asked) == 1
    given = made(**how)
    with where():
        for _ in range(2):
            capability.choose(impl, *given, ranges, use_lse=use_lse)
    assert len(asked) == 2
    assert capability.choose("auto", *made(TRAINED), ranges) is first
    assert len(asked) == 2


def test_layouts_make_no_difference(asked):
    ranges = window(N, 5)
    for lies in (lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x[:, :1].expand(x.shape)):
        capability.choose("auto", *map(lies, made()), ranges)
    assert len(asked) == 1


def test_other_ranges_are_another_choice(asked):
    for _ in range(2):
        capability.choose("auto", *made(), window(N, 5))
    assert len(asked) == 2


def test_a_refusal_is_not_kept(monkeypatch):
    ranges, why = window(N, 5), ["no"]
    monkeypatch.setattr(capability.Capability, "reasons", lambda *_, **__: list(why))
    with pytest.raises(capability.Refusal):
        capability.choose("tiled", *made(), ranges)
    why.clear()
    assert capability.choose("tiled", *made(), ranges).name == "tiled"


def test_choices_go_with_their_ranges():
    passes = [(*made(TRAINED), window(N, size)) for size in (5, 9)]
    capability.choose_together("auto", passes)
    gone = [weakref.ref(own[3]) for own in passes]
    del passes
    gc.collect()
    assert not any(one() for one in gone)
