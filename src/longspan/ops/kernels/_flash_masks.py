"""Key ranges as masks of FlashAttention: windows inside segments, recognised from the numbers.

    lo_i = max(s_i, i - l),  hi_i = min(e_i, i + r + 1)      [s_i, e_i): the segment of row i

with one pair l, r for all rows. Segments are looked for where no row sees across.

Axes: B batch, H query heads, N query rows, G range groups, r runs of heads; Z is the batch rows
that differ in what they see, else 1, and R = Z N: batch rows are segments like others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.ops.ranges import KeyRanges

# Each is a call of its own, and outputs and gradients are joined by copies.
MOST_RUNS = 4
# Segments begin with a tile of their own: shorter ones leave most of it unused.
LEAST_SEGMENT = 128


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring heads that see the same.

    Attributes:
        heads: how many query heads.
        starts: where segments begin in R rows, and R.
        left: keys before its own that a query sees at most.
        right: keys behind it.
        kept: ``starts`` on a device, for a number of batch rows.
    """

    heads: int
    starts: NDArray[np.int64]
    left: int
    right: int
    kept: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Rows of the longest segment."""
        return int(np.diff(self.starts).max())

    @cached_property
    def equal(self) -> bool:
        """Whether all segments are as long."""
        return bool((np.diff(self.starts) == self.starts[1]).all())

    def window(self) -> dict[str, Any]:
        """The mask inside a segment as arguments: keys beside the query's own, None for all."""
        most = self.longest - 1
        if self.left >= most and self.right >= most:
            return {"causal": False, "window_size": (None, None)}
        if self.left >= most and self.right == 0:
            return {"causal": True, "window_size": (None, None)}
        return {"causal": self.right == 0, "window_size": (self.left, self.right)}

    def starts_on(self, device: torch.device, rows: int) -> Tensor:
        """Cumulative lengths for all rows of the batch, int32."""
        if (device, rows) not in self.kept:
            own = int(self.starts[-1])
            starts = self.starts[:-1] + np.arange(0, rows, own)[:, None]
            starts = np.append(starts, rows).astype(np.int32)
            # A backward saves them, and tensors of inference mode cannot be saved.
            with torch.inference_mode(False):
                self.kept[device, rows] = torch.from_numpy(starts).to(device)
        return self.kept[device, rows]


_runs: WeakKeyDictionary[KeyRanges, tuple[Run, ...] | str] = WeakKeyDictionary()


def runs_of(ranges: KeyRanges) -> tuple[Run, ...] | str:
    """The runs of heads and their masks, or why there are none; kept as long as the ranges."""
    if ranges not in _runs:
        _runs[ranges] = _recognised(ranges)
    return _runs[ranges]


def _recognised(ranges: KeyRanges) -> tuple[Run, ...] | str:
    if ranges.lo_GNm.shape[2] > 1:
        return f"one range per query, these have up to {ranges.lo_GNm.shape[2]}"
    if ranges.queries != ranges.keys:
        return f"as many keys as queries, got {ranges.keys} and {ranges.queries}"
    group_ZH = ranges.group_BH.cpu().numpy()
    if (group_ZH == group_ZH[:1]).all():
        group_ZH = group_ZH[:1]
    turns = np.flatnonzero((group_ZH[:, 1:] != group_ZH[:, :-1]).any(0)) + 1
    if len(turns) >= MOST_RUNS:
        return (
            f"at most {MOST_RUNS} runs of neighbouring heads that see the same, these are "
            f"{len(turns) + 1}"
        )
    first = [0, *turns.tolist(), group_ZH.shape[1]]
    group_rZ = torch.from_numpy(group_ZH[:, first[:-1]].T.copy()).to(ranges.lo_GNm.device)
    ends = torch.stack([ranges.lo_GNm[..., 0], ranges.hi_GNm[..., 0]])[:, group_rZ]
    lo_rZN, hi_rZN = ends.cpu().numpy().astype(np.int64)
    runs = []
    for lo_ZN, hi_ZN, (begin, end) in zip(lo_rZN, hi_rZN, pairwise(first), strict=True):
        run = _run(lo_ZN, hi_ZN, end - begin)
        if isinstance(run, str):
            return run
        runs.append(run)
    return tuple(runs)


def _run(lo_ZN: NDArray[np.int64], hi_ZN: NDArray[np.int64], heads: int) -> Run | str:
    if (lo_ZN >= hi_ZN).any():
        return "every query must see a key, some see none"
    batch, rows = lo_ZN.shape
    row_R = np.arange(batch * rows)
    lo_R, hi_R = ((x + rows * np.arange(batch)[:, None]).ravel() for x in (lo_ZN, hi_ZN))
    left, right = int((row_R - lo_R).max()), int((hi_R - 1 - row_R).max())
    sees_itself = bool(((lo_R <= row_R) & (row_R < hi_R)).all())
    # Between which rows nobody looks, neither ahead nor back.
    ahead = np.maximum.accumulate(hi_R)[:-1] <= row_R[1:]
    back = np.minimum.accumulate(lo_R[::-1])[::-1][1:] >= row_R[1:]
    whole = np.arange(0, len(row_R) + 1, rows)
    cut = np.concatenate([[0], np.flatnonzero(ahead & back) + 1, [len(row_R)]])
    for starts in (whole, cut) if sees_itself else ():
        begin, end = (np.repeat(x, np.diff(starts)) for x in (starts[:-1], starts[1:]))
        same = lo_R == np.maximum(begin, row_R - left)
        if not (same & (hi_R == np.minimum(end, row_R + right + 1))).all():
            continue
        # The last one of each batch row may be short.
        if LEAST_SEGMENT * (len(starts) - 1 - batch) > len(row_R):
            return f"segments of less than {LEAST_SEGMENT} rows leave most of a tile unused"
        return Run(heads, starts, left, right)
    return "the ranges are not those of one window, or of segments with one window"
