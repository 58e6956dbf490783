"""Sparse prefill on one GPU: right first, then end-to-end attention time against dense SDPA.

    PYTHONPATH=src python benchmarks/gpu_prefill.py --out FOLDER [--budget-s 400] [--lengths 32768]

1. Each kind of method at 1,500 to 4,096 tokens, bfloat16 on CUDA, by every route (``--impls``)
   against dense attention under the executed mask in float32: outputs and log-sum-exps, odd
   lengths, two rows with padding, chunks. A method of a kind whose result is off by a route is not
   timed by it.
2. Batch 1, 32 heads over 8 key heads, width 128, bfloat16, at 16,384 to 524,288 tokens: cuDNN's
   dense causal SDPA, and each method, estimation, lists and attention together; then each stage
   for itself, with a wait before and after it (above 131,072 tokens the estimate alone). Measured
   density and recall of attention mass.
3. How many graphs were compiled for the columns of all these lengths: one for each number of
   columns, heads and width.

Stages are those of the route:

    cudnn_blocks   estimate, lists, blocks, own (block), columns, merge
    tiles          estimate, lists, kernel (and columns)
    ranges         estimate, ranges, plan (of the kernel that is chosen), kernel, columns, merge

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.eval.environment import environment
from longspan.ops import merge
from longspan.select import Selected, parse, recall, sample, select
from longspan.select import columns as column_pass
from longspan.select import cudnn_blocks as whole_blocks
from longspan.select import ranges as as_ranges
from longspan.select import tiles as as_tiles

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
LENGTHS = (16384, 32768, 65536, 131072, 524288)
IMPLS = ("cudnn_blocks", "ranges")
# Ranges of every row take two numbers for each run of blocks.
LONGEST_RANGES = 65536
# Above, a single run takes seconds.
LONG = 131072
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


def definition(found: Selected) -> tuple[Tensor, Tensor]:
    """Dense float32 attention under the executed mask."""
    prompt = found.layout.prompt
    mask = found.selection.mask(prompt)
    k, v = (prompt.per_head(x.float()) for x in (prompt.k, found.v))
    logits = prompt.q.float() @ k.mT * prompt.scale
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    weight = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    back = found.layout.take_back
    return back(weight @ v, 0.0), back(lse[..., None], -torch.inf)[..., 0]


def check(method: str, impl: str, device: str, log: Log) -> bool:
    """Compare a route with the definition over the same selection."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    cases = {
        "whole blocks": (4096, 4096, False),
        "odd length": (1500, 1500, False),
        "chunk": (1024, 3000, False),
        "padding": (2000, 2000, True),
    }
    good = True
    for name, (n, m, padded) in cases.items():
        about = {"kind": "check", "method": method, "impl": impl, "case": name}
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
            out, lse = found.attend(impl)
            right, total = definition(found)
            apart = float((out.float() - right).norm() / right.norm())
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


def stages(found: Selected, impl: str) -> dict[str, Callable[[], Any]]:
    """What a route does after the selection, each step over what those before it gave."""
    prompt, v, selection = found.layout.prompt, found.v, found.selection
    steps: dict[str, Callable[[], Any]] = {}
    if impl == "cudnn_blocks":
        lists = whole_blocks.earlier_lists(prompt, selection.blocks)
        own = as_ranges.own_block(prompt)
        parts = [whole_blocks.earlier(prompt, v, lists), as_ranges.over(prompt, v, own)]
        steps["lists"] = lambda: whole_blocks.earlier_lists(prompt, selection.blocks)
        steps["blocks"] = lambda: whole_blocks.earlier(prompt, v, lists)
        steps["own"] = lambda: as_ranges.over(prompt, v, own)
    elif impl == "tiles":
        steps["lists"] = lambda: as_tiles.block_lists(prompt, selection.blocks)
        steps["kernel"] = lambda: as_tiles.tiles(prompt, v, selection)
        return steps
    else:
        seen = as_ranges.runs(prompt, selection.blocks)
        parts = [as_ranges.over(prompt, v, seen)]
        steps["ranges"] = lambda: as_ranges.runs(prompt, selection.blocks)
        # A copy has no plan yet.
        steps["plan and kernel"] = lambda: as_ranges.over(prompt, v, replace(seen))
        steps["kernel"] = lambda: as_ranges.over(prompt, v, seen)
    if selection.columns is not None:
        parts.append(column_pass.columns(prompt, v, selection))
        steps["columns"] = lambda: column_pass.columns(prompt, v, selection)
    if len(parts) > 1:
        steps["merge"] = lambda: merge(parts)
    return steps


def timed(n: int, methods: dict[str, list[str]], device: str, log: Log, stop: float) -> None:
    """Dense attention once, then every method by every route that was right."""
    heads, key_heads = (HEADS, KEY_HEADS) if device == "cuda" else (4, 2)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = sample(n, heads, key_heads, WIDTH, dtype=dtype, device=device)
    long = n > LONG
    times = seconds(lambda: dense(q, k, v), device, most=15.0, rounds=2 if long else 5)
    whole = statistics.median(times)
    pairs = heads * n * (n + 1) / 2
    rate = 4 * WIDTH * pairs / whole / 1e12
    log.add(kind="dense", n=n, seconds=whole, runs=len(times), tflops=rate)
    for method, impls in methods.items():
        measured: dict[str, Any] = {}
        for impl in impls:
            about = {"kind": "method", "n": n, "method": method, "impl": impl}
            if impl == "ranges" and n > LONGEST_RANGES:
                continue
            if time.perf_counter() > stop:
                log.add(**about, error="not measured: out of time")
                continue
            try:
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                own = seconds(
                    lambda m=method, i=impl: select(q, k, v, m).attend(i),
                    device,
                    most=3.0 if long else 8.0,
                )
                peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
                found = select(q, k, v, method)
                more = {} if long else stages(found, impl)
                steps = {"estimate": lambda m=method: select(q, k, v, m), **more}
                alone = {
                    name: 1e3 * statistics.median(seconds(run, device, most=1.0, rounds=3))
                    for name, run in steps.items()
                }
                if not measured:
                    held = recall(found)
                    measured = {
                        "density": float(found.density().mean()),
                        "recall": float(held.mean()),
                        "worst_recall": float(held.min()),
                    }
                took = statistics.median(own)
                log.add(
                    **about,
                    seconds=took,
                    stages_ms=alone,
                    runs=len(own),
                    speedup=whole / took,
                    **measured,
                    peak_gib=peak,
                )
                del found, steps
            except Exception as error:
                log.add(**about, **failed(error))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def graphs_of_columns() -> dict[str, int]:
    """Functions made for columns, and graphs compiled for all of them."""
    made = column_pass._fused.values()
    # What torch.compile returns keeps the function; its cache entries are its graphs.
    codes = [getattr(made_, "_torchdynamo_orig_callable", made_).__code__ for made_ in made]
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list
    return {"functions": len(codes), "graphs": sum(len(entries(code)) for code in codes)}


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
        "| tokens | method | route | ms | speed-up | density | recall | stages, ms each alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in log.rows:
        if row["kind"] == "dense":
            lines.append(
                f"| {row['n']:,} | dense SDPA |  | {1e3 * row['seconds']:.1f} | 1.0 | 1 | 1 |  |"
            )
        elif row["kind"] == "method" and "error" in row:
            lines.append(
                f"| {row['n']:,} | `{row['method']}` | {row['impl']} | {row['error'][:60]} "
                "| | | | |"
            )
        elif row["kind"] == "method":
            alone = ", ".join(f"{name} {took:.1f}" for name, took in row["stages_ms"].items())
            lines.append(
                f"| {row['n']:,} | `{row['method']}` | {row['impl']} | "
                f"{1e3 * row['seconds']:.1f} | {row['speedup']:.2f} | {row['density']:.3f} | "
                f"{row['recall']:.3f} | {alone} |"
            )
    checks = [row for row in log.rows if row["kind"] == "check"]
    wrong = [f"{r['method']}, {r['impl']}, {r['case']}" for r in checks if not r["good"]]
    lines += ["", f"{len(checks) - len(wrong)} of {len(checks)} checks passed."]
    lines += [f"- failed: {name}" for name in wrong]
    counted = [row["columns"] for row in log.rows if row["kind"] == "graphs"]
    if counted and counted[-1]["functions"]:
        lines += [
            "",
            f"Columns of all lengths: {counted[-1]['graphs']} graphs compiled, for "
            f"{counted[-1]['functions']} numbers of columns and shapes of heads.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--budget-s", type=float, default=400.0, help="no new measurement begins after so long"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--lengths", type=int, nargs="*")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--impls", nargs="*", choices=("cudnn_blocks", "tiles", "ranges"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; --device cpu rehearses.")
    begin = time.perf_counter()
    stop = begin + args.budget_s
    lengths = args.lengths or (LENGTHS if args.device == "cuda" else (2048,))
    impls = args.impls or (IMPLS if args.device == "cuda" else ("ranges",))
    log = Log(args.out / "prefill.jsonl")
    log.add(kind="environment", **environment())
    with torch.no_grad():
        right = {
            (term.name, impl)
            for impl in impls
            for method in CHECKED
            if check(method, impl, args.device, log)
            for term in parse(method).terms
        }
        print(f"checked after {time.perf_counter() - begin:.0f} s", flush=True)
        good = {
            method: [i for i in impls if all((t.name, i) in right for t in parse(method).terms)]
            for method in args.methods
        }
        for n in lengths:
            print(f"{n:,} tokens, {stop - time.perf_counter():.0f} s left", flush=True)
            try:
                timed(n, good, args.device, log, stop)
            except Exception as error:
                log.add(kind="length", n=n, **failed(error))
            log.add(kind="graphs", columns=graphs_of_columns(), n=n)
            (args.out / "prefill.md").write_text(report(log), encoding="utf-8")
            if time.perf_counter() > stop:
                break


if __name__ == "__main__":
    main()
