"""The records of ``gpu_mechanisms`` as a page, and those of several runs as one file.

    python benchmarks/mechanism_report.py benchmarks/results/mechanisms-h200 NEW.jsonl ...

writes what the file (.jsonl) holds and the new records over it, and the page (.md) beside it. Of
each case the last record stays; one that says that no time was left gives way to any other.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.bench.setting import WAYS
from longspan.eval.records import read_lines

Row = dict[str, Any]
TITLES = {
    "mechanism": "Mechanisms",
    "nsa": "Native sparse attention: 16 blocks of 64, 16 heads to a key head, no window",
    "linear": "Linear attention, 16 heads of width 64",
}
# From this length on growth is measured: before, what a call costs at all counts too.
GROWS_FROM = 16384


def folded(runs: Sequence[Row]) -> list[Row]:
    """Last records of each case, after the record of the machine that measured them.

    Args:
        runs: records of runs one after another; each begins with that of its machine.
    """
    machine: Row = {}
    kept: dict[tuple[Any, ...], tuple[int, Row]] = {}
    machines: list[Row] = []
    for row in runs:
        if row["kind"] == "machine":
            machine = row
            machines.append(machine)
            continue
        if row["kind"] not in (*TITLES, "check"):
            continue
        case = (row["kind"], row["name"], row.get("way"), None if _checked(row) else row["n"])
        if "skipped" in row and case in kept:
            continue
        kept.pop(case, None)
        kept[case] = (len(machines) - 1, row)
    found: list[Row] = []
    for number, machine in enumerate(machines):
        own = [row for run, row in kept.values() if run == number]
        found += [machine, *own] if own else []
    return found


def _checked(row: Row) -> bool:
    return row["kind"] == "check"


def report(rows: Sequence[Row]) -> str:
    """Records as a page."""
    machines = [row for row in rows if row["kind"] == "machine"]
    gpus = [gpu["name"] for row in machines for gpu in row.get("cuda") or ()]
    where = ", ".join(dict.fromkeys(gpus)) or "A rehearsal on a CPU"
    torch = ", ".join(dict.fromkeys(row["packages"]["torch"] for row in machines))
    lines = [
        "# Mechanisms on one GPU",
        "",
        f"{where}, torch {torch}, bfloat16, batch 1. Milliseconds, medians; in brackets the time "
        "of dense attention over it, measured in turns with it, so that more than 1 is faster "
        "than dense; then the memory that a call needs above its inputs.",
        "",
        *dict.fromkeys(f"    {row['command']}" for row in machines if "command" in row),
    ]
    for kind, title in TITLES.items():
        if mine := [r for r in rows if r["kind"] == kind]:
            lines += ["", f"## {title}", "", *_table(mine, growth=kind == "linear")]
    lines += [
        "",
        "## Checks",
        "",
        "Output and gradients against the same in float64, largest differences over largest "
        "values.",
        "",
        "| | kernel | output and gradients |",
        "|---|---|---|",
    ]
    for r in rows:
        if _checked(r):
            told = ", ".join(f"{e:.4f}" for e in r["errors"]) if "errors" in r else _why(r)
            told += " (beyond the tolerance of this run)" if not r.get("right", True) else ""
            lines.append(f"| {r['name']} | {r['kernel']} | {told} |")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], *, growth: bool) -> list[str]:
    lengths = sorted({r["n"] for r in rows})
    heads = ["", "way", *(f"{n:,}" for n in lengths), *(["growth"] if growth else [])]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    # What is compared with comes first, in whatever run it was measured last.
    names = sorted(dict.fromkeys(r["name"] for r in rows), key=lambda x: not x.startswith("dense"))
    for name in names:
        for way in WAYS:
            mine = {r["n"]: r for r in rows if (r["name"], r.get("way", way)) == (name, way)}
            cells = [_cell(mine.get(n)) for n in lengths]
            lines.append("| " + " | ".join([name, way, *cells, *_growth(mine, growth)]) + " |")
    return lines


def _growth(mine: dict[int, Row], asked: bool) -> list[str]:
    """Slope of log time over log N: 1 is linear, 2 quadratic."""
    points = [(n, r["seconds"]) for n, r in mine.items() if n >= GROWS_FROM and "seconds" in r]
    if not asked or len(points) < 2:
        return [""] * asked
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    return [f"{statistics.linear_regression(x, y).slope:.2f}"]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "seconds" not in row:
        return _why(row)
    basis = row.get("dense_seconds")
    share = f" ({basis / row['seconds']:.2f})" if basis else ""
    peak = row["peak_gib"]
    room = "" if peak is None else f", {peak:.1f} GiB"
    return f"{row['seconds'] * 1e3:.2f}{share}{room}"


def _why(row: Row) -> str:
    text = row.get("skipped") or row.get("refused") or row.get("error") or "?"
    return text.replace("|", "/").replace("\n", " ")[:80]


def main() -> None:
    words = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    words.add_argument("results", type=Path, help="path without .jsonl and .md")
    words.add_argument("new", type=Path, nargs="*")
    given = words.parse_args()
    own = given.results.with_name(given.results.name + ".jsonl")
    files = [own, *given.new] if own.exists() else given.new
    rows = folded([row for path in files for row in read_lines(path)])
    own.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own.with_suffix(".md").write_text(report(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
