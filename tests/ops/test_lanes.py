"""Passes side by side on streams give what they give one after the other."""

from __future__ import annotations

import torch
from tests.ops.test_flex import gpu

import longspan as ls
from longspan.ops import lanes
from longspan.ops.lanes import Lanes


def test_nothing_happens_on_a_cpu():
    x = torch.zeros(1, 2, 8, 4)
    for passes in ([Loaded()], [Loaded(), Loaded()]):
        # The first run of a pass is alone everywhere.
        for _ in range(2):
            with Lanes(passes, (x, x, x), "auto") as found:
                assert found.side == []
                for index in range(len(passes)):
                    with found.lane(index) as lane:
                        assert lane is None
                        found.keep(lane, (x,), (x,))


@gpu
def test_lanes_equal_one_stream(monkeypatch):
    make = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(1, heads, 4096, 64, generator=make, device="cuda", dtype=torch.bfloat16)
        for heads in (8, 2, 2)
    ]
    for x in inputs:
        x.requires_grad_()
    slope = torch.randn(1, 8, 4096, 64, generator=make, device="cuda", dtype=torch.bfloat16)
    plan = ls.plan(ls.parse("longnet([256, 1024, 4096], [1, 2, 4])"), 4096, 8)
    assert len(plan.passes) > 1

    def run():
        # Kernels that add up gradients in any order would differ in the last bits.
        with torch.no_grad():
            alone = ls.attend(*inputs, plan, impl="flex")
        out = ls.attend(*inputs, plan, impl="flex")
        return alone, out, *torch.autograd.grad(out, inputs, slope)

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "_MOST_BYTES", 0)
        wanted = run()
    run()
    for _ in range(8):
        # Memory that is used again too early would hold these.
        spoilt = [torch.full_like(slope, torch.nan) for _ in range(8)]
        del spoilt
        for a, b in zip(run(), wanted, strict=True):
            torch.testing.assert_close(a, b)


class Loaded:
    """Weakly referable, as loaded passes are."""
