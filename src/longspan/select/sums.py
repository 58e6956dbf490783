"""Sums of parts as values and as text: what prefill methods and cache policies have in common.

    sum       part + part + ...          | means the same
    part      name(argument, key=value, ...)

Each of the two is a ``Language``: its own parts, names and words in errors.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from longspan.errors import PolicyError
from longspan.pattern.text import Parser
from longspan.select.budgets import Budget, Coverage, budget

# What text reads as a word without quotes.
_WORD = re.compile(r"[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Summand:
    """A part of a sum.

    Attributes:
        name: in text.
    """

    name: ClassVar[str]

    def alone(self) -> Any:
        """The sum of this part alone."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return self.alone() + other

    __or__ = __add__

    def __str__(self) -> str:
        arguments = []
        for place, field in enumerate(fields(self)):
            value = getattr(self, field.name)
            if value != field.default:
                named = "" if place == len(arguments) else f"{field.name}="
                arguments.append(f"{named}{_written(value)}")
        return f"{self.name}({', '.join(arguments)})"


@dataclass(frozen=True, kw_only=True)
class Language:
    """What a kind of sum is called, and made of.

    Attributes:
        noun: its name in errors.
        example: a text that parses.
        part: class of its parts.
        whole: class of the sums.
        home: module whose ``parse`` reads its text.
        budgeted: a part that takes a budget, for errors.
    """

    noun: str
    example: str
    part: type[Summand]
    whole: type[Any]
    home: str
    budgeted: str

    def read(self, value: Any) -> Any:
        """A sum from a part, a sum or text.

        Raises:
            PolicyError: for anything else, or text that does not parse.
        """
        if isinstance(value, self.whole):
            return value
        if isinstance(value, self.part):
            return value.alone()
        if isinstance(value, str):
            return importlib.import_module(self.home).parse(value)
        raise PolicyError(
            f"expected a {self.noun} or its text, such as {self.example!r}, got {value!r}"
        )

    def parse(self, text: str, known: Mapping[str, Callable[..., Any]]) -> Any:
        """Read a sum from its text form.

        Args:
            text: for example ``example``.
            known: what can be built, by name; ``coverage`` is added.

        Raises:
            PolicyError: if the text does not parse; shows the place and the nearest name.
        """
        if not isinstance(text, str):
            raise PolicyError(
                f"expected a {self.noun} as text, got {text!r} ({type(text).__name__})"
            )
        try:
            found = _SumParser(text, self, {**known, "coverage": Coverage}).whole()
        except RecursionError:
            raise PolicyError(f"the brackets of the {self.noun} are nested too deeply") from None
        if isinstance(found, Coverage):
            raise PolicyError(
                f"{text!r} is a budget, not a {self.noun}; write for example "
                f"{self.budgeted}({text})"
            )
        return self.read(found)


class _SumParser(Parser):
    raises = PolicyError

    def __init__(
        self, text: str, language: Language, known: Mapping[str, Callable[..., Any]]
    ) -> None:
        super().__init__(text)
        self.noun, self.example = language.noun, language.example
        self._language, self._known = language, known

    def known(self) -> Mapping[str, Callable[..., Any]]:
        return self._known

    def union(self) -> Any:
        value, language = self.atom(), self._language
        while self.take("+") or self.take("|"):
            start = self.tokens[self.at][2]
            right = self.atom()
            sides = language.part | language.whole
            if not (isinstance(value, sides) and isinstance(right, sides)):
                raise self.error(f"only parts of a {self.noun} can be added", start)
            try:
                value = language.read(value) + right
            except PolicyError as error:
                raise self.error(str(error), start) from None
        return value


def read_budget(where: str, value: Any) -> Budget:
    """A budget, with the name of the part, and of the argument, in the error."""
    try:
        return budget(value)
    except ValueError as error:
        raise PolicyError(f"{where}: {error}") from None


def check_whole(name: str, least: int, /, **values: Any) -> None:
    """Raise ``PolicyError`` unless all are whole numbers from ``least``."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PolicyError(f"{name}: {key} must be a whole number from {least}, got {value!r}")


def check_bool(name: str, /, **values: Any) -> None:
    """Raise ``PolicyError`` unless all are true or false."""
    for key, value in values.items():
        if not isinstance(value, bool):
            raise PolicyError(f"{name}: {key} must be true or false, got {value!r}")


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_written(item) for item in value)}]"
    if isinstance(value, str) and (value in ("true", "false") or not _WORD.fullmatch(value)):
        return f'"{value}"'
    return str(value)
