"""Patterns: where a query may look, as frozen values.

A pattern is a set of (query position, key position) pairs, chosen per head. It holds no tensors
and knows no kernel. Patterns combine exactly:

    a & b   pairs in both
    a | b   pairs in either, each counted once
    a - b   pairs of a not in b

They compare, hash, print and parse (``parse(str(p)) == p``). An atom says the same thing twice, on
purpose: ``allows`` is its definition pair by pair, the oracle; ``intervals``, or ``progressions``
for keys with gaps, is its closed form, from which plans are built. Tests hold the two together.

Positions count from 0 inside the query's own segment (a packed document, or a sequence without its
padding).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from longspan.errors import PatternError
from longspan.pattern.lattice import END, EVERY, Lattice, Positions

Mask = NDArray[np.bool_]
Interval = tuple[Any, Any]
Progression = tuple[Lattice, Sequence[Interval]]


@dataclass(frozen=True, kw_only=True)
class At:
    """For which head and sequence a pattern is asked.

    Attributes:
        head: query head, from 0.
        heads: number of query heads.
        length: length of the whole segment, one number or one per query. Causal patterns and
            ``head_class`` must not depend on it.
    """

    head: int = 0
    heads: int = 1
    length: int | Positions = END


class Pattern:
    """A set of (query, key) position pairs per head; see the module text for the algebra."""

    name: ClassVar[str]

    @property
    def is_causal(self) -> bool:
        """True if no allowed pair has its key after its query, whatever the length."""
        raise NotImplementedError

    @property
    def needs_length(self) -> bool:
        """True if pairs depend on the length of the sequence, as clamped edges do."""
        return False

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        """Definition of the pattern, pair by pair.

        Args:
            query: positions, any shape.
            key: positions, broadcastable against ``query``.
            at: head and sequence.

        Returns:
            Boolean array of the broadcast shape.
        """
        raise NotImplementedError

    def counts(self, query: Positions, key: Positions, at: At) -> NDArray[np.int64]:
        """How often each pair counts: once where ``allows``, unless the pattern is a mixture."""
        return self.allows(query, key, at).astype(np.int64)

    def branches(self) -> tuple[Pattern, ...]:
        """Patterns whose sum this one is: itself, unless pairs may count more than once."""
        return (self,)

    def head_class(self, at: At) -> Hashable:
        """A value that is equal for two heads only if the pattern is the same in both."""
        return ()

    def at_layer(self, layer: int) -> Pattern:
        """The pattern of one layer; only ``PerLayer`` differs between layers."""
        return self

    def check(self, heads: int) -> None:
        """Raise ``PatternError`` if the pattern cannot be used with this number of query heads."""

    def require(self, heads: int) -> None:
        """Raise ``PatternError`` if the whole pattern cannot be used.

        That is if it does not fit the query heads, or is causal only because a part was cut at
        the diagonal that looks at the length: it would change as the sequence grows, and decoding
        would differ from prefill.
        """
        self.check(heads)
        if self.is_causal and self.needs_length:
            raise PatternError(
                f"{self} is causal, but a two-sided part of it depends on the length of the "
                "sequence and would change with every new token; use the causal form of that part"
            )

    def mask(self, n: int, heads: int = 1, layer: int = 0) -> Mask:
        """Dense mask [heads, n, n] of a sequence of ``n`` tokens: the oracle, O(heads n n) memory.

        A causal pattern that leaves a query without any key keeps the query's own position.
        """
        pattern = self.at_layer(layer)
        heads, n = whole("mask", "heads", heads, 1), whole("mask", "n", n, 0)
        pattern.require(heads)
        token = np.arange(n)
        rows = [
            pattern.allows(token[:, None], token[None, :], At(head=h, heads=heads, length=n))
            for h in range(heads)
        ]
        dense = np.stack([np.broadcast_to(row, (n, n)) for row in rows])
        if pattern.is_causal:
            dense = dense | (~dense.any(axis=-1, keepdims=True) & np.eye(n, dtype=bool))
        return dense

    def __and__(self, other: Pattern) -> Pattern:
        return And.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Or.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def __sub__(self, other: Pattern) -> Pattern:
        return Sub(self, other) if isinstance(other, Pattern) else NotImplemented


@dataclass(frozen=True, repr=False)
class Atom(Pattern):
    """A pattern that is not made of others; one family of atoms, one file.

    A subclass is a frozen dataclass with a ``name`` for the text form. Fields without default are
    positional in that form, the others are written only where they differ from their default.
    """

    def intervals(self, query: Positions, at: At) -> Sequence[Interval]:
        """Closed form: the allowed keys of each query as half-open intervals of positions.

        Args:
            query: positions [n], int64.
            at: head and sequence.

        Returns:
            Pairs ``(lo, hi)``, each broadcastable to [n]. They may be empty (``hi <= lo``),
            overlap, come in any order and reach below 0 or past the end.
        """
        raise NotImplementedError

    def progressions(self, query: Positions, at: At) -> Sequence[Progression]:
        """Closed form with gaps: intervals of positions, each list with the lattice it steps on.

        Args:
            query: positions [n], int64.
            at: head and sequence.

        Returns:
            Pairs ``(lattice, intervals)``; they may overlap. Unless a pattern says otherwise, its
            ``intervals`` without gaps.
        """
        return [(EVERY, self.intervals(query, at))]

    def __str__(self) -> str:
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING:
                words.append(write_value(value))
            elif value != field.default:
                words.append(f"{field.name}={write_value(value)}")
        return f"{self.name}({', '.join(words)})"

    __repr__ = __str__


def write_value(value: Any) -> str:
    """Text form of a parameter: ``true``, ``[1, 2]``, a word or a number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(write_value(item) for item in value)}]"
    return str(value)


def whole(owner: str, field: str, value: Any, least: int) -> int:
    """Check an integer parameter of a pattern.

    Raises:
        PatternError: if ``value`` is no integer, or below ``least``, or past the largest position.
    """
    # A tensor would count as a number, but neither prints nor hashes like one.
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise PatternError(
            f"{owner}: {field} must be a whole number, got {value!r} ({type(value).__name__})"
        )
    if not least <= value <= END:
        raise PatternError(f"{owner}: {field} must be from {least} to {END}, got {value}")
    return int(value)


def keep_whole(atom: Atom, owner: str, field: str, least: int) -> int:
    """Check an integer field of an atom, as ``whole`` does, and keep it as a plain number.

    A number of numpy's equals a plain one, but one of few bits overflows in products, and one
    without a sign in differences.

    Raises:
        PatternError: as ``whole``.
    """
    value = whole(owner, field, getattr(atom, field), least)
    object.__setattr__(atom, field, value)
    return value


def flag(owner: str, field: str, value: Any) -> bool:
    """Check a parameter that is true or false: any other word would count as true.

    Raises:
        PatternError: if ``value`` is neither.
    """
    if not isinstance(value, bool):
        raise PatternError(f"{owner}: {field} must be True or False, got {value!r}")
    return value


def wholes(
    owner: str, field: str, values: Any, least: int, *, may_be_empty: bool = False
) -> tuple[int, ...]:
    """Check several integers, as ``whole`` does; sorted, each once.

    Raises:
        PatternError: if ``values`` is no sequence of such integers, or empty where it may not be.
    """
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray | range):
        raise PatternError(f"{owner}: {field} must be a list of whole numbers, got {values!r}")
    if len(values) == 0 and not may_be_empty:
        raise PatternError(f"{owner}: {field} must hold at least one number, got none")
    return tuple(sorted({whole(owner, field, value, least) for value in values}))


def one_by_one(owner: str, field: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers that were given as arguments of their own.

    Raises:
        PatternError: if they were given as one list.
    """
    first = values[0] if values else None
    if isinstance(first, Sequence | np.ndarray | set | range) and not isinstance(first, str):
        words = ", ".join(map(str, first))
        raise PatternError(f"{owner}: give {field} one by one, {owner}({words}); got {first!r}")
    return values


@dataclass(frozen=True, repr=False)
class _Combined(Pattern):
    """Several patterns joined by one operator."""

    parts: tuple[Pattern, ...]
    sign: ClassVar[str]
    # Binding strength in the text form: as in Python, - before & before |.
    strength: ClassVar[int]

    @classmethod
    def of(cls, *parts: Pattern) -> Pattern:
        """Join, flattened and without repetitions: ``a | (b | a)`` is ``a | b``."""
        flat: list[Pattern] = []
        for part in parts:
            flat.extend(part.parts if isinstance(part, cls) else [part])
        unique = tuple(dict.fromkeys(flat))
        return unique[0] if len(unique) == 1 else cls(unique)

    @property
    def needs_length(self) -> bool:
        return any(part.needs_length for part in self.parts)

    def head_class(self, at: At) -> Hashable:
        return tuple(part.head_class(at) for part in self.parts)

    def at_layer(self, layer: int) -> Pattern:
        return self.of(*(part.at_layer(layer) for part in self.parts))

    def check(self, heads: int) -> None:
        for part in self.parts:
            part.check(heads)

    def __str__(self) -> str:
        return f" {self.sign} ".join(_bracket(part, self.strength) for part in self.parts)

    __repr__ = __str__


@dataclass(frozen=True, repr=False)
class And(_Combined):
    """Pairs that every part allows."""

    sign: ClassVar[str] = "&"
    strength: ClassVar[int] = 2

    @property
    def is_causal(self) -> bool:
        return any(part.is_causal for part in self.parts)

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return np.logical_and.reduce(
            np.broadcast_arrays(*(part.allows(query, key, at) for part in self.parts))
        )


@dataclass(frozen=True, repr=False)
class Or(_Combined):
    """Pairs that some part allows; a pair that several allow counts once."""

    sign: ClassVar[str] = "|"
    strength: ClassVar[int] = 1

    @property
    def is_causal(self) -> bool:
        return all(part.is_causal for part in self.parts)

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return np.logical_or.reduce(
            np.broadcast_arrays(*(part.allows(query, key, at) for part in self.parts))
        )


@dataclass(frozen=True, repr=False)
class Sub(Pattern):
    """Pairs of ``left`` that ``right`` does not allow."""

    left: Pattern
    right: Pattern
    strength: ClassVar[int] = 3

    @property
    def is_causal(self) -> bool:
        return self.left.is_causal

    @property
    def needs_length(self) -> bool:
        return self.left.needs_length or self.right.needs_length

    def allows(self, query: Positions, key: Positions, at: At) -> Mask:
        return self.left.allows(query, key, at) & ~self.right.allows(query, key, at)

    def head_class(self, at: At) -> Hashable:
        return self.left.head_class(at), self.right.head_class(at)

    def at_layer(self, layer: int) -> Pattern:
        return Sub(self.left.at_layer(layer), self.right.at_layer(layer))

    def check(self, heads: int) -> None:
        self.left.check(heads)
        self.right.check(heads)

    def __str__(self) -> str:
        # Subtraction groups from the left, so only its right side needs brackets around another
        # subtraction.
        return f"{_bracket(self.left, self.strength)} - {_bracket(self.right, self.strength + 1)}"

    __repr__ = __str__


def _bracket(part: Pattern, strength: int) -> str:
    return f"({part})" if getattr(part, "strength", 9) < strength else str(part)
