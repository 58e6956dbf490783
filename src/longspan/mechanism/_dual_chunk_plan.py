"""Sizes and passes of Dual Chunk Attention, see ``longspan.mechanism.dual_chunk``.

Axes: B batch, N query rows, M key rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.errors import PatternError
from longspan.pattern import parse
from longspan.pattern.algebra import whole
from longspan.planning import Plan, plan
from longspan.planning.layout import layouts

_RATES = {"none": 0.0, "chunkllama": 0.05, "vllm": 0.1}


@dataclass(frozen=True, kw_only=True)
class DualChunk:
    """The sizes of Dual Chunk Attention, in the paper's words.

    Attributes:
        chunk: s, tokens of a chunk; three quarters of the trained context in the paper.
        local: w, distance up to which neighbours across a border stay exact; 1 <= w <= s. The
            largest distance is ``chunk + local - 1``.
        temperature: ``none`` as in the paper; ``chunkllama`` and ``vllm`` multiply the logits by
            (1 + r ln(length / trained))^2 beyond the trained length, with r = 0.05 and 0.1.
        trained: for the temperature; default ``chunk + local``.
        length: for the temperature; default: of each query, the tokens up to it.
    """

    chunk: int
    local: int
    temperature: str = "none"
    trained: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("chunk", "local", "trained", "length"):
            if (value := getattr(self, name)) is not None or name in ("chunk", "local"):
                object.__setattr__(self, name, whole("DualChunk", name, value, 1))
        if self.local > self.chunk:
            raise PatternError(
                f"DualChunk: local must be at most chunk, got local {self.local} and chunk "
                f"{self.chunk}: distances to the chunk before would exceed those further back"
            )
        if self.temperature not in tuple(_RATES):
            raise PatternError(
                f"DualChunk: temperature must be one of {', '.join(_RATES)}; got "
                f"{self.temperature!r}"
            )

    @classmethod
    def for_length(cls, trained: int, **rest: Any) -> DualChunk:
        """The paper's sizes for a trained context: chunks of three quarters of it."""
        trained = whole("DualChunk.for_length", "trained", trained, 2)
        return cls(chunk=trained * 3 // 4, local=trained - trained * 3 // 4, **rest)

    @classmethod
    def from_code(cls, chunk_size: int, local_size: int, **rest: Any) -> DualChunk:
        """From ``chunk_size`` and ``local_size`` of ChunkLlama, vLLM and Qwen's configurations.

        Their chunk is ``chunk_size - local_size`` long, and their largest distance ``chunk_size``.
        """
        chunk_size = whole("DualChunk.from_code", "chunk_size", chunk_size, 1)
        local_size = whole("DualChunk.from_code", "local_size", local_size, 0)
        return cls(chunk=chunk_size - local_size, local=local_size + 1, **rest)

    def __str__(self) -> str:
        words = [f"chunk={self.chunk}", f"local={self.local}"]
        if self.temperature != "none":
            words.append(f"temperature={self.temperature}")
            words += [
                f"{name}={value}"
                for name, value in (("trained", self.trained), ("length", self.length))
                if value is not None
            ]
        return f"dual_chunk({', '.join(words)})"

    def growth(self, query: Any) -> Any:
        """Length over trained length, at least 1, for queries at these positions."""
        length = query + 1 if self.length is None else query * 0 + self.length
        return (length / (self.trained or self.chunk + self.local)).clip(min=1)

    @property
    def rate(self) -> float:
        """Logits are multiplied by (1 + rate ln(growth))^2."""
        return _RATES[self.temperature]

    def passes(self, query: Any) -> tuple[tuple[str, Any, Any], ...]:
        """What queries at these positions (numpy or torch) see 0, 1 and 2 or more chunks back.

        Returns:
            For each, a pattern, the positions for which to ask it, with keys moved on by that many
            chunks, and the places that queries are rotated to.
        """
        s, last, own = self.chunk, self.chunk + self.local - 1, query % self.chunk
        return (
            (f"chunk({s})", query, own),
            (f"chunk({s}, causal=false)", query, (own + s).clip(max=last)),
            ("causal()", query - own + (s - 1), own * 0 + last),
        )


@dataclass(frozen=True, eq=False)
class DualChunkPlan:
    """Where the keys of each pass lie and where its queries stand.

    Attributes:
        passes: plan, and place to which queries are rotated [B or 1, N]; at most three.
        position: of the queries inside their segment [B or 1, N].
        key_place: place to which keys are rotated [B or 1, M].
        factor: on the logits [B or 1, N]; None for 1.
    """

    passes: tuple[tuple[Plan, NDArray[np.int64]], ...]
    position: NDArray[np.int64]
    key_place: NDArray[np.int64]
    factor: NDArray[np.float64] | None
    _kept: dict[tuple[str | int, torch.device], Tensor] = field(default_factory=dict)

    def table(self, name: str | int, device: torch.device) -> Tensor:
        """``key_place``, ``factor`` or the places of a pass by its number, kept on a device.

        Copied anew in every call they would make the device wait for the host.
        """
        if (name, device) not in self._kept:
            array = self.passes[name][1] if isinstance(name, int) else getattr(self, name)
            self._kept[name, device] = torch.from_numpy(array).to(device)
        return self._kept[name, device]


def lay_out(
    config: DualChunk, n: int, heads: int, *, keys: int | None = None, **rows: Any
) -> DualChunkPlan:
    """Plan the passes.

    Args:
        config: sizes.
        n: query rows.
        heads: query heads.
        keys: key rows; default ``n``; fewer queries than keys are the last rows.
        rows: ``positions``, ``segments``, ``key_positions``, ``key_segments`` as for
            ``longspan.plan``.

    Raises:
        PlanError: if positions or segments do not fit.
    """
    found = layouts(n, n if keys is None else keys, **rows)
    names = ("query_position", "query_segment", "key_position", "key_segment")
    query, segments, key, key_segments = (
        np.stack([getattr(layout, name) for layout in found]) for name in names
    )
    passes = []
    for back, (pattern, at, place) in enumerate(config.passes(query)):
        laid = plan(
            parse(pattern),
            n,
            heads,
            keys=keys,
            positions=at,
            segments=segments,
            key_positions=key + back * config.chunk,
            key_segments=key_segments,
        )
        # Pairs are a mean over the batch, rounded down: a single row may need the pass.
        if back == 0 or any(one.heads for one in laid.passes):
            passes.append((laid, place))
    rate = config.rate
    factor = (1 + rate * np.log(config.growth(query))) ** 2 if rate else None
    return DualChunkPlan(tuple(passes), query, key % config.chunk, factor)


plain_plan = lru_cache(maxsize=16)(lay_out)


def tokens(n: int, keys: int, **rows: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which query rows [B, N] and key rows [B, M] are no padding; rows as for ``lay_out``."""
    found = layouts(n, keys, **rows)
    names = ("query_segment", "key_segment")
    query, key = (np.stack([getattr(layout, name) for layout in found]) >= 0 for name in names)
    return query, key
