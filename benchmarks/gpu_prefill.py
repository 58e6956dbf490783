"""Sparse prefill on one GPU: right first, then end-to-end attention time against dense SDPA.

    PYTHONPATH=src python benchmarks/gpu_prefill.py --out FOLDER [--seconds 220] [--lengths 32768]

1. Each kind of method at 1,500 to 4,096 tokens, bfloat16 on CUDA, against attention over the same
   selection in float32: outputs and log-sum-exps of the ``tiles`` kernel, odd lengths, two rows
   with padding, chunks. A method of a kind whose result is off is not timed.
2. Batch 1, 32 heads over 8 key heads, width 128, bfloat16, at 32,768, 131,072 and 524,288 tokens:
   cuDNN's dense causal SDPA, and each method, estimation, lists and attention together, with
   estimation also apart; measured density and recall of attention mass.

Queries and keys are made up (``longspan.select.sample``): rotated, most weight nearby and on a few
keys. Recall is of that data, not of a model. Every finished record is a line of
FOLDER/prefill.jsonl, what fails is a line with its error; FOLDER/prefill.md is for people.
``--device cpu`` runs the same steps at small sizes, as a rehearsal.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.eval.environment import environment
from longspan.select import parse, recall, sample, select

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
LENGTHS = (32768, 131072, 524288)
METHODS = (
    "vertical_slash(1000, 6096)",
    "vertical_slash(512, 2048)",
    "block_topk(64)",
    "block_topk(0.05)",
    "flex_prefill(0.9, 0.1)",
    "xattention(0.9, stride=16)",
    "xattention(0.9, stride=8)",
    "sinks(128) + recent(3968)",
)
# Budgets so small that short prompts are sparse too.
CHECKED = (
    "vertical_slash(64, 300)",
    "block_topk(6)",
    "flex_prefill(0.5, 0.3, least=64)",
    "xattention(0.6, stride=16)",
    "sinks(128) + recent(300)",
    "keynorm(100) + every(50) + tail(100)",
)
# bfloat16 keeps eight bits; the log-sum-exp is summed in float32.
LARGEST_OUT, LARGEST_LSE = 2e-2, 2e-3


class Log:
    """Records as lines of a file, and on the terminal."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {key: round(x, 5) if isinstance(x, float) else x for key, x in row.items()}
        shown.pop("trace", None)
        print(json.dumps(shown), flush=True)


def failed(error: Exception) -> dict[str, str]:
    return {
        "error": f"{type(error).__name__}: {error}"[:500],
        "trace": traceback.format_exc()[-2000:],
    }


def check(method: str, device: str, log: Log) -> bool:
    """Compare the fast kernel with float32 over the same selection."""
    fast = "tiles" if device == "cuda" else "gathered"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    cases = {
        "whole blocks": (4096, 4096, False),
        "odd length": (1500, 1500, False),
        "chunk": (1024, 3000, False),
        "padding": (2000, 2000, True),
    }
    good = True
    for name, (n, m, padded) in cases.items():
        about = {"kind": "check", "method": method, "case": name}
        try:
            parts = [
                sample(m, 8, 2, WIDTH, dtype=dtype, device=device, seed=row)
                for row in range(2 if padded else 1)
            ]
            q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
            q = q[:, :, m - n :].contiguous()
            place = None
            if padded:
                gap = torch.tensor([0, 333], device=device)
                place = torch.arange(n, device=device) - gap[:, None]
                place = place.clamp(min=-1)
            found = select(q, k, v, method, place=place)
            out, lse = found.attend(fast)
            wide = [x.float() for x in (q, k, v)]
            wanted = select(*wide, method, place=place)
            # The same selection: estimates in half precision may choose other blocks.
            exact = type(wanted)(layout=wanted.layout, v=wanted.v, selection=found.selection)
            right, total = exact.attend("gathered")
            apart = float((out - right).norm() / right.norm())
            seen = torch.isfinite(total)
            lse_apart = float((lse - total)[seen].abs().max())
            same_rows = bool((torch.isfinite(lse) == seen).all())
            fits = apart < LARGEST_OUT and lse_apart < LARGEST_LSE and same_rows
            log.add(**about, out=apart, lse=lse_apart, good=fits)
            good &= fits
        except Exception as error:
            log.add(**about, **failed(error), good=False)
            good = False
    return good


def seconds(run: Callable[[], Any], device: str, most: float, rounds: int = 5) -> list[float]:
    """Times of some runs after one that compiles; fewer if they take long."""
    found: list[float] = []
    begin = time.perf_counter()
    for turn in range(rounds + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        if turn:
            found.append(time.perf_counter() - start)
            if time.perf_counter() - begin > most:
                break
    return found


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's causal attention; whatever there is on a CPU."""
    if q.device.type != "cuda":
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def timed(n: int, methods: list[str], device: str, log: Log, stop: float) -> None:
    """Dense attention once, then every method."""
    heads, key_heads = (HEADS, KEY_HEADS) if device == "cuda" else (4, 2)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = sample(n, heads, key_heads, WIDTH, dtype=dtype, device=device)
    times = seconds(lambda: dense(q, k, v), device, most=15.0)
    whole = statistics.median(times)
    pairs = heads * n * (n + 1) / 2
    rate = 4 * WIDTH * pairs / whole / 1e12
    log.add(kind="dense", n=n, seconds=whole, runs=len(times), tflops=rate)
    for method in methods:
        about = {"kind": "method", "n": n, "method": method}
        if time.perf_counter() > stop:
            log.add(**about, error="not measured: out of time")
            continue
        try:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            own = seconds(lambda m=method: select(q, k, v, m).attend(), device, most=8.0)
            found = select(q, k, v, method)
            pick = seconds(lambda m=method: select(q, k, v, m), device, most=2.0, rounds=3)
            took, held = statistics.median(own), recall(found)
            log.add(
                **about,
                seconds=took,
                selecting=statistics.median(pick),
                runs=len(own),
                speedup=whole / took,
                density=float(found.density().mean()),
                recall=float(held.mean()),
                worst_recall=float(held.min()),
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
            )
            del found
        except Exception as error:
            log.add(**about, **failed(error))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def report(log: Log) -> str:
    """The records as a page."""
    about = next(row for row in log.rows if row["kind"] == "environment")
    gpu = about["cuda"][0]["name"] if about["cuda"] else about["cpu"]
    lines = [
        "# Sparse prefill on one GPU",
        "",
        f"{gpu}, torch {about['packages']['torch']}; batch 1, {HEADS} heads over {KEY_HEADS} key "
        f"heads, width {WIDTH}, bfloat16. Time of one attention layer, estimation included; "
        "made-up queries and keys.",
        "",
        "    PYTHONPATH=src python benchmarks/gpu_prefill.py --out FOLDER",
        "",
        "| tokens | method | ms | of that selecting | speed-up | density | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in log.rows:
        if row["kind"] == "dense":
            lines.append(
                f"| {row['n']:,} | dense SDPA | {1e3 * row['seconds']:.1f} |  | 1.0 | 1 | 1 |"
            )
        elif row["kind"] == "method" and "error" in row:
            lines.append(f"| {row['n']:,} | `{row['method']}` | {row['error'][:60]} | | | | |")
        elif row["kind"] == "method":
            lines.append(
                f"| {row['n']:,} | `{row['method']}` | {1e3 * row['seconds']:.1f} | "
                f"{1e3 * row['selecting']:.1f} | {row['speedup']:.2f} | {row['density']:.3f} | "
                f"{row['recall']:.3f} |"
            )
    checks = [row for row in log.rows if row["kind"] == "check"]
    wrong = [f"{row['method']}, {row['case']}" for row in checks if not row["good"]]
    lines += ["", f"{len(checks) - len(wrong)} of {len(checks)} checks passed."]
    lines += [f"- failed: {name}" for name in wrong]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=220.0)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--lengths", type=int, nargs="*")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; --device cpu rehearses.")
    stop = time.perf_counter() + args.seconds
    lengths = args.lengths or (LENGTHS if args.device == "cuda" else (2048,))
    log = Log(args.out / "prefill.jsonl")
    log.add(kind="environment", **environment())
    with torch.no_grad():
        right = {
            term.name
            for method in CHECKED
            if check(method, args.device, log)
            for term in parse(method).terms
        }
        good = [m for m in args.methods if all(t.name in right for t in parse(m).terms)]
        for n in lengths:
            try:
                timed(n, good, args.device, log, stop)
            except Exception as error:
                log.add(kind="length", n=n, **failed(error))
            (args.out / "prefill.md").write_text(report(log), encoding="utf-8")
            if time.perf_counter() > stop:
                break


if __name__ == "__main__":
    main()
