"""Sequences, patterns and placements on which ranks must equal one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import longspan as ls

WIDTH, VALUE_WIDTH = 8, 6

# Three documents behind padding, in two batch rows that differ; neither ends with a shard.
DOCUMENTS = np.stack(
    [np.repeat([-1, 0, 1, 2], [5, 40, 30, 16]), np.repeat([0, 1, -1], [9, 70, 12])]
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call, for any number of ranks.

    Attributes:
        pattern: where queries look.
        shards: "even", "zigzag", or "uneven": rank 0 has no rows, rank 1 most.
        n: rows of the whole sequence.
        batch: batch rows.
        heads: query heads.
        key_heads: key heads.
        segments: as for ``attend``.
        dtype: of the tensors.
        changed: rows from here on hold other numbers.
        graded: only rows before this one enter the loss.
    """

    pattern: ls.Pattern
    shards: str = "even"
    n: int = 91
    batch: int = 1
    heads: int = 4
    key_heads: int = 2
    segments: Any = None
    dtype: torch.dtype = torch.float64
    changed: int | None = None
    graded: int | None = None

    def lie(self, ranks: int) -> ls.parallel.Shards:
        """Which rows lie where."""
        if self.shards == "uneven":
            first = 0 if ranks == 2 else self.n * 2 // 3
            sizes = [0, first, *[0] * (ranks - 3)][: ranks - 1]
            return ls.parallel.Shards.of_sizes([*sizes, self.n - sum(sizes)])
        return getattr(ls.parallel.Shards, self.shards)(self.n, ranks)

    def tensors(self) -> list[Tensor]:
        """The whole q, k, v, and the gradients of out and lse."""
        whole = self._draw(0)
        if self.changed is not None:
            for one, other in zip(whole[:3], self._draw(1)[:3], strict=True):
                one[:, :, self.changed :] = other[:, :, self.changed :]
        if self.graded is not None:
            for one in whole[3:]:
                one[:, :, self.graded :] = 0
        return [one.to(self.dtype) for one in whole]

    def _draw(self, seed: int) -> list[Tensor]:
        rng = torch.Generator().manual_seed(seed)
        shapes = [
            (self.batch, self.heads, self.n, WIDTH),
            (self.batch, self.key_heads, self.n, WIDTH),
            (self.batch, self.key_heads, self.n, VALUE_WIDTH),
            (self.batch, self.heads, self.n, VALUE_WIDTH),
            (self.batch, self.heads, self.n),
        ]
        return [torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes]


def graded(attend: Any, tensors: list[Tensor]) -> list[Tensor]:
    """out, lse and the gradients of q, k and v; ``attend`` takes q, k and v."""
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors[:3])
    out, lse = attend(q, k, v)
    # A row without keys has lse -inf, and no gradient.
    loss = (out * tensors[3]).sum() + (lse.masked_fill(lse.isneginf(), 0) * tensors[4]).sum()
    loss.backward()
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return [out.detach(), lse.detach(), q.grad, k.grad, v.grad]


_PATTERNS = {
    "causal": ls.Causal(),
    "dense": ls.Dense(),
    "window": ls.Window(12),
    "window both sides": ls.Window(12, causal=False),
    "window and sink": ls.Window(12) | ls.Sink(3),
    "dilated per head": ls.Dilated(5, (1, 2, 4, 8)),
    "ssa": ls.SSA(6, 4),
    "scca flow": ls.SCCA.flow(16),
    "longnet": ls.LongNet((16, 64), (1, 4)),
    "longformer": ls.longformer(8, tokens=(0, 50)),
    "bigbird": ls.bigbird(8, 3),
    "random blocks": ls.RandomBlocks(8, 2),
    "random blocks both sides": ls.RandomBlocks(8, 2, causal=False),
    "neighborhood": ls.Neighborhood(7, 2),
    "edge blocks": ls.EdgeBlocks(8, 1, 1) | ls.Chunk(16, causal=False),
    # Which keys are at the edge depends on a last row that no query of rank 0 sees.
    "edges near by": (ls.EdgeBlocks(8) & ls.Chunk(16, causal=False)) | ls.Window(2),
    "heads": ls.PerHead(ls.Window(9), ls.Strided(8)),
    "keeps itself": ls.Strided(64) - ls.Window(2),
}

CASES = {
    **{name: Case(pattern=pattern, shards="even") for name, pattern in _PATTERNS.items()},
    **{
        f"{name}, {shards}": Case(pattern=_PATTERNS[name], shards=shards)
        for name in ("causal", "window and sink", "longnet", "neighborhood", "scca flow")
        for shards in ("zigzag", "uneven")
    },
    **{
        f"documents, {name}, {shards}": Case(
            pattern=_PATTERNS[name], shards=shards, batch=2, segments=DOCUMENTS
        )
        for name in ("causal", "ssa", "longnet", "neighborhood", "longformer")
        for shards in ("even", "zigzag")
    },
    "documents that are alike": Case(
        pattern=_PATTERNS["window and sink"], batch=3, segments=DOCUMENTS[0]
    ),
    "batch": Case(pattern=_PATTERNS["ssa"], batch=3, key_heads=4),
    "one key head": Case(pattern=_PATTERNS["scca flow"], key_heads=1),
    "nothing to ask": Case(pattern=ls.Window(1), shards="even"),
    "padding alone on a rank": Case(
        pattern=ls.Window(12), segments=np.repeat([0, -1], [20, 71]), shards="even"
    ),
    "fewer rows than ranks": Case(pattern=ls.Causal(), n=2, shards="uneven"),
    "float32": Case(pattern=_PATTERNS["ssa"], dtype=torch.float32, shards="zigzag"),
    "bfloat16": Case(pattern=_PATTERNS["window and sink"], dtype=torch.bfloat16),
    "leak": Case(pattern=_PATTERNS["ssa"], shards="zigzag", graded=50),
    "leak, later rows changed": Case(
        pattern=_PATTERNS["ssa"], shards="zigzag", graded=50, changed=50
    ),
}
