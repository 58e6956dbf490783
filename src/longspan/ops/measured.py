"""Which CUDA kernel is fastest, by measurement: a small table for each GPU model.

``measured.json`` holds for each model the rates of all kernels on a few patterns and the command
that measured them (``benchmarks/gpu_routes.py``, and ``benchmarks/gpu_blocks.py`` for scattered
blocks). A pass is compared with the nearest case: same direction, then how much of the tiles of
128 it fills, and where it leaves some empty, whether two heads of a key head see the same;
width, keys per query, whether heads differ, and whether queries have several ranges.
A kernel that this case lacks counts with three quarters of its rate on the nearest case that has
it. Passes that are joined in training, with one backward, are compared together with cases of
several passes. A model that nobody measured goes by one of the same compute capability: shares of
what the chip can do change less between models than between architectures. For want of one, and
for short inputs, where making a plan costs more than the kernel, the order of the kernels holds.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.ranges import KeyRanges
from longspan.ops.whole_blocks import fill

# Query rows of all batch rows from which the table holds; below it the host, not the GPU, sets the
# time. And those of one, which fill a tile.
LEAST_QUERIES, _LEAST_OF_ONE = 2048, 128
# A case is near where, all else alike, its queries have up to four times as many keys or as few.
_NEAR = 2.0
# What was measured on the nearest case comes before what was not, unless it is much slower.
_ELSEWHERE = 0.75

_shapes: WeakKeyDictionary[KeyRanges, tuple[float, bool, float, bool]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The measured case that is nearest to a pass.

    Attributes:
        gpu: model it was measured on, and if that is another than this one.
        case: what was measured, in words.
        tflops: rate of each kernel that was measured on it.
        elsewhere: of the others, on the nearest case that they were measured on, if it is near.
    """

    gpu: str
    case: str
    tflops: Mapping[str, float]
    elsewhere: Mapping[str, float] = field(default_factory=dict)

    def rate(self, kernel: str) -> float:
        """What to expect of a kernel, 0 if nothing is known."""
        return self.tflops.get(kernel, _ELSEWHERE * self.elsewhere.get(kernel, 0.0))


def rates(q_BHND: Tensor, ranges: KeyRanges, backward: bool, key_heads: int = 1) -> Rates | None:
    """The nearest measured case, None if there is none for this GPU or these sizes."""
    gpu, cases = _cases(q_BHND, ranges)
    if not cases:
        return None
    alone = [case for case in cases if case.get("passes", 1) == 1]
    several = ranges.lo_GNm.shape[2] > 1
    keys, apart, filled, alike = shape_of(ranges)
    # Two neighbours have one key head.
    by_twos = filled == 1 or (alike and q_BHND.shape[1] // key_heads % 2 == 0)
    width = q_BHND.shape[-1]
    return nearest(gpu, alone, width, keys, apart, filled, by_twos, several, backward)


def rates_together(passes: Sequence[tuple[Tensor, KeyRanges]]) -> Rates | None:
    """The nearest measured case of several passes with a backward; None if there is none near.

    Args:
        passes: queries [B, H, N, D] and visible keys of each.
    """
    first_q = passes[0][0]
    sizes = [math.prod(q_BHND.shape[:-1]) for q_BHND, _ in passes]
    gpu, cases = _cases(*passes[sizes.index(max(sizes))])
    if not cases:
        return None
    pairs = sum(
        size * shape_of(ranges)[0] for size, (_, ranges) in zip(sizes, passes, strict=True)
    )
    several = any(ranges.lo_GNm.shape[2] > 1 for _, ranges in passes)

    def distance(case: Mapping[str, Any]) -> float:
        more = abs(math.log2(case["passes"] / len(passes)))
        return more + _apart(case, first_q.shape[-1], pairs / max(sizes), several)

    joined = [case for case in cases if case.get("passes", 1) > 1 and case["backward"]]
    case = min(joined, key=distance, default=None)
    if case is None or distance(case) > _NEAR:
        return None
    return Rates(gpu=gpu, case=_name(case), tflops=case["tflops"])


def _cases(q_BHND: Tensor, ranges: KeyRanges) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """The GPU to go by, in words, and all of its cases; none for sizes that were not measured."""
    device = q_BHND.device
    half = q_BHND.dtype in (torch.bfloat16, torch.float16)
    rows = q_BHND.shape[0] * ranges.queries
    few = rows < LEAST_QUERIES or ranges.queries < _LEAST_OF_ONE
    if device.type != "cuda" or few or not half:
        return "", ()
    gpu = torch.cuda.get_device_name(device)
    if gpu in table():
        return gpu, table()[gpu]["cases"]
    # AMD's numbers mean something else.
    capability = None if torch.version.hip else list(torch.cuda.get_device_capability(device))
    for other, found in table().items():
        if capability and found.get("capability") == capability:
            return f"{other}, of the same compute capability ({gpu} was not)", found["cases"]
    return "", ()


@functools.cache
def table() -> dict[str, Any]:
    """Cases by GPU model."""
    return stored()["gpus"]


def stored() -> dict[str, Any]:
    """The whole file."""
    file = resources.files("longspan.ops").joinpath("measured.json")
    return json.loads(file.read_text(encoding="utf-8"))


def shape_of(ranges: KeyRanges) -> tuple[float, bool, float, bool]:
    """Mean keys of a query, whether heads differ, how much of the tiles the pairs fill, and
    whether heads see the same by twos, true where that is all.

    Kept as long as the ranges live.
    """
    if ranges not in _shapes:
        group_BH = ranges.group_BH
        keys_G = (ranges.hi_GNm - ranges.lo_GNm).sum((1, 2), dtype=torch.int64)
        keys = keys_G[group_BH].double().mean() / ranges.queries
        apart = bool((group_BH != group_BH[:, :1]).any())
        filled = fill(ranges)
        # Full tiles are not worth the wait for a look.
        by_twos = filled == 1 or _by_twos(group_BH)
        _shapes[ranges] = float(keys), apart, filled, by_twos
    return _shapes[ranges]


def _by_twos(group_BH: Tensor) -> bool:
    even = group_BH.shape[1] % 2 == 0
    return even and bool((group_BH[:, ::2] == group_BH[:, 1::2]).all())


def nearest(
    gpu: str,
    cases: Iterable[Mapping[str, Any]],
    width: int,
    keys: float,
    apart: bool,
    filled: float,
    by_twos: bool,
    several: bool,
    backward: bool,
) -> Rates | None:
    """The nearest of some measured cases; sizes are compared by their ratio."""

    def distance(case: Mapping[str, Any]) -> float:
        dense = abs(math.log2(case.get("fill", 1.0) / max(filled, 1e-3)))
        differ = (case["apart"] != apart) + 2 * (case.get("by_twos", True) != by_twos)
        return 2 * dense + differ + _apart(case, width, keys, several)

    same = sorted((case for case in cases if case["backward"] == backward), key=distance)
    if not same:
        return None
    case, *others = same
    elsewhere: dict[str, float] = {}
    for other in others:
        if distance(other) <= _NEAR:
            elsewhere = {**other["tflops"], **elsewhere}
    return Rates(
        gpu=gpu,
        case=_name(case),
        tflops=case["tflops"],
        elsewhere={name: x for name, x in elsewhere.items() if name not in case["tflops"]},
    )


def _apart(case: Mapping[str, Any], width: int, keys: float, several: bool) -> float:
    """How far a case is in width, keys of a query, and whether queries have several ranges."""
    wide = abs(math.log2(case["width"] / width))
    long = abs(math.log2(case["keys"] / max(keys, 1.0)))
    return 2 * wide + long + 0.5 * (case.get("several", False) != several)


def _name(case: Mapping[str, Any]) -> str:
    way = "forward and backward" if case["backward"] else "forward"
    return f"{case['pattern']}, width {case['width']}, {way}"
