"""How ``gpu_mechanisms`` checks and times: against itself in float64, then in turns.

Every case is a line of a log as soon as it is done; what fails is a line with its error, what no
time is left for a line too.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gpu_harness import Log, failed, free, wait
from longspan.bench import memory
from longspan.bench.oracle import TOLERANCE, relative
from longspan.bench.setting import WAYS, both_ways
from longspan.bench.timing import in_turns, summary
from mechanism_cases import Mechanism, Run, Size

# Seconds that a case should have left to begin, and those that the rounds of a race may take.
NEEDED, ROUNDS = 2.0, 1.0


@contextmanager
def repeated(choices: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Functions give their results again, in order, from when the given function is called."""
    kept: dict[str, list[Any]] = {name: [] for name in choices}
    again = False

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if again:
                return kept[name].pop(0)
            kept[name].append(real(*args, **kwargs))
            return kept[name][-1]

        return run

    def from_now() -> None:
        nonlocal again
        again = True

    with ExitStack() as stack:
        for name in choices:
            module, _, attribute = name.rpartition(".")
            real = getattr(importlib.import_module(module), attribute)
            stack.enter_context(patch(name, watched(name, real)))
        yield from_now


def both(run: Run, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output, and gradients of a random weighing of it."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, leaves, slope.to(out))]


@dataclass
class Bench:
    """One run: where it writes, until when, and what was right."""

    log: Log
    device: str
    kernels: tuple[str, ...]
    until: float = 0.0
    used: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def out_of_time(self, **about: Any) -> bool:
        late = self.left < NEEDED
        if late:
            self.log.add(**about, skipped="no time left")
        return late

    def check(self, name: str, what: Mechanism, size: Size, n: int) -> None:
        """Against itself in float64 with the reference kernel; picks the kernel to time."""
        for kernel in self.kernels:
            about = {"kind": "check", "name": name, "kernel": kernel, "n": n}
            if self.out_of_time(**about):
                return
            start = time.monotonic()
            try:
                inputs = what.inputs(size, n)
                with repeated(what.choices) as from_now:
                    found = both(what.build(n, size, kernel), inputs)
                    from_now()
                    exact = both(what.build(n, size, "reference"), [x.double() for x in inputs])
                errors = [relative(a, b) for a, b in zip(found, exact, strict=True)]
                right = all(e <= TOLERANCE[size.dtype] for e in errors)
                took = time.monotonic() - start
                self.log.add(**about, errors=errors, right=right, seconds=took)
                if right:
                    self.used[name] = kernel
                    return
            except Exception as error:
                self.log.add(**about, **failed(error))
            free()

    def race(
        self,
        kind: str,
        n: int,
        calls: Mapping[str, tuple[Run, list[Tensor]]],
        ways: Iterable[str] = tuple(WAYS),
    ) -> None:
        """Time calls in turns, and what each needs above its inputs.

        Args:
            kind: of the records.
            n: rows.
            calls: each with its inputs, by name; first the one that others are compared with.
            ways: forward, forward+backward, or both.
        """
        for way in ways:
            steps: dict[str, Callable[[], object]] = {}
            peaks: dict[str, float | None] = {}
            once = 0.0
            for name, (call, inputs) in calls.items():
                about = {"kind": kind, "name": name, "n": n, "way": way}
                if self.out_of_time(**about):
                    continue
                step = both_ways(call, inputs)[way]
                try:
                    step()
                    wait()
                    start = time.monotonic()
                    step()
                    wait()
                    once += time.monotonic() - start
                    on_gpu = self.device == "cuda"
                    peaks[name] = memory.on_gpu(step) / 2**30 if on_gpu else None
                    steps[name] = step
                except Exception as error:
                    self.log.add(**about, **failed(error))
                free()
            rounds = int(min(10, max(3, ROUNDS / max(once, 1e-4))))
            taken = in_turns(steps, rounds=rounds, device=self.device)
            told = {name: summary(seconds) for name, seconds in taken.items()}
            dense = told.get(next(iter(calls)), {}).get("seconds")
            for name, times in told.items():
                about = {"kind": kind, "name": name, "n": n, "way": way}
                self.log.add(**about, **times, dense_seconds=dense, peak_gib=peaks[name])
            del steps
            free()
