"""Compare patterns and mechanisms on one model: work, sight, memory, time, error; all computed.

Every entry becomes a layer beside each attention module of the embedded model, with the module's
own projections, and reads what that module reads on held-out text. Work, sight, state and error
are computed on a CPU in float32, whatever the device; time and memory are measured on the device.

    work    operations of the attention, without projections: of a pattern its pairs, of a
            mechanism all matrix products that it really computes; and their growth
    sight   pairs that rows read: of a pattern its mask, of a mechanism its gradients
    state   what decoding keeps, in keys and values of so many tokens
    error   |out - dense| / |out of dense| of the layer's output, for each layer
    time    one layer, projections included, in turns with dense causal attention

A record per entry; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from longspan.bench.compare_asked import Compare, rehearse
from longspan.bench.compare_clock import Clock
from longspan.bench.compare_counts import Counts, refused
from longspan.bench.compare_entries import Entry
from longspan.errors import LongspanError
from longspan.eval.records import Records

Progress = Callable[[str, int, int, str], None]
# With fewer entries a second process takes longer to start than it saves.
_MANY = 6


def run(
    asked: Compare, records: Records, progress: Progress = lambda *_: None
) -> list[dict[str, Any]]:
    """Measure what is asked and not in the records yet; returns all records asked for.

    Of many entries, a second process counts while this one takes the time, where there are two
    cores.

    Raises:
        InputError: before any work, for an entry with an option that does not fit.
    """
    total = len(asked.entries)
    todo = [one for one in asked.entries if one.text not in records]
    threads = torch.get_num_threads()
    torch.set_num_threads(asked.threads)
    try:
        if todo:
            rehearse(asked, todo)
        clock = Clock(asked) if todo and asked.rounds else None
        with _counting(asked, todo) as counted:
            for done, one in enumerate(asked.entries):
                progress("compare", done, total, one.text)
                if one.text not in records:
                    records.add(one.text, _record(one, clock, counted))
    finally:
        torch.set_num_threads(threads)
    progress("compare", total, total, "")
    return [{"entry": one.text, **records[one.text]} for one in asked.entries]


def _record(one: Entry, clock: Clock | None, counted: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """What is counted and timed of an entry; if it refuses either, the reason."""
    timed: list[dict[str, Any]] = []
    why = None
    if clock is not None:
        try:
            timed = clock.measure(one)
        except (LongspanError, torch.OutOfMemoryError) as error:
            why = refused(one, error)
    found = next(counted)
    if "refused" in found or why is None:
        for row, times in zip(found.get("lengths", ()), timed, strict=False):
            row |= times
        return found
    return why


@contextmanager
def _counting(asked: Compare, todo: Sequence[Entry]) -> Iterator[Iterator[dict[str, Any]]]:
    """Records of what is counted, in order; from another process where that saves time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    child = None
    if asked.rounds and len(todo) >= _MANY and (cores or 1) > 1:
        sizes = {**vars(asked), "entries": [one.text for one in todo]}
        command = [sys.executable, "-m", "longspan.bench.compare_counts", json.dumps(sizes)]
        # In a session of its own: Ctrl-C in a terminal is for this process, which ends the other.
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    try:
        yield _counts(asked, todo, child)
    finally:
        if child is not None:
            child.terminate()
            child.communicate()


def _counts(
    asked: Compare, todo: Sequence[Entry], child: subprocess.Popen[str] | None
) -> Iterator[dict[str, Any]]:
    here = None
    for one in todo:
        line = child.stdout.readline() if child is not None and child.stdout else ""
        if line:
            yield json.loads(line)
            continue
        # There is no other process, or it is gone: what ails it shows here.
        here = here or Counts(asked)
        yield here.measure(one)
