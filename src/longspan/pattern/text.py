"""Text form of patterns, for command lines, configurations, logs and cache keys.

    expression   union of terms:  term | term | ...
    term         intersection:    factor & factor & ...
    factor       difference:      atom - atom - ...
    atom         name(argument, key=value, ...)  or  (expression)
    argument     whole number, true, false, word, "quoted word", [list] or expression

``parse(str(p)) == p`` for every pattern. Names are those of the classes' ``name``; a pattern class
defined elsewhere parses as soon as it is imported.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from longspan.errors import LongspanError, PatternError
from longspan.pattern.algebra import And, Or, Pattern, Sub
from longspan.pattern.presets import bigbird, etc, longformer, sparse_transformer, swin
from longspan.pattern.sda import longmixed

_TOKEN = re.compile(
    r"""\s*(?:(-?(?:\d[\d_]*(?:\.\d+)?|\.\d+))|([A-Za-z_][\w.]*)|"([^"]*)"|(.))""", re.DOTALL
)
_PRESETS = (bigbird, etc, longformer, longmixed, sparse_transformer, swin)
_WORDS = {"true": True, "false": False}


def names() -> dict[str, type[Pattern]]:
    """All pattern names that parse, with their classes."""
    found: dict[str, type[Pattern]] = {}
    waiting: list[type[Pattern]] = [Pattern]
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        if "name" in vars(cls):
            found[cls.name] = cls
    return dict(sorted(found.items()))


def parse(text: str) -> Pattern:
    """Read a pattern from its text form.

    Args:
        text: for example ``"window(4096) | sink(4)"``, or a preset such as ``"bigbird(64)"``.

    Returns:
        The pattern.

    Raises:
        PatternError: if the text does not parse; shows the place and the nearest name.
    """
    if not isinstance(text, str):
        raise PatternError(f"expected a pattern as text, got {text!r} ({type(text).__name__})")
    try:
        return Parser(text).whole()
    except RecursionError:
        raise PatternError("the brackets of the pattern are nested too deeply") from None


class Parser:
    """Recursive descent over the tokens ``(kind, value, start)``.

    Other things written in this form, such as cache policies, override the three names, ``known``
    and ``union`` with its operators.
    """

    noun = "pattern"
    example = "window(1024) | sink(4)"
    raises: type[LongspanError] = PatternError

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        for match in _TOKEN.finditer(text):
            index = match.lastindex
            if index is not None and not (index == 4 and match.group(4).isspace()):
                kind = ("number", "name", "quoted", "sign")[index - 1]
                self.tokens.append((kind, match.group(index), match.start(index)))
        self.tokens.append(("end", "", len(text)))
        self.at = 0

    def known(self) -> Mapping[str, Callable[..., Any]]:
        """What can be built, by name; a preset becomes what it is made of."""
        return {**names(), **{make.__name__: make for make in _PRESETS}}

    def whole(self) -> Any:
        """The value of the whole text."""
        if self.tokens[0][0] == "end":
            raise self.raises(f'the {self.noun} is empty; write for example "{self.example}"')
        value = self.union()
        if self.tokens[self.at][0] != "end":
            self.fail("expected an operator or the end")
        return value

    def union(self) -> Any:
        parts = [self.intersection()]
        while self.take("|"):
            parts.append(self.intersection())
        return Or.of(*parts)

    def intersection(self) -> Pattern:
        parts = [self.difference()]
        while self.take("&"):
            parts.append(self.difference())
        return And.of(*parts)

    def difference(self) -> Pattern:
        left = self.atom()
        while self.take("-"):
            left = Sub(left, self.atom())
        return left

    def atom(self) -> Any:
        if self.take("("):
            inner = self.union()
            self.need(")")
            return inner
        kind, name, start = self.tokens[self.at]
        if kind != "name":
            self.fail(f"expected a {self.noun}")
        known, name = self.known(), name.lower()
        make = known.get(name)
        if make is None:
            self.fail(f"no {self.noun} is called {name!r}{_nearest(name, list(known))}")
        self.at += 1
        self.need("(", f"{name} needs its arguments in brackets: {_usage(name, make)}")
        return self.build(name, make, *self.arguments(name, make), start)

    def arguments(self, name: str, make: Callable[..., Any]) -> tuple[list[Any], dict[str, Any]]:
        values: list[Any] = []
        named: dict[str, Any] = {}
        parameters = inspect.signature(make).parameters
        known = list(parameters)
        # heads(causal, ...): a bare word is a pattern without its brackets, not a word.
        patterns = any(p.annotation in (Pattern, "Pattern") for p in parameters.values())
        while not self.take(")"):
            kind, word, _ = self.tokens[self.at]
            if kind == "name" and self.tokens[self.at + 1][1] == "=":
                if word not in known or word in named:
                    again = (
                        "is given twice" if word in named else f"is unknown{_nearest(word, known)}"
                    )
                    self.fail(f"{name}: argument {word!r} {again}")
                self.at += 2
                named[word] = self.value()
            else:
                if named:
                    self.fail("expected name=value: plain arguments come first")
                values.append(self.union() if patterns else self.value())
            if not self.take(","):
                self.need(")", "expected , or )")
                break
        return values, named

    def value(self) -> Any:
        kind, word, _ = self.tokens[self.at]
        if kind == "number":
            try:
                found = float(word) if "." in word else int(word)
            except ValueError:
                self.fail(f"{_short(word)!r} is no number")
            self.at += 1
            return found
        if kind == "quoted":
            self.at += 1
            return word
        if self.take("["):
            items = []
            while not self.take("]"):
                items.append(self.value())
                if not self.take(","):
                    self.need("]", "expected , or ]")
                    break
            return tuple(items)
        if kind == "name" and self.tokens[self.at + 1][1] != "(":
            self.at += 1
            return _WORDS.get(word.lower(), word)
        return self.union()

    def build(
        self,
        name: str,
        make: Callable[..., Any],
        values: list[Any],
        named: dict[str, Any],
        start: int,
    ) -> Any:
        signature = inspect.signature(make)
        try:
            given = signature.bind(*values, **named).arguments
        except TypeError as error:
            raise self.error(f"{name}: {error}; write {_usage(name, make)}", start) from None
        for own, value in given.items():
            # A word that is neither would count as true.
            flag = isinstance(signature.parameters[own].default, bool)
            if flag and not isinstance(value, bool):
                reason = f"{name}: {own} must be true or false, got {value!r}"
                raise self.error(reason, start)
        try:
            return make(*values, **named)
        except LongspanError as error:
            raise self.error(str(error), start) from None

    def take(self, sign: str) -> bool:
        kind, word, _ = self.tokens[self.at]
        # "a -1" reads as a number, which never follows a pattern: only a sign does.
        if kind == "sign" and word == sign:
            self.at += 1
            return True
        return False

    def need(self, sign: str, reason: str | None = None) -> None:
        if not self.take(sign):
            self.fail(reason or f"expected {sign}")

    def fail(self, reason: str) -> NoReturn:
        raise self.error(reason, self.tokens[self.at][2])

    def error(self, reason: str, start: int) -> LongspanError:
        line = self.text.replace("\n", " ")
        return self.raises(f"{reason}\n  {line}\n  {' ' * start}^")


def _usage(name: str, make: Callable[..., Any]) -> str:
    """How it is written, defaults left out: ``window(size)``, ``heads(choices, ...)``."""
    words = []
    for parameter in inspect.signature(make).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            words += [parameter.name, "..."]
        elif parameter.default is parameter.empty:
            words.append(parameter.name)
    return f"{name}({', '.join(words)})"


def _short(word: str, most: int = 24) -> str:
    return word if len(word) <= most else f"{word[:most]}..."


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(known)}"
