"""Time and memory of candidates: the oracle first, then all in turns with dense attention.

All candidates of a length share their rounds, and so one dense attention, which takes longest. The
share of its time is taken round by round: what else the machine does hits both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from longspan.bench.admit import check
from longspan.bench.advise.asked import Advise
from longspan.bench.run import WARM_UP, dense_calls, kernels, ours, ours_at, peak_bytes
from longspan.bench.setting import Call, Setting, both_ways
from longspan.bench.timing import in_turns, summary
from longspan.errors import LongspanError
from longspan.eval.records import Records
from longspan.pattern import parse
from longspan.planning import plan

Progress = Callable[[str, int, int, str], None]
# Candidates that share their rounds; more of them lie too far apart in time.
_TOGETHER = 24


def measure(
    asked: Advise, texts: Sequence[str], n: int, records: Records, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Records of patterns of one layer, by their texts: measured, or found in the records."""

    def key(text: str) -> str:
        return f"{text} | {n} | {asked.way}"

    texts = list(dict.fromkeys(texts))
    todo = [text for text in texts if key(text) not in records]
    what, total, done = f"measure at {n:,}", 2 * len(todo), 0
    for first in range(0, len(todo), _TOGETHER):
        some = todo[first : first + _TOGETHER]
        rows: dict[str, dict[str, Any]] = {}
        calls: dict[str, Call] = {}
        for text in some:
            progress(what, done, total, f"check {text}")
            rows[text], call = _checked(text, replace(asked.setting, n=n), asked.way)
            if call is not None:
                calls[text] = call
            done += 1
        progress(what, done, total, f"time {len(calls)} in turns")
        _time(asked, replace(asked.setting, n=n), rows, calls)
        for text, row in rows.items():
            records.add(key(text), {"pattern": text, "n": n, "way": asked.way, **row})
        done += len(some)
    if todo:
        progress(what, done, total, "")
    return {text: records[key(text)] for text in texts}


def _checked(text: str, setting: Setting, way: str) -> tuple[dict[str, Any], Call | None]:
    """What the oracle says, and the call if that is good."""
    pattern = parse(text)
    try:
        laid = plan(pattern, setting.n, setting.heads)
        call = ours(laid, "auto", setting)
        found = {
            "kernels": kernels(setting.tensors(), laid, "auto", way),
            **check(ours_at(pattern, "auto"), call, pattern, laid, setting, way, 0),
        }
    except (LongspanError, torch.OutOfMemoryError) as error:
        return {"refused": str(error).split("\n", 1)[0]}, None
    return found, None if found["wrong"] else call


def _time(
    asked: Advise, setting: Setting, rows: dict[str, dict[str, Any]], calls: dict[str, Call]
) -> None:
    """Add seconds and bytes of calls, and of dense attention beside them, to their rows."""
    if not calls:
        return
    inputs, way = setting.tensors(), asked.way
    dense = {f"dense {name}": c for name, c in dense_calls(setting, inputs, way).items()}
    steps = {name: both_ways(call, inputs)[way] for name, call in {**calls, **dense}.items()}
    warm_up = WARM_UP if setting.device == "cuda" else 1
    taken = in_turns(steps, rounds=asked.rounds, device=setting.device, warm_up=warm_up)
    found = {name: summary(seconds) for name, seconds in taken.items()}
    best = min(dense, key=lambda name: found[name]["seconds"])
    for name in calls:
        rows[name] |= {
            **found[name],
            "dense": best.removeprefix("dense "),
            "dense_seconds": found[best]["seconds"],
            "of_dense_time": _ratio(taken[name], taken[best]),
        }
        if asked.memory:
            rows[name] |= {
                "memory_bytes": peak_bytes("longspan auto", steps[name], name, setting, way),
                "dense_memory_bytes": _dense_peak(best, setting, way),
            }


def _ratio(seconds: list[float], dense: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(seconds, dense, strict=True))


@cache
def _dense_peak(name: str, setting: Setting, way: str) -> int | None:
    """Of one dense attention; the same for all candidates."""
    inputs = setting.tensors()
    call = dense_calls(setting, inputs, way)[name.removeprefix("dense ")]
    return peak_bytes(name, both_ways(call, inputs)[way], "", setting, way)
