"""How the GPU benchmarks compare rivals: right at full length first, then timed in turns.

Dense causal attention takes part in every race: figures are shares of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_harness import Log, device_of_this_run, failed, wait
from longspan.bench import dense, oracle
from longspan.bench.setting import WAYS, Call, both_ways
from longspan.bench.timing import in_turns, summary
from longspan.errors import Refusal
from longspan.eval.environment import version
from longspan.ops import measured

# A rival that has no backward, which is told once.
_LACKING = (Refusal, NotImplementedError)


def compare(
    makers: Mapping[str, Callable[[], Call]],
    inputs: list[Tensor],
    row_error: Callable[[Tensor], float],
    pairs: int,
    log: Log,
    about: Mapping[str, Any],
    *,
    rounds: int,
    more: Mapping[str, Any] | None = None,
    inner: slice = slice(None),
    against: Sequence[str] | None = None,
) -> None:
    """Check rivals and dense attention on one pattern, and time those that are right.

    Args:
        makers: of each rival, makes its call anew, with all that a new pattern needs.
        inputs: q, k and v.
        row_error: of an output, the error of some rows.
        pairs: query-key pairs that each rival computes.
        log: where the records go.
        about: what every record says.
        rounds: rounds that count.
        more: what the records of timings say beyond that.
        inner: rows that all compute alike; the others are not compared.
        against: dense attention of these libraries; None is all that are there.
    """
    calls, first = agreeing(makers, inputs, row_error, log, about, inner=inner)
    about = {**about, **(more or {})}
    race(calls, pairs, inputs, log, about, rounds=rounds, first=first, against=against)


def agreeing(
    makers: Mapping[str, Callable[[], Call]],
    inputs: list[Tensor],
    row_error: Callable[[Tensor], float],
    log: Log,
    about: Mapping[str, Any],
    *,
    inner: slice = slice(None),
) -> tuple[dict[str, Call], dict[str, float]]:
    """Rivals that are right at full length, and the seconds of each one's first call.

    Args:
        makers: of each rival, makes its call anew, with all that a new pattern needs.
        inputs: q, k and v.
        row_error: of an output, the error of some rows.
        log: where what is wrong or refused is told.
        about: what every record says.
        inner: rows that all compute alike; the others are not compared.

    Returns:
        The calls, and the seconds.
    """
    calls: dict[str, Call] = {}
    first: dict[str, float] = {}
    lead: list[Tensor] = []
    largest = oracle.TOLERANCE[inputs[0].dtype]
    for name, make in makers.items():
        try:
            ways = both_ways(make(), inputs)
            out: Any = ways["forward"]()
            results: list[Tensor] = [out]
            try:
                grads: Any = ways["forward+backward"]()
                results += grads
            except _LACKING as refusal:
                log.add(**about, kernel=name, way="forward+backward", refused=str(refusal))
            wait()
            # Kernels are compiled by now; what is left is what a new pattern costs.
            start = time.perf_counter()
            call = make()
            both_ways(call, inputs)["forward"]()
            wait()
            first[name] = time.perf_counter() - start
            rows = row_error(out)
            found = [x[:, :, inner] for x in results]
            apart = [oracle.relative(a, b) for a, b in zip(found, lead or found, strict=False)]
            log.add(**{**about, "kind": "full length"}, kernel=name, rows=rows, apart=apart)
            if rows <= largest and max(apart) <= largest:
                calls[name] = call
                lead = lead if len(lead) >= len(found) else found
            else:
                log.add(**about, kernel=name, error="wrong at full length: not timed")
        except Exception as error:
            log.add(**about, kernel=name, **failed(error))
    return calls, first


def dense_calls(
    inputs: list[Tensor], log: Log, against: Sequence[str] | None = None
) -> dict[str, Call]:
    """Dense causal attention of each library that is there, or of those that are named."""
    found = {}
    offered = dense.on_cpu() if device_of_this_run() == "cpu" else dense.on_gpu()
    for name, call in offered.items():
        if against is not None and name not in against:
            continue
        try:
            with torch.no_grad():
                call(*inputs)
            found[f"dense {name}"] = call
        except Exception as error:
            log.add(kind="peer", name=name, **failed(error))
    return found


def race(
    calls: Mapping[str, Call],
    pairs: int,
    inputs: list[Tensor],
    log: Log,
    about: Mapping[str, Any],
    *,
    rounds: int,
    first: Mapping[str, float],
    against: Sequence[str] | None = None,
) -> None:
    """Time rivals and dense attention in turns, both ways, a record for each.

    Args:
        calls: rivals that are right.
        pairs: query-key pairs that each of them computes.
        inputs: q, k and v.
        log: where the records go.
        about: what every record says.
        rounds: rounds that count.
        first: seconds of each rival's first call.
        against: as for ``compare``.
    """
    width, n = inputs[0].shape[3], inputs[0].shape[2]
    calls = {**calls, **dense_calls(inputs, log, against)}
    dense_pairs = inputs[0].shape[1] * n * (n + 1) // 2
    for way, flops in WAYS.items():
        steps = {}
        for name, call in calls.items():
            step = both_ways(call, inputs)[way]
            try:
                step()
                steps[name] = step
            except Exception as error:
                if name not in first or not isinstance(error, _LACKING):
                    log.add(**about, kernel=name, way=way, **failed(error))
        seconds = in_turns(steps, rounds=rounds, device=inputs[0].device, warm_up=2)
        rate = {
            name: flops
            * width
            * (dense_pairs if name.startswith("dense") else pairs)
            / summary(taken)["seconds"]
            / 1e12
            for name, taken in seconds.items()
        }
        best = max((x for name, x in rate.items() if name.startswith("dense")), default=None)
        for name, taken in seconds.items():
            log.add(
                **about,
                kernel=name,
                way=way,
                first_seconds=first.get(name),
                **summary(taken),
                tflops=rate[name],
                of_dense=rate[name] / best if best else None,
            )


def rates_table(
    cases: Sequence[Mapping[str, Any]],
    command: str,
    without: Mapping[tuple[Any, ...], Collection[str]] | None = None,
) -> dict[str, Any]:
    """The stored table that ``auto`` goes by, with cases of this GPU added or replaced.

    Args:
        cases: pattern, width, keys, apart, backward, tflops; several if queries have several
            ranges, and fill where it is not 1.
        command: what measured them.
        without: kernels that were tried on a case, by pattern, width and whether with backward,
            and have no rate any more.
    """
    gpu = torch.cuda.get_device_name()
    found = measured.stored()
    old = found["gpus"].get(gpu, {"cases": []})

    def name(case: Mapping[str, Any]) -> tuple[Any, ...]:
        return case["pattern"], case["width"], case["backward"]

    # One kernel alone says nothing about the others, unless the others refuse: scattered blocks.
    new = {
        name(case): case
        for case in cases
        if len(case["tflops"]) > 1 or case.get("fill", 1.0) < 0.9
    }
    for case in old["cases"]:
        for kernel in (without or {}).get(name(case), ()):
            case["tflops"].pop(kernel, None)
        # Kernels that this run left out keep their rates.
        if name(case) in new:
            new[name(case)]["tflops"] = {**case["tflops"], **new[name(case)]["tflops"]}
    kept = [case for case in old["cases"] if name(case) not in new]
    commands = [one for one in old.get("command", "").split("; ") if one and one != command]
    found["gpus"][gpu] = {
        "command": "; ".join([*commands, command]),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "nvidia-cudnn-frontend": version("nvidia-cudnn-frontend"),
        "flash-attn-4": version("flash-attn-4"),
        "cases": [*kept, *new.values()],
    }
    return found


def as_markdown(log: Log, title: str) -> str:
    """The timed records as a table."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a rehearsal on a CPU"
    lines = [f"# {title}", "", where, ""]
    lines += ["| pattern | N | D | way | kernel | ms | TFLOP/s | of dense |", "|" + "---|" * 8]
    cases: dict[tuple[Any, ...], list[Any]] = {}
    for r in log.timed():
        name = r["kind"], r["width"], r["n"], r["pattern"], r.get("way")
        cases.setdefault(name, []).append(r)
    for r in (row for case in cases.values() for row in case):
        share = f"{r['of_dense']:.2f}" if r.get("of_dense") else ""
        cells = (
            r["pattern"].replace("|", "\\|"),
            r["n"],
            r["width"],
            r.get("way", "forward"),
            r["kernel"],
            f"{r['seconds'] * 1e3:.2f}",
            f"{r['tflops']:.0f}",
            share,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
