"""Time and memory of one layer of a comparison, in turns with dense attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.bench import memory, tally
from longspan.bench.compare_asked import Bench, Compare
from longspan.bench.compare_entries import DenseLayer, Entry
from longspan.bench.setting import WAYS
from longspan.bench.timing import in_turns, summary
from longspan.mechanism.layer import MechanismLayer

# Seconds for the rounds of one entry at one length.
_PATIENCE = 0.2


class Clock:
    """The model where it is timed."""

    def __init__(self, asked: Compare) -> None:
        self.asked, self.bench = asked, Bench(asked, asked.device, asked.dtype)
        self.dense = self.bench.layers(Entry(text="dense", kind=DenseLayer))[0]
        # Bytes of the dense layer at each length.
        self.dense_peaks: dict[int, int] = {}

    def measure(self, one: Entry) -> list[dict[str, Any]]:
        """Time and memory of an entry at each length.

        Raises:
            LongspanError: if the entry refuses.
        """
        layer = self.bench.layers(one)[0]
        return [self._at(layer, n) for n in self.asked.lengths]

    def _at(self, ours: MechanismLayer, n: int) -> dict[str, Any]:
        asked, dense, x = self.asked, self.dense, self.bench.first(n)
        steps = {
            (name, way): _step(layer, x, way)
            for way in WAYS
            for name, layer in (("ours", ours), ("dense", dense))
        }
        # Plans and their schedules are kept, and are no part of what a call needs.
        steps["ours", "forward+backward"]()
        peak = memory.on_gpu if x.is_cuda else tally.peak_bytes
        own_peak = peak(steps["ours", "forward+backward"])
        if n not in self.dense_peaks:
            self.dense_peaks[n] = peak(steps["dense", "forward+backward"])
        calls = {" ".join(key): step for key, step in steps.items()}
        taken = in_turns(calls, rounds=1, device=asked.device, warm_up=int(x.is_cuda))
        once = taken["ours forward+backward"][0]
        more = min(asked.rounds, int(_PATIENCE / once)) - 1
        if more > 0:
            for name, seconds in in_turns(
                calls, rounds=more, device=asked.device, warm_up=0
            ).items():
                taken[name] += seconds
        found: dict[str, Any] = {}
        for way in WAYS:
            own, other = (summary(taken[f"{name} {way}"]) for name in ("ours", "dense"))
            found[way] = {
                "seconds": own["seconds"],
                "spread": own["spread"],
                "rounds": own["rounds"],
                "dense_seconds": other["seconds"],
                "of_dense": own["seconds"] / other["seconds"],
            }
        return {
            **found,
            "memory_bytes": own_peak,
            "dense_memory_bytes": self.dense_peaks[n],
        }


def _step(layer: MechanismLayer, x: Tensor, way: str) -> Callable[[], object]:
    leaf = x.detach().clone().requires_grad_()
    slope = torch.ones_like(x)

    def forward() -> object:
        with torch.no_grad():
            return layer(x)

    if way == "forward":
        return forward
    return lambda: torch.autograd.grad(layer(leaf), leaf, slope)
