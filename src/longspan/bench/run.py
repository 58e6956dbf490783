"""Measure patterns: oracle first, then time and memory in turns with dense attention and peers.

A result is a record per pattern, length and way (forward, or forward + backward), in it a row for
each competitor. Records are kept as they come; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from longspan.analysis.reach import period
from longspan.bench import dense, memory
from longspan.bench.admit import admit, check
from longspan.bench.peers import PEERS
from longspan.bench.setting import WAYS, Call, Setting, both_ways
from longspan.bench.timing import in_turns, summary
from longspan.errors import InputError, Refusal
from longspan.eval.environment import environment, version
from longspan.eval.records import Records
from longspan.ops import attend, explain
from longspan.ops.capability import KERNELS
from longspan.pattern import Pattern, parse
from longspan.planning import Plan, plan

# Rounds before those that count.
WARM_UP = 2
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is asked.

    Attributes:
        patterns: their texts.
        lengths: numbers of rows.
        setting: all other sizes; its ``n`` is not used.
        impls: kernels, or ``auto``.
        ways: keys of ``WAYS``.
        peers: whether other libraries take part.
        rounds: rounds that count.
        memory: whether peak memory is measured.
    """

    patterns: tuple[str, ...]
    lengths: tuple[int, ...]
    setting: Setting
    impls: tuple[str, ...] = ("auto",)
    ways: tuple[str, ...] = tuple(WAYS)
    peers: bool = False
    rounds: int = 9
    memory: bool = True

    def __post_init__(self) -> None:
        known = ("auto", *(kernel.name for kernel in KERNELS))
        for given, allowed, what in (
            (self.impls, known, "impl"),
            (self.ways, tuple(WAYS), "way"),
        ):
            for one in given:
                if one not in allowed:
                    raise InputError(f"{what} must be one of {', '.join(allowed)}, got {one!r}")
        if not self.patterns or not self.lengths or self.rounds < 1:
            raise InputError("expected at least one pattern, one length and one round")
        for n in self.lengths:
            replace(self.setting, n=n)
        for text in self.patterns:
            pattern = parse(text)
            if (count := period(pattern)) > 1:
                layers = ", ".join(f'"{pattern.at_layer(at)}"' for at in range(min(count, 4)))
                raise InputError(
                    f"{text} differs between layers, and one call is measured: ask for the "
                    f"patterns of its layers, {layers}"
                )
            pattern.at_layer(0).require(self.setting.heads)

    def settings(self) -> dict[str, Any]:
        """What a record depends on besides its pattern, length and way; versions and machine."""
        sizes = {key: value for key, value in vars(self.setting).items() if key != "n"}
        packages = {peer.package: version(peer.package) for peer in PEERS if peer.package}
        return {
            **sizes,
            "impls": self.impls,
            "peers": self.peers,
            "rounds": self.rounds,
            "memory": self.memory,
            "environment": environment(),
            "peer_versions": packages,
        }

    def made_by(self) -> dict[str, Any]:
        """What every record says of how and on what it was measured."""
        settings = self.settings()
        found = settings["environment"]
        versions = {**found["packages"], **settings["peer_versions"]}
        return {
            "warm_up": WARM_UP,
            "rounds": self.rounds,
            "hardware": [g["name"] for g in found["cuda"]]
            or f"{found['cpu']}, {found['cores']} cores",
            "threads": found["threads"],
            "versions": {name: one for name, one in versions.items() if one},
        }


def run(
    bench: Bench, records: Records, progress: Progress = lambda *_: None
) -> list[dict[str, Any]]:
    """Measure what is asked and not in the records yet; returns all records asked for.

    Raises:
        Refusal: if a kernel that was named cannot do it.
    """
    about = bench.made_by()
    work = [(text, n, way) for n in bench.lengths for text in bench.patterns for way in bench.ways]
    found = []
    for done, (text, n, way) in enumerate(work):
        key = f"{text} | {n} | {way}"
        progress("bench", done, len(work), key)
        if key not in records:
            record = measure(bench, text, replace(bench.setting, n=n), way)
            records.add(key, {**record, **about})
        found.append(records[key])
    progress("bench", len(work), len(work), "")
    return found


def measure(bench: Bench, text: str, setting: Setting, way: str) -> dict[str, Any]:
    """One record."""
    pattern = parse(text)
    laid = plan(pattern, setting.n, setting.heads)
    inputs = setting.tensors()
    rows: list[dict[str, Any]] = []
    calls: dict[str, Call] = {}
    for impl in bench.impls:
        name = f"longspan {impl}"
        call = ours(laid, impl, setting)
        row = {"name": name, "kernels": kernels(inputs, laid, impl, way)}
        row |= check(ours_at(pattern, impl), call, pattern, laid, setting, way, 0)
        rows.append(row)
        if not row["wrong"]:
            calls[name] = call
    if bench.peers:
        for peer in PEERS:
            row = {"name": peer.name, **admit(peer, pattern, laid, setting, way, calls)}
            rows.append(row)
    pairs = dict.fromkeys(calls, laid.pairs)
    for name, call in dense_calls(setting, inputs, way).items():
        calls[f"dense {name}"] = call
        pairs[f"dense {name}"] = setting.dense_pairs
        rows.append({"name": f"dense {name}"})
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    steps = {name: both_ways(call, inputs)[way] for name, call in calls.items()}
    seconds = in_turns(steps, rounds=bench.rounds, device=setting.device, warm_up=WARM_UP)
    rates = {name: pairs[name] / summary(taken)["seconds"] for name, taken in seconds.items()}
    best = max(rate for name, rate in rates.items() if name.startswith("dense "))
    for row in rows:
        name = row["name"]
        if name not in seconds:
            continue
        row |= summary(seconds[name])
        row["pairs_per_second"] = rates[name]
        row["tflops"] = rates[name] * WAYS[way] * setting.width / 1e12
        row["of_dense"] = rates[name] / best
        if bench.memory:
            row["memory_bytes"] = peak_bytes(name, steps[name], text, setting, way)
    return {
        "pattern": text,
        "n": setting.n,
        "way": way,
        "pairs": laid.pairs,
        "density": laid.density,
        "passes": len(laid.passes),
        "load": load,
        "rows": rows,
    }


def ours(laid: Plan, impl: str, setting: Setting) -> Call:
    """Our attention over a plan."""
    return lambda q, k, v: attend(q, k, v, laid, impl=impl, scale=setting.scale)


def ours_at(pattern: Pattern, impl: str) -> Callable[[Setting], Call]:
    """Our attention over a pattern, for other lengths."""
    return lambda setting: ours(plan(pattern, setting.n, setting.heads), impl, setting)


def kernels(inputs: list[Tensor], laid: Plan, impl: str, way: str) -> list[str]:
    """The kernel of each pass, or of each of its calls for heads of their own."""
    q, k, v = (x.detach().requires_grad_(way != "forward") for x in inputs)
    said = explain(q, k, v, laid, impl=impl).splitlines()
    found = (x.partition(": kernel ")[2].partition(":")[0] for x in said if x[:1] != " ")
    return [name for name in found if name]


def dense_calls(setting: Setting, inputs: list[Tensor], way: str) -> dict[str, Call]:
    """Dense attention of other libraries, by name: what runs here.

    Raises:
        Refusal: if nothing does.
    """
    offered = (dense.on_gpu if setting.device == "cuda" else dense.on_cpu)(setting.causal)
    able: dict[str, Call] = {}
    reasons = []
    for name, call in offered.items():
        try:
            both_ways(call, inputs)[way]()
            able[name] = call
        except (RuntimeError, ImportError, AssertionError, TypeError) as error:
            reasons.append(f"{name}: {error}")
    if not able:
        raise Refusal(f"no dense attention to compare with: {'; '.join(reasons)}")
    return able


def peak_bytes(
    name: str, step: Callable[[], object], text: str, setting: Setting, way: str
) -> int | None:
    """Peak memory of a competitor's call above q, k and v; None where that is not known."""
    if setting.device == "cuda":
        return memory.on_gpu(step)
    if name.startswith("longspan "):
        return memory.in_fresh_process(text, setting, way, name.removeprefix("longspan "))
    return memory.in_fresh_process(None, setting, way) if name == "dense SDPA" else None


def patterns_or_default(given: Sequence[str]) -> tuple[str, ...]:
    """The patterns asked for, each once, or three that stand for the rest."""
    return tuple(dict.fromkeys(given)) or ("window(512)", "scca.flow(512)", "shifted_chunk(1024)")
