"""The flex kernel against hand-written masks and dense attention, on one GPU.

    PYTHONPATH=src python benchmarks/gpu_flex.py --out benchmarks/results --name flex-h200

Checks results and gradients first and stops if one is wrong. Then times forward (no gradients) and
forward + backward, bf16, B 1, 32 query heads, 8 key heads, D 128, N 32768, by CUDA events; the
rivals of a case take turns, and the median counts. TFLOP/s are over visible pairs only: 4 D per
pair and query head forward, 14 D with backward. Writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from longspan.ops.kernels._flex_tiles import tile_lists
from longspan.ops.kernels.flex import compilations, flex
from longspan.ops.kernels.reference import reference
from longspan.ops.ranges import KeyRanges

HEADS, KEY_HEADS, WIDTH, LENGTH = 32, 8, 128, 32768
SCALE = WIDTH**-0.5
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ranges_of(lo_GN: Tensor, hi_GN: Tensor, group_H: Tensor) -> KeyRanges:
    lo_GNm, hi_GNm = (x[..., None].int().contiguous() for x in (lo_GN, hi_GN))
    return KeyRanges(lo_GNm, hi_GNm, group_H[None], lo_GN.shape[1])


def window(n: int, width: int) -> tuple[KeyRanges, MaskMod]:
    row = torch.arange(n, device="cuda")
    alike = torch.zeros(HEADS, dtype=torch.long, device="cuda")
    ranges = ranges_of((row - width + 1).clamp(min=0)[None], row[None] + 1, alike)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < width)

    return ranges, visible


def causal(n: int) -> tuple[KeyRanges, MaskMod]:
    ranges, _ = window(n, n)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    return ranges, visible


def shifted(n: int, size: int) -> tuple[KeyRanges, MaskMod]:
    row = torch.arange(n, device="cuda")
    lo_GN = torch.stack([(s + size * ((row - s) // size)).clamp(min=0) for s in (0, size // 2)])
    group_H = (torch.arange(HEADS, device="cuda") >= HEADS // 2).long()
    ranges = ranges_of(lo_GN, (row + 1).expand(2, -1), group_H)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shift = torch.where(head >= HEADS // 2, size // 2, 0)
        return (j <= i) & ((i + size - shift) // size == (j + size - shift) // size)

    return ranges, visible


def flow(n: int, size: int) -> tuple[KeyRanges, MaskMod]:
    row = torch.arange(n, device="cuda")
    head_H = torch.arange(HEADS, device="cuda")
    own_N = row // size
    seen_HN = own_N - head_H[:, None] % (own_N + 1)
    hi_HN = torch.minimum((seen_HN + 1) * size, row + 1)
    ranges = ranges_of(seen_HN * size, hi_HN, head_H)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = i // size
        return (j // size == own - head % (own + 1)) & (j <= i)

    return ranges, visible


def tensors(n: int, *, grad: bool = False) -> list[Tensor]:
    shapes = [(1, HEADS, n, WIDTH), (1, KEY_HEADS, n, WIDTH), (1, KEY_HEADS, n, WIDTH)]
    make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": grad}
    return [torch.randn(shape, **make) for shape in shapes]


def relative(value: Tensor, expected: Tensor) -> float:
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm()).item()


def check_against_oracle(ranges: KeyRanges, n: int) -> dict[str, float]:
    """Relative errors of out, lse and the gradients (through both) against float32."""
    inputs = tensors(n, grad=True)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    results = flex(*inputs, ranges, SCALE), reference(*exact, ranges, SCALE)
    ours, theirs = results
    slopes = [torch.randn_like(x) for x in theirs]
    grads = [
        torch.autograd.grad([out, lse], leaves, [slopes[0].to(out.dtype), slopes[1]])
        for (out, lse), leaves in zip(results, (inputs, exact), strict=True)
    ]
    names = ("out", "lse", "dq", "dk", "dv")
    pairs = zip(names, (*ours, *grads[0]), (*theirs, *grads[1]), strict=True)
    return {name: relative(a, b) for name, a, b in pairs}


def ours(ranges: KeyRanges) -> Attention:
    return lambda q, k, v: flex(q, k, v, ranges, SCALE)[0]


def by_hand(mask: MaskMod, n: int, *, per_head: bool) -> tuple[Attention, Callable[[], BlockMask]]:
    """FlexAttention as its documentation shows it, compiled for this mask alone."""
    heads = HEADS if per_head else None
    compiled = torch.compile(create_block_mask, dynamic=False)

    def build() -> BlockMask:
        return compiled(mask, None, heads, n, n, device="cuda")

    block_mask = build()
    fused = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused(q, k, v, block_mask=block_mask, scale=SCALE, enable_gqa=True)

    return attend, build


def dense(backend: SDPBackend) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=SCALE, enable_gqa=True
            )

    return attend


def milliseconds(steps: dict[str, Callable[[], object]], rounds: int = 25) -> dict[str, float]:
    """Median time of each step; the steps take turns, and the host runs ahead of the device."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {x: [] for x in steps}
    for turn in range(rounds + 5):
        for name, step in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            if turn >= 5:
                events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) for begin, end in taken)
        for name, taken in events.items()
    }


def race(rivals: dict[str, Attention], pairs: int) -> dict[str, dict[str, float]]:
    """Forward and forward + backward of each rival: milliseconds and TFLOP/s on visible pairs."""
    inputs = tensors(LENGTH)
    leaves = tensors(LENGTH, grad=True)
    slope = torch.randn_like(inputs[0])

    def forward(attend: Attention) -> Callable[[], object]:
        def step() -> object:
            with torch.no_grad():
                return attend(*inputs)

        return step

    def both(attend: Attention) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, slope)

    results: dict[str, dict[str, float]] = {name: {} for name in rivals}
    for kind, wrap, flops in (("forward", forward, 4), ("forward+backward", both, 14)):
        taken = milliseconds({name: wrap(attend) for name, attend in rivals.items()})
        for name, ms in taken.items():
            results[name][f"{kind} ms"] = ms
            results[name][f"{kind} TFLOP/s"] = flops * WIDTH * pairs / ms / 1e9
    return results


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="flex-h200")
    options = parser.parse_args()
    torch.manual_seed(0)
    # The hand-written masks are many graphs of one function.
    torch._dynamo.config.recompile_limit = 64
    report: dict = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": f"bf16, B 1, H {HEADS}, K {KEY_HEADS}, D {WIDTH}, N {LENGTH}",
    }

    errors = {
        "window 400": check_against_oracle(window(2048, 400)[0], 2048),
        "shifted 512": check_against_oracle(shifted(2048, 512)[0], 2048),
        "flow 256": check_against_oracle(flow(2048, 256)[0], 2048),
        "window 400, N 1999": check_against_oracle(window(1999, 400)[0], 1999),
    }
    report["relative errors"] = errors
    for name, found in errors.items():
        print(name, {key: f"{x:.1e}" for key, x in found.items()}, flush=True)
        # NaN fails too.
        assert all(x < 1e-2 for x in found.values()), (name, found)

    with torch.no_grad():
        inputs = tensors(LENGTH)
        before = compilations()
        first = seconds(lambda: flex(*inputs, window(LENGTH, 64)[0], SCALE))
        once = compilations() - before
        later = [
            seconds(lambda w=w: flex(*inputs, window(LENGTH, w)[0], SCALE))
            for w in (100, 128, 500, 512, 777, 1024, 2048, 3000, 8192)
        ]
        report["ten windows"] = {
            "compilations, first pattern": once,
            "compilations, ten patterns": compilations() - before,
            "first call s": first,
            "slowest later call with its plan ms": max(later) * 1e3,
        }
    print(report["ten windows"], flush=True)
    assert compilations() - before == 1

    report["cases"] = {
        name: compare(name, *case)
        for name, case in {
            "window 4096": window(LENGTH, 4096),
            "shifted chunk 8192": shifted(LENGTH, 8192),
            "SCCA flow 2048": flow(LENGTH, 2048),
            "dense causal": causal(LENGTH),
        }.items()
    }
    report["one decoded token, host us"] = decode_overhead()
    write(report, options.out / options.name)


def compare(name: str, ranges: KeyRanges, mask: MaskMod) -> dict[str, dict[str, float]]:
    """Check our kernel against the hand-written mask at full length, then time all rivals."""
    pairs = int((ranges.hi_GNm - ranges.lo_GNm).sum((1, 2))[ranges.group_BH].sum())
    hand, build = by_hand(mask, LENGTH, per_head=ranges.groups > 1)
    rivals = {"flex": ours(ranges), "hand-written mask": hand}
    leaves = tensors(LENGTH, grad=True)
    slope = torch.randn_like(leaves[0])
    outs = [attend(*leaves) for attend in rivals.values()]
    grads = [torch.autograd.grad(out, leaves, slope) for out in outs]
    apart = max(map(relative, (outs[0], *grads[0]), (outs[1], *grads[1])))
    print(f"{name}: apart from the hand-written mask by {apart:.1e}", flush=True)
    assert apart < 1e-2, name
    if name == "dense causal":
        rivals["cuDNN SDPA"] = dense(SDPBackend.CUDNN_ATTENTION)
        rivals["FlashAttention-2 SDPA"] = dense(SDPBackend.FLASH_ATTENTION)
    results = race(rivals, pairs)

    def lists() -> object:
        again = KeyRanges(ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH, ranges.keys)
        return tile_lists(again)

    for rival, work in (("flex", lists), ("hand-written mask", build)):
        results[rival]["mask ms"] = statistics.median(seconds(work) for _ in range(7)) * 1e3
    for rival, row in results.items():
        print(f"{name}, {rival}:", {key: round(x, 3) for key, x in row.items()}, flush=True)
    return results


def decode_overhead() -> float:
    """Microseconds of host time for one row against 4096 keys, plan included once."""
    first = torch.zeros(1, 1, 1, dtype=torch.int32, device="cuda")
    alike = torch.zeros(1, HEADS, dtype=torch.long, device="cuda")
    ranges = KeyRanges(first, first + 4096, alike, 4096)
    q, k, v = (
        x[:, :, :length].contiguous()
        for x, length in zip(tensors(4096), (1, 4096, 4096), strict=True)
    )
    with torch.no_grad():
        calls = [seconds(lambda: flex(q, k, v, ranges, SCALE)) for _ in range(200)]
    return statistics.median(calls) * 1e6


def write(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    ten = report["ten windows"]
    kinds = ("forward", "forward+backward")
    lines = [
        "# The flex kernel on one GPU",
        "",
        f"{report['device']}, torch {report['torch']}; {report['shape']}.",
        "",
        "    PYTHONPATH=src python benchmarks/gpu_flex.py --out benchmarks/results --name "
        + path.name,
        "",
        "TFLOP/s on visible pairs (4 D per pair and head, 14 D with backward), median of 25.",
        "",
        "| case | kernel | forward ms | TFLOP/s | forward+backward ms | TFLOP/s | mask ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, rivals in report["cases"].items():
        for rival, row in rivals.items():
            cells = [
                f"{row[f'{k} {unit}']:.{d}f}"
                for k in kinds
                for unit, d in (("ms", 2), ("TFLOP/s", 0))
            ]
            mask = f"{row['mask ms']:.1f}" if "mask ms" in row else ""
            lines.append("| " + " | ".join([case, rival, *cells, mask]) + " |")
    lines += [
        "",
        f"Ten windows at this length compiled {ten['compilations, ten patterns']} graph "
        f"(first call {ten['first call s']:.1f} s, slowest later call, plan included, "
        f"{ten['slowest later call with its plan ms']:.1f} ms).",
        f"One decoded token, 4096 keys: {report['one decoded token, host us']:.0f} us.",
        "",
        "Relative errors against float32 (gradients through out and lse):",
        "",
        "| case | out | lse | dq | dk | dv |",
        "|---|---|---|---|---|---|",
    ]
    for case, errors in report["relative errors"].items():
        lines.append("| " + " | ".join([case, *(f"{x:.1e}" for x in errors.values())]) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
