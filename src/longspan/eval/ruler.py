"""RULER's tasks that need no download, and key-value retrieval: texts and answers.

RULER (Hsieh et al. 2024, arXiv 2404.06654): a text of any length that hides what is asked for.

    niah.single       one needle, "one of the special magic numbers for K is V", in noise
    niah.multikey     four needles with different keys, one is asked for
    niah.needles      the whole text is needles, one is asked for (multikey_2)
    niah.multivalue   one key with four values, all are asked for
    niah.multiquery   four keys, all are asked for
    vt                variable tracking: a chain of assignments; which variables hold the value?
    cwe               common words: ten words stand 30 times each among words that stand 3 times
                      (6 times and once in short texts)
    fwe               frequent words: which three coded words are most frequent? (Zipf, alpha 2)
    kv                InfiniteBench's retrieval (Zhang et al. 2024, arXiv 2402.13718): JSON of
                      uuid pairs, one is asked for
    passkey           a five-digit key in noise (Landmark Attention, arXiv 2305.16300), the wording
                      of ``longspan.eval.passkey``
    passkey.code      the same as Python, for models of code; not among "all"

A score is the share of the answers that the continuation contains, whatever their case. How ours
differ: where RULER takes essays as haystack, noise stands (its own repeated sentences); words are
made of syllables instead of taken from a word list, so that no package is needed. The same seed
gives the same text everywhere.
"""

from __future__ import annotations

import itertools
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longspan.errors import InputError
from longspan.eval.passkey import wording

_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
# Needles stand at depths out of so many evenly spaced ones.
_DEPTHS = 40


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question.

    Attributes:
        context: what the model reads first.
        question: what is asked about it; ends where the answer begins.
        answers: what the continuation should contain.
    """

    context: str
    question: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """All that the model reads."""
        return self.context + self.question


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of question.

    Attributes:
        make: gives a sample from a source of randomness and a size; texts grow with the size.
        tokens: most tokens of an answer.
    """

    make: Callable[[random.Random, int], Sample]
    tokens: int


def score(continuation: str, answers: Sequence[str]) -> float:
    """Share of the answers that a continuation contains, whatever their case."""
    said = continuation.lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)


def check_tasks(names: Sequence[str], samples: int = 1) -> None:
    """Raise InputError for an unknown task, none, or no questions of each."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise InputError(
            f"Unknown task {', '.join(map(repr, unknown)) or '(none given)'}: choose from "
            f"{', '.join(TASKS)}, or all."
        )
    if samples < 1:
        raise InputError(f"At least one question per task and length is needed, got {samples}.")


def words(rng: random.Random, count: int) -> list[str]:
    """Distinct made-up words of three syllables, none inside another."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        found["".join(syllables)] = None
    return list(found)


def numbers(rng: random.Random, count: int, digits: int = 7) -> list[str]:
    """Distinct numbers of the given length."""
    return [str(x) for x in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _needles(keys: int, values: int, asked: int) -> Callable[[random.Random, int], Sample]:
    """Needles in noise: so many keys with so many values each, so many of the keys asked for."""

    def make(rng: random.Random, size: int) -> Sample:
        names = words(rng, keys)
        drawn = numbers(rng, keys * values)
        held = {name: drawn[i * values : (i + 1) * values] for i, name in enumerate(names)}
        lines = [_NOISE] * size
        needles = [_needle(name, value) for name in names for value in held[name]]
        rng.shuffle(needles)
        depths = sorted(rng.sample(range(_DEPTHS + 1), len(needles)), reverse=True)
        # From the end on, so that places before stay where they are.
        for depth, needle in zip(depths, needles, strict=True):
            lines.insert(round(depth / _DEPTHS * size), needle)
        return _asked(lines, held, rng.sample(names, asked))

    return make


def _only_needles(rng: random.Random, size: int) -> Sample:
    count = max(1, size)
    names, drawn = words(rng, count), numbers(rng, count)
    held = {name: [value] for name, value in zip(names, drawn, strict=True)}
    return _asked([_needle(n, v) for n, (v,) in held.items()], held, [rng.choice(names)])


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _asked(lines: list[str], held: dict[str, list[str]], asked: list[str]) -> Sample:
    names = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    answers = tuple(value for name in asked for value in held[name])
    one = len(answers) == 1
    numbers_are = "number" if one else "numbers"
    text = "\n".join(lines)
    return Sample(
        context=(
            "Some special magic numbers are hidden within the following text. Make sure to "
            f"memorize them. I will quiz you about the numbers afterwards.\n{text}"
        ),
        question=(
            f"\nWhat {'is the' if one else 'are all the'} special magic {numbers_are} for {names} "
            f"mentioned in the provided text? The special magic {numbers_are} for {names} "
            f"mentioned in the provided text {'is' if one else 'are'}"
        ),
        answers=answers,
    )


def _chain(rng: random.Random, hops: int = 4) -> tuple[list[str], list[str], str]:
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(rng.choice(string.ascii_uppercase) for _ in range(5))
        if name not in names:
            names.append(name)
    value = numbers(rng, 1, 5)[0]
    said = [f"VAR {names[0]} = {value}"]
    said += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)]
    return names, said, value


def _tracking_text(rng: random.Random, size: int) -> tuple[str, list[str], str]:
    names, said, value = _chain(rng)
    lines = [_NOISE] * size
    places = sorted(rng.randint(0, size) for _ in said)
    for place, line in reversed(list(zip(places, said, strict=True))):
        lines.insert(place, line)
    return "\n".join(lines), names, value


def _tracking(rng: random.Random, size: int) -> Sample:
    task = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    ask = (
        "\nQuestion: Find all variables that are assigned the value {0} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, {1} "
        "variables are assigned the value {0}, they are:"
    )
    shown, own, held = _tracking_text(rng, min(size, 4))
    text, names, value = _tracking_text(rng, size)
    example = f"{task}\n{shown}{ask.format(held, len(own))} {' '.join(own)}\n\n"
    return Sample(
        context=f"{example}{task}\n{text}",
        question=ask.format(value, len(names)),
        answers=tuple(names),
    )


def _common_text(rng: random.Random, many: int, few: int, rest: int) -> tuple[str, list[str]]:
    drawn = words(rng, 10 + rest)
    listed = [word for word in drawn[:10] for _ in range(many)]
    listed += [word for word in drawn[10:] for _ in range(few)]
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), drawn[:10]


def _common(rng: random.Random, size: int) -> Sample:
    task = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    )
    ask = "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    ask += "words that appear most often in the list are:"
    # Small texts cannot hold thirty of each.
    many, few = min(30, max(6, size // 5)), 3 if size >= 150 else 1
    shown, own = _common_text(rng, 3, 1, 5)
    text, common = _common_text(rng, many, few, size // few)
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(own, 1))
    return Sample(
        context=f"{task}\n{shown}{ask} {listed}\n\n{task}\n{text}",
        question=ask,
        answers=tuple(common),
    )


def _frequent(rng: random.Random, size: int) -> Sample:
    count = max(8, size)
    drawn = words(rng, max(5, count // 25))
    # zeta(2) shares: rank r stands total / r^2 times; the first rank is dots, as published.
    total = 6 / 3.141592653589793**2 * count
    listed: list[str] = []
    for rank, word in enumerate(["...", *drawn], 1):
        listed += [word] * max(4 - rank if rank < 5 else 0, round(total / rank**2))
    # Equal counts would have no right answer.
    listed += [word for extra, word in enumerate(reversed(drawn[:3]), 1) for _ in range(extra)]
    rng.shuffle(listed)
    return Sample(
        context=(
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {' '.join(listed)}"
        ),
        question=(
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
            "the three most frequently appeared words in the above coded text? Answer: According "
            "to the coded text above, the three most frequently appeared words are:"
        ),
        answers=tuple(drawn[:3]),
    )


def _pairs(rng: random.Random, size: int) -> Sample:
    held = {_uuid(rng): _uuid(rng) for _ in range(max(1, size))}
    asked = rng.choice(list(held))
    listed = ", ".join(f'"{key}": "{value}"' for key, value in held.items())
    return Sample(
        context=(
            "Extract the value corresponding to the specified key in the JSON object below.\n\n"
            f"{{{listed}}}"
        ),
        question=f'\n\nKey: "{asked}"\nThe value associated with the specified key is: "',
        answers=(held[asked],),
    )


def _key(style: str) -> Callable[[random.Random, int], Sample]:
    """A passkey at one of the depths, in about so many sentences of filler."""

    def make(rng: random.Random, size: int) -> Sample:
        number, depth = numbers(rng, 1, 5)[0], rng.randint(0, _DEPTHS) / _DEPTHS
        chars = 250 + len(_NOISE) * size
        context, question, answer = wording(style)(chars, depth, number, rng.randrange(2**31))
        return Sample(context=context, question=question, answers=(answer.strip(),))

    return make


TASKS: dict[str, Task] = {
    "niah.single": Task(make=_needles(1, 1, 1), tokens=32),
    "niah.multikey": Task(make=_needles(4, 1, 1), tokens=32),
    "niah.needles": Task(make=_only_needles, tokens=32),
    "niah.multivalue": Task(make=_needles(1, 4, 1), tokens=96),
    "niah.multiquery": Task(make=_needles(4, 1, 4), tokens=96),
    "vt": Task(make=_tracking, tokens=48),
    "cwe": Task(make=_common, tokens=120),
    "fwe": Task(make=_frequent, tokens=50),
    "kv": Task(make=_pairs, tokens=64),
    "passkey": Task(make=_key("prose"), tokens=12),
    "passkey.code": Task(make=_key("code"), tokens=12),
}
ALL = tuple(name for name in TASKS if name != "passkey.code")
