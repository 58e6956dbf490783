"""New tokens on one GPU: attention of one query, and a model that goes on token by token.

    PYTHONPATH=src python benchmarks/gpu_decode.py --out FOLDER [--budget-s 120] [--kernels decode]

``call``: attention of one new token over a cache, batch 1 and 8, 32 heads over 8 key heads, width
128, bfloat16, with the plan made, as in every layer of a model but the first; microseconds on the
GPU (a captured graph) and on the host (until the call returns). Output is compared with dense
attention in float64 first; what is wrong is not timed. SDPA is that over all keys.

``model``: milliseconds a token of a Llama with random weights (8 layers of 4,096), planning
included, by its own attention (SDPA) and by ours. All ways take turns, medians count.

Records are lines of FOLDER/decode.jsonl, FOLDER/decode.md is for people. ``--device cpu --n 512``
is a rehearsal.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import longspan as ls
from gpu_harness import (
    HEADS,
    KEY_HEADS,
    Log,
    Work,
    device_of_this_run,
    do,
    dtype_of_this_run,
    failed,
    share_caches,
    wait,
)

KERNELS = ("decode", "flex", "hopper")
WIDTH = 128
LOCAL = "window(4096) | sink(4)"
# Batch rows, keys and pattern.
CALLS = (
    (1, 4096, "causal()"),
    (1, 32768, "causal()"),
    (1, 131072, "causal()"),
    (8, 32768, "causal()"),
    (1, 131072, LOCAL),
    (8, 32768, LOCAL),
    (1, 131072, "strided(8)"),
    (1, 131072, "scca.flow(2048)"),
    (1, 131072, "longnet([2048, 8192, 32768], [1, 4, 16])"),
)
MODEL = (LOCAL, "scca.flow(2048)", "strided(8)", "causal()")
LAYERS = 8
SDPA = "SDPA"


def call(batch: int, keys: int, pattern: str, kernels: Sequence[str], log: Log) -> None:
    """Check and time the attention of one token."""
    about = {"kind": "call", "batch": batch, "n": keys, "pattern": pattern}
    make = torch.Generator(device_of_this_run()).manual_seed(keys)
    shapes = [(batch, h, m, WIDTH) for h, m in ((HEADS, 1), (KEY_HEADS, keys), (KEY_HEADS, keys))]
    q, k, v = (
        torch.randn(s, generator=make, device=make.device, dtype=dtype_of_this_run())
        for s in shapes
    )
    laid = ls.plan(pattern, 1, HEADS, keys=keys)
    ways: dict[str, Callable[[], Any]] = {
        name: partial(ls.attend, q, k, v, laid, impl=name) for name in kernels
    }
    if pattern == "causal()":
        ways[SDPA] = partial(scaled_dot_product_attention, q, k, v, enable_gqa=True)
    # A key that counts twice has twice the weight.
    counts = torch.from_numpy(laid.counts()).to(q.device).double().log()
    exact_k, exact_v = (x.double().repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    wanted = scaled_dot_product_attention(q.double(), exact_k, exact_v, counts)
    del exact_k, exact_v
    able = {}
    for name, way in ways.items():
        try:
            error = float((way().double() - wanted).norm() / wanted.norm())
        except Exception as problem:
            log.add(**about, kernel=name, **failed(problem))
            continue
        if error < 1e-2:
            able[name] = way, error, _captured(way)
        else:
            log.add(**about, kernel=name, wrong=error)
    host, device = ({name: [] for name in able} for _ in range(2))
    for _ in range(7):
        for name, (way, _, graph) in able.items():
            host[name].append(_host(way))
            if graph is not None:
                device[name].append(_on_device(graph))
    for name, (_, error, _) in able.items():
        row = {**about, "kernel": name, "error": error, "host_us": 1e6 * median(host[name])}
        if device[name]:
            row["gpu_us"] = 1e6 * median(device[name])
        log.add(**row)


def _captured(way: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """The call as a graph; None on a CPU."""
    if device_of_this_run() != "cuda":
        return None
    for _ in range(3):
        way()
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    return graph


def _host(way: Callable[[], Any], times: int = 20) -> float:
    found = []
    for _ in range(times):
        wait()
        begin = time.perf_counter()
        way()
        found.append(time.perf_counter() - begin)
    return median(found)


def _on_device(graph: torch.cuda.CUDAGraph, times: int = 20) -> float:
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    graph.replay()
    ends[0].record()
    for _ in range(times):
        graph.replay()
    ends[1].record()
    wait()
    return ends[0].elapsed_time(ends[1]) / 1e3 / times


def model(prompt: int, kernels: Sequence[str], log: Log, *, small: bool) -> None:
    """Time tokens of a model after a prompt, each way with a cache of its own."""
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

    config = LlamaConfig(
        vocab_size=256 if small else 32000,
        hidden_size=128 if small else 4096,
        intermediate_size=256 if small else 14336,
        num_hidden_layers=2 if small else LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=1 << 18,
    )
    with torch.device(device_of_this_run()):
        made = AutoModelForCausalLM.from_config(
            config, dtype=dtype_of_this_run(), attn_implementation="sdpa"
        ).eval()
        ids = torch.randint(256, (1, prompt))
    ways = [(SDPA, "all keys", None)]
    ways += [(impl, pattern, impl) for pattern in MODEL for impl in kernels]
    caches = [DynamicCache() for _ in ways]
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(4):
        for (_, pattern, impl), cache, found in zip(ways, caches, times, strict=True):
            with ExitStack() as stack:
                if impl is not None:
                    stack.enter_context(ls.hf.apply(made, pattern))
                if not turn:
                    made(ids, past_key_values=cache, logits_to_keep=1)
                # The prompt by any kernel, new tokens by this one.
                if impl is not None and impl != "decode":
                    stack.enter_context(ls.hf.apply(made, pattern, impl=impl))
                token = ids[:, -1:]
                for step in range(16):
                    wait()
                    begin = time.perf_counter()
                    logits = made(token, past_key_values=cache).logits
                    token = logits[:, -1:].argmax(-1)
                    wait()
                    if step >= 4:
                        found.append(time.perf_counter() - begin)
    about = {"kind": "model", "batch": 1, "n": prompt, "layers": config.num_hidden_layers}
    for (name, pattern, _), found in zip(ways, times, strict=True):
        spread = sorted(found)
        log.add(
            **about,
            pattern=pattern,
            kernel=name,
            token_ms=1e3 * median(found),
            quartiles_ms=[1e3 * spread[len(found) * at // 4] for at in (1, 3)],
        )


def as_markdown(log: Log) -> str:
    """Both kinds of records as tables."""
    machine = next((row for row in log.rows if row["kind"] == "machine"), {})
    where = [gpu["name"] for gpu in machine.get("cuda") or ()] or ["a rehearsal on a CPU"]
    lines = ["# New tokens on one GPU", "", where[0], ""]
    lines += [
        "| pattern | keys | batch | kernel | us on the GPU | us on the host |",
        "|---" * 6 + "|",
    ]
    for row in (x for x in log.rows if x["kind"] == "call"):
        told = [f"{row[at]:.0f}" if at in row else "" for at in ("gpu_us", "host_us")]
        if "host_us" not in row:
            told[1] = row.get("refused") or row.get("error") or f"wrong: {row.get('wrong')}"
        lines.append(_line(row["pattern"], f"{row['n']:,}", row["batch"], row["kernel"], *told))
    lines += [
        "",
        "| pattern | prompt | layers | kernel | ms a token | quartiles |",
        "|---" * 6 + "|",
    ]
    for row in (x for x in log.rows if x["kind"] == "model"):
        low, high = row["quartiles_ms"]
        told = f"{row['token_ms']:.2f}", f"{low:.2f} to {high:.2f}"
        lines.append(_line(row["pattern"], f"{row['n']:,}", row["layers"], row["kernel"], *told))
    return "\n".join(lines) + "\n"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=120)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--n", type=int, help="keys of a rehearsal")
    parser.add_argument("--kernels", nargs="+", help="of ours, in place of the ones for CUDA")
    options = parser.parse_args()
    os.environ["LONGSPAN_BENCH_DEVICE"] = options.device
    rehearsal = options.device == "cpu"
    if not rehearsal and not torch.cuda.is_available():
        sys.exit("needs a CUDA device; --device cpu --n 512 is a rehearsal")
    share_caches()
    begin = time.monotonic()
    log = Log(options.out / "decode.jsonl")
    log.machine()
    kernels = options.kernels or (("tiled",) if rehearsal else KERNELS)
    calls = [(b, options.n or n, pattern) for b, n, pattern in CALLS]
    # A model runs by the kernels that take every pattern.
    own = [name for name in kernels if name != "hopper"]
    work: list[Work] = [
        ("model", 40, partial(model, options.n or 16384, own, log, small=rehearsal)),
        *((f"{p} {b} {n}", 4, partial(call, b, n, p, kernels, log)) for b, n, p in calls),
    ]

    def tables() -> None:
        (options.out / "decode.md").write_text(as_markdown(log), encoding="utf-8")

    do(work, log, options.budget_s - (time.monotonic() - begin), tables)
    log.add(kind="done", seconds=time.monotonic() - begin)


if __name__ == "__main__":
    main()
