"""Which rows of a sequence lie on which rank.

    even       0 0 0 0 1 1 1 1 2 2 2 2      neighbours together: a window asks one neighbour
    zigzag     0 0 1 1 2 2 2 2 1 1 0 0      an early and a late piece each: equal work if causal

Plain numbers, known to all ranks; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from longspan.errors import InputError
from longspan.pattern.algebra import END, Positions

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shards:
    """The rows of each rank, as stretches ``[start, stop)`` of rows of the whole sequence.

    Attributes:
        runs: for each rank its stretches, in the order in which its rows lie in its tensors.
            Together they are all rows, each once; a rank may have none.

    Raises:
        InputError: if a row is missing or on two ranks, or a stretch is none.
    """

    runs: tuple[Runs, ...]

    def __post_init__(self) -> None:
        try:
            runs = tuple(
                tuple((int(start), int(stop)) for start, stop in of_rank) for of_rank in self.runs
            )
        except (TypeError, ValueError):
            raise InputError(
                "Shards: expected for each rank a list of stretches (start, stop), such as "
                f"(((0, 8),), ((8, 16),)) for two ranks; got {self.runs!r:.200}"
            ) from None
        # Rows of no stretch cannot be seen, and a rank more or less would hang all others.
        end = 0
        for start, stop in sorted(run for of_rank in runs for run in of_rank if run[0] < run[1]):
            if start != end:
                what = "missing" if start > end else "on two ranks, or twice on one"
                raise InputError(
                    f"Shards: row {min(start, end)} is {what}; stretches must hold each row once"
                )
            end = stop
        if any(start > stop or start < 0 for of_rank in runs for start, stop in of_rank):
            raise InputError(f"Shards: stretches are (start, stop), start <= stop; got {runs}")
        if not 0 < end < END:
            raise InputError(f"Shards: expected from 1 to {END - 1} rows, got {end}")
        object.__setattr__(self, "runs", runs)

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Shards:
        """Neighbouring rows together: the first ``sizes[0]`` on rank 0, and so on."""
        if isinstance(sizes, int | str) or any(not _whole(size, 0) for size in sizes):
            raise InputError(f"Shards: expected the number of rows of each rank, got {sizes!r}")
        edges = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).tolist()
        return cls(tuple(((a, b),) for a, b in pairwise(edges)))

    @classmethod
    def even(cls, n: int, ranks: int) -> Shards:
        """Neighbouring rows together, as many on each rank; the first ones may have one more."""
        _check(n, ranks)
        return cls.of_sizes([n // ranks + (r < n % ranks) for r in range(ranks)])

    @classmethod
    def zigzag(cls, n: int, ranks: int) -> Shards:
        """Of twice as many pieces as ranks, rank r has piece r and the r-th from the end.

        Under a causal pattern late rows see more keys than early ones: so all ranks work alike.
        """
        _check(n, ranks)
        pieces = cls.even(n, 2 * ranks).runs
        return cls(tuple((pieces[r][0], pieces[-1 - r][0]) for r in range(ranks)))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.runs)

    @cached_property
    def n(self) -> int:
        """Number of rows of the whole sequence."""
        return max(stop for of_rank in self.runs for _, stop in of_rank)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of rows of each rank."""
        return tuple(sum(stop - start for start, stop in of_rank) for of_rank in self.runs)

    def rows(self, rank: int) -> Positions:
        """The rows of a rank, int64 [rows], in the order in which they lie there."""
        return np.concatenate(
            [np.arange(0), *(np.arange(start, stop) for start, stop in self.runs[rank])]
        ).astype(np.int64)

    def take(self, x: Any, rank: int, dim: int = -1) -> Any:
        """A rank's part of a tensor that all of it is at hand of, such as token ids.

        Args:
            x: tensor with ``n`` rows in ``dim``.
            rank: whose part.
            dim: the axis of the rows.

        Raises:
            InputError: if the axis has another number of rows.
        """
        import torch

        if not isinstance(x, torch.Tensor) or x.shape[dim] != self.n:
            given = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputError(f"expected a tensor with {self.n} rows in axis {dim}, got {given}")
        return x.index_select(dim, torch.from_numpy(self.rows(rank)).to(x.device))

    def join(self, parts: Sequence[Any], dim: int = -1) -> Any:
        """The whole tensor from the parts of all ranks, in order of the ranks; undoes ``take``.

        Raises:
            InputError: if there is not one part for each rank, or their rows do not fit.
        """
        import torch

        sizes = tuple(part.shape[dim] for part in parts)
        if sizes != self.sizes:
            raise InputError(f"expected parts of {self.sizes} rows in axis {dim}, got {sizes}")
        order = np.argsort(np.concatenate([self.rows(rank) for rank in range(self.ranks)]))
        whole = torch.cat(list(parts), dim)
        return whole.index_select(dim, torch.from_numpy(order).to(whole.device))

    def __str__(self) -> str:
        """Each rank with its stretches."""
        return "; ".join(
            f"rank {rank}: " + (", ".join(f"{a}-{b}" for a, b in of_rank if a < b) or "no rows")
            for rank, of_rank in enumerate(self.runs)
        )


def shards_of(asked: Shards | str, n: int, ranks: int) -> Shards:
    """Shards from what a caller said: themselves, ``"even"`` or ``"zigzag"``.

    Raises:
        InputError: for another word, or shards of another number of rows or ranks.
    """
    named = {"even": Shards.even, "zigzag": Shards.zigzag}
    if isinstance(asked, str) and asked in named:
        return named[asked](n, ranks)
    if not isinstance(asked, Shards):
        raise InputError(f'shards must be "even", "zigzag" or Shards(...), got {asked!r}')
    if (asked.n, asked.ranks) != (n, ranks):
        raise InputError(
            f"the shards are for {asked.n} rows on {asked.ranks} ranks, not for {n} on {ranks}"
        )
    return asked


def _check(n: int, ranks: int) -> None:
    if not (_whole(n, 1) and _whole(ranks, 1)):
        raise InputError(f"Shards: expected whole numbers of rows and ranks, got {n!r}, {ranks!r}")


def _whole(value: Any, least: int) -> bool:
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return number and bool(value >= least)
