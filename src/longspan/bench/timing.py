"""Time calls in turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every call in every round.

    On a GPU the host runs ahead and events on the stream are timed, so that what counts is the
    device's time, or the host's where it is slower.

    Args:
        calls: what to time, by name.
        rounds: rounds that count.
        device: where the calls compute.
        warm_up: rounds before that do not.
    """
    clock = _events if torch.device(device).type == "cuda" else _seconds
    return clock(calls, rounds, warm_up)


def _seconds(
    calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: int
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                found[name].append(time.perf_counter() - start)
    return found


def _events(
    calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: int
) -> dict[str, list[float]]:
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            if turn >= warm_up:
                marks[name].append((begin, end))
    torch.cuda.synchronize()
    return {n: [a.elapsed_time(b) / 1e3 for a, b in pairs] for n, pairs in marks.items()}


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median, least, and the spread between the quartiles as a share of the median."""
    middle = statistics.median(seconds)
    quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [middle] * 3
    return {
        "seconds": middle,
        "least": min(seconds),
        "spread": (quarters[2] - quarters[0]) / middle,
        "rounds": len(seconds),
    }
