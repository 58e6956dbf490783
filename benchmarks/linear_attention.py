"""How the time of linear attention grows with the length, against dense causal attention.

    python benchmarks/linear_attention.py [--lengths 4096,...] [--json FILE]

Forward pass on the CPU in float32, one batch row, one thread; dense attention is torch's own
scaled_dot_product_attention. Figures are CPU seconds (the time that the process ran, so that other
work on the machine counts little), the least of a few runs after a warm-up. Lengths at which dense
attention would take longer than the limit are not run for it. Decoding is one token on top of a
state of that length.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from longspan.mechanism import Favor, FeatureMap, linear_attention


def least(run: Callable[[], object], runs: int) -> float:
    """CPU seconds of the fastest of some runs."""
    found = []
    for _ in range(runs):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def measure(
    n: int, heads: int, dim: int, maps: dict[str, str | FeatureMap], with_dense: bool
) -> dict[str, float | int | None]:
    q, k, v = torch.randn(3, 1, heads, n, dim).unbind(0)
    one = [x[:, :, -1:] for x in (q, k, v)]
    row: dict[str, float | int | None] = {"n": n}
    for name, phi in maps.items():

        def whole(phi: str | FeatureMap = phi) -> object:
            return linear_attention(q, k, v, phi)

        _, state = linear_attention(q, k, v, phi, return_state=True)

        def step(phi: str | FeatureMap = phi, state: object = state) -> object:
            return linear_attention(*one, phi, state=state)

        row[name] = least(whole, 3)
        row[f"{name} decode"] = least(step, 50)

    def dense() -> object:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    row["dense"] = least(dense, 2) if with_dense else None
    return row


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    words.add_argument("--heads", type=int, default=4)
    words.add_argument("--dim", type=int, default=64)
    words.add_argument("--features", type=int, default=64, help="of the Performer")
    words.add_argument("--limit", type=float, default=12.0, help="longest dense run, in seconds")
    words.add_argument("--json", type=Path)
    given = words.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    maps: dict[str, str | FeatureMap] = {
        "elu": "elu",
        "performer": Favor(given.dim, features=given.features),
    }
    rows: list[dict[str, float | int | None]] = []
    dense, at = 0.0, 1
    with torch.inference_mode():
        for n in map(int, given.lengths.split(",")):
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
        "rows": rows,
    }
    text = json.dumps(record, indent=1)
    if given.json is None:
        print(text)
    else:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
