"""How the time of linear attention grows with the length, against dense causal attention.

    python benchmarks/linear_attention.py [--lengths 4096,...] [--json FILE] [--markdown FILE]

Forward pass on the CPU in float32, one batch row, one thread; dense attention is torch's own
scaled_dot_product_attention. Figures are CPU seconds (the time that the process ran, so that other
work on the machine counts little), the least of a few runs, one where they take long. Lengths at
which dense attention would take longer than the limit are not run for it. Decoding is one token on
top of a state of that length. Growth is the slope of log time over log N: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from longspan.mechanism import Favor, FeatureMap, Laplace, feature_maps, linear_attention


def least(run: Callable[[], object], runs: int) -> float:
    """CPU seconds of the fastest of some runs, of the first one if it takes more than one."""
    found: list[float] = []
    for _ in range(runs):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
        if found[-1] > 1:
            break
    return min(found)


def measure(
    n: int, heads: int, dim: int, maps: dict[str, FeatureMap], with_dense: bool
) -> dict[str, float | int | None]:
    q, k, v = torch.randn(3, 1, heads, n, dim).unbind(0)
    one_q, one_k, one_v = (x[:, :, -1:] for x in (q, k, v))
    row: dict[str, float | int | None] = {"n": n}
    for name, phi in maps.items():
        # The last token is left to the steps: a map may be made for so many and no more.
        begin_q, begin_k, begin_v = (x[:, :, :-1] for x in (q, k, v))
        _, state = linear_attention(begin_q, begin_k, begin_v, phi, return_state=True)
        row[name] = least(lambda phi=phi: linear_attention(q, k, v, phi), 3)
        row[f"{name} decode"] = least(
            lambda phi=phi, state=state: linear_attention(one_q, one_k, one_v, phi, state=state),
            50,
        )

    def dense() -> object:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    row["dense"] = least(dense, 2) if with_dense else None
    return row


def growth(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Slope of log time over log N; None for fewer than two lengths."""
    found = [(math.log(r["n"]), math.log(r[name])) for r in rows if r[name] is not None]
    if len(found) < 2:
        return None
    return statistics.linear_regression(*zip(*found, strict=True)).slope


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    rows, names = record["rows"], list(record["growth"])
    lines = [
        "# Linear attention on a CPU",
        "",
        f"{record['cpu']}, torch {record['torch']}, {record['threads']} thread, float32; "
        f"{record['unit']} of a forward pass, and in brackets of one token after so many.",
        "",
        f"    {record['command']}",
        "",
        "| | " + " | ".join(f"{r['n']:,}" for r in rows) + " | growth |",
        "|---|" + "---|" * len(rows) + "---|",
    ]
    for name in names:
        cells = []
        for r in rows:
            step = r.get(f"{name} decode")
            told = "" if r[name] is None else f"{r[name]:.3f}"
            cells.append(told if step is None else f"{told} ({step:.4f})")
        slope = record["growth"][name]
        told = "" if slope is None else f"{slope:.2f}"
        lines.append(f"| {name} | " + " | ".join([*cells, told]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--lengths", default="4096,16384,65536,262144")
    words.add_argument("--heads", type=int, default=2)
    words.add_argument("--dim", type=int, default=64)
    words.add_argument("--features", type=int, default=64, help="of FAVOR+ and Laplace")
    words.add_argument("--limit", type=float, default=30.0, help="longest dense run, in seconds")
    words.add_argument("--json", type=Path)
    words.add_argument("--markdown", type=Path)
    given = words.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    lengths = [int(n) for n in given.lengths.split(",")]
    named = {"elu + 1": "elu", "ReLU": "relu", "exp": "exp", "cosFormer": "cosformer"}
    maps = {
        name: feature_maps.build(short, given.dim, max(lengths)) for name, short in named.items()
    }
    maps["Laplace"] = Laplace(given.dim, features=given.features // 2)
    maps["FAVOR+"] = Favor(given.dim, features=given.features)
    rows: list[dict[str, float | int | None]] = []
    dense, at = 0.0, 1
    with torch.inference_mode():
        for n in lengths:
            # Dense time grows with the square of the length.
            row = measure(n, given.heads, given.dim, maps, dense * (n / at) ** 2 <= given.limit)
            if row["dense"] is not None:
                dense, at = row["dense"], n
            rows.append(row)
            found = {name: x for name, x in row.items() if name != "n" and x is not None}
            figures = "  ".join(f"{name} {x * 1e3:.2f} ms" for name, x in found.items())
            print(f"n {n:>6}  {figures}", file=sys.stderr)
    record = {
        "command": f"python benchmarks/linear_attention.py --lengths {given.lengths} "
        f"--heads {given.heads} --dim {given.dim} --features {given.features}",
        "cpu": platform.processor() or platform.machine(),
        "threads": 1,
        "torch": torch.__version__,
        "dtype": "float32",
        "unit": "CPU seconds",
        "growth": {name: growth(rows, name) for name in (*maps, "dense")},
        "rows": rows,
    }
    if given.markdown is not None:
        given.markdown.write_text(table(record))
    text = json.dumps(record, indent=1)
    if given.json is None:
        print(text)
    else:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
