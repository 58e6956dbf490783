"""Query heads of a key head as rows of one, where there are few rows.

    q [B, K S, n, D]  as  [B, K, S n, D]

A tile has 128 queries, and reads all keys for a few of them as well: one query of a decoding step,
or three global tokens. Heads that share a key head and see the same keys then fill it together
(grouped queries packed, as in FlashAttention-2 and FlashInfer), so that keys are read once for all
of them. A view where rows of neighbouring heads follow each other in memory, else a copy of few
rows.

O(G S n m) time and memory for the bounds, with a wait where heads may differ, once for the ranges.

Axes: B batch, H = K S query heads, K key heads, S query heads of a key head, n query rows, G range
groups, m ranges per query, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.capability import PlacedHalves
from longspan.ops.empty import Index
from longspan.ops.ranges import KeyRanges

# Half a tile: two heads fill one.
FEW_ROWS = 64

_kept: WeakKeyDictionary[KeyRanges, dict[tuple[int, int], KeyRanges | None]] = WeakKeyDictionary()


def heads_as_rows(ranges: KeyRanges, heads: int, key_heads: int) -> KeyRanges | None:
    """The ranges of S n rows of each key head; kept as long as ``ranges`` lives.

    None where heads stay as they are.

    Args:
        ranges: visible keys of n rows.
        heads: query heads.
        key_heads: key heads, which divide them.
    """
    share = heads // key_heads
    if share == 1 or ranges.queries > FEW_ROWS:
        return None
    kept = _kept.setdefault(ranges, {})
    if (heads, key_heads) not in kept:
        group_BKS = ranges.group_BH.unflatten(1, (key_heads, share))
        # One group needs no look, and no wait in each step of decoding.
        alike = ranges.groups == 1 or bool((group_BKS == group_BKS[..., :1]).all())
        kept[heads, key_heads] = _made(ranges, group_BKS) if alike else None
    return kept[heads, key_heads]


# Training reads what is made here, whoever asks first.
@torch.inference_mode(False)
def _made(ranges: KeyRanges, group_BKS: Tensor) -> KeyRanges:
    share = group_BKS.shape[2]
    lo_GRm, hi_GRm = (x.repeat(1, share, 1) for x in (ranges.lo_GNm, ranges.hi_GNm))
    group_BK = group_BKS[..., 0].contiguous()
    return replace(ranges, lo_GNm=lo_GRm, hi_GNm=hi_GRm, group_BH=group_BK)


@dataclass(frozen=True, eq=False)
class HeadsAsRows:
    """``PlacedHalves`` over heads by those over rows.

    Attributes:
        rows: over queries [B, K, S n, D].
        share: query heads of a key head S.
        empty: rows [B, H, n] that see no key, where there is a backward.
    """

    rows: PlacedHalves
    share: int
    empty: Index | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        found, lse = self.rows.forward(self._packed(q), k, v)
        return self._put(found, q, out), self._unpacked(lse)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
        into: Sequence[Tensor | None] = (),
        after: torch.cuda.Event | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        dout, dlse = (None if x is None else self._packed(x) for x in (dout, dlse))
        rows = self._packed(q), k, v, self._packed(out), self._packed(lse)
        to_q, *to_others = into or (None, None, None)
        dq, dk, dv = self.rows.backward(*rows, dout, dlse, (None, *to_others), after)
        return None if dq is None else self._put(dq, q, to_q), dk, dv

    def _packed(self, x_BHn: Tensor) -> Tensor:
        return x_BHn.unflatten(1, (-1, self.share)).flatten(2, 3)

    def _unpacked(self, x_BKR: Tensor) -> Tensor:
        return x_BKR.unflatten(2, (self.share, -1)).flatten(1, 2)

    def _put(self, found_BKRD: Tensor, q_BHnD: Tensor, place: Tensor | None) -> Tensor:
        """Rows of heads, where they belong or laid out in memory as the queries."""
        found_BHnD = self._unpacked(found_BKRD)
        if place is None:
            if found_BHnD.shape[3] != q_BHnD.shape[3] or q_BHnD.is_contiguous():
                return found_BHnD
            place = torch.empty_like(q_BHnD)
        return place.copy_(found_BHnD)
