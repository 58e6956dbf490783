"""LongBench's files, prompts and what its datasets ask for.

LongBench (Bai et al. 2024, arXiv 2308.14508): one file of JSON lines for each dataset, with the
fields ``input``, ``context``, ``answers``, ``length``, ``dataset``, ``language``, ``all_classes``
and ``_id``. Nothing is downloaded: files are yours. The prompts, lengths of answers and metrics of
the 16 datasets in English and code lie in ``assets/longbench.json`` with their source and licence;
the five in Chinese need a word splitter for their metrics and are left out. LongBench-E's files
(``qasper_e.jsonl``) are datasets of their own, ``qasper_e``, asked in the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any

from longspan.errors import DataError, InputError
from longspan.eval.longbench_scores import METRICS

_FIELDS = ("context", "input")


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a dataset is asked and scored.

    Attributes:
        prompt: text with ``{context}`` and ``{input}`` where those of an example go.
        tokens: most tokens of an answer.
        metric: one of ``longspan.eval.longbench_scores.METRICS``.
        chat: whether a chat template goes around the prompt where one is wanted; few-shot and
            code prompts are continued as they are.
        first_line: whether only the first line of an answer is scored.
        one_line: whether a line break ends the answer.
    """

    prompt: str
    tokens: int
    metric: str
    chat: bool = True
    first_line: bool = False
    one_line: bool = False


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question of a dataset.

    Attributes:
        id: the file's ``_id``, or the number of its line.
        input: the question; empty where the context says it all.
        context: the long text.
        answers: any of them is right.
        classes: names of all classes, for classification.
        words: the file's ``length``; None where it does not say.
    """

    id: str
    input: str
    context: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()
    words: int | None = None

    def prompt(self, form: Form) -> str:
        """All that the model reads, before anything is cut."""
        return form.prompt.format(context=self.context, input=self.input)


@cache
def published() -> dict[str, Form]:
    """The forms of LongBench's own datasets."""
    path = files("longspan") / "assets" / "longbench.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    return {name: Form(**form) for name, form in held["datasets"].items()}


def form_of(
    name: str, *, template: str | None = None, metric: str | None = None, tokens: int | None = None
) -> Form:
    """The form of a dataset; what is given takes the place of what is published.

    Args:
        name: of the dataset; ``_e`` at its end is not looked at.
        template: prompt with ``{context}`` and ``{input}``.
        metric: one of ``METRICS``.
        tokens: most tokens of an answer.

    Raises:
        InputError: a dataset that is not among the published ones without all three; an unknown
            metric; a template with other fields, or none; or no tokens.
    """
    if metric is not None and metric not in METRICS:
        raise InputError(f"Unknown metric {metric!r}: choose one of {', '.join(METRICS)}.")
    if tokens is not None and tokens < 1:
        raise InputError(f"An answer needs at least one token, got {tokens}.")
    if template is not None:
        _check_template(template)
    form = published().get(name.removesuffix("_e"))
    if form is not None:
        given = {"prompt": template, "metric": metric, "tokens": tokens}
        return replace(form, **{key: value for key, value in given.items() if value is not None})
    if template is None or metric is None or tokens is None:
        raise InputError(
            f"Dataset {name!r} has no published prompt here: give --template, --metric and "
            f"--answer for it, or choose with --datasets. Known: {', '.join(published())}."
        )
    return Form(prompt=template, metric=metric, tokens=tokens)


def _check_template(template: str) -> None:
    try:
        named = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise InputError(
            f"The template cannot be read ({error}): write {{{{ and }}}} for braces."
        ) from None
    if not named or not named <= set(_FIELDS):
        found = ", ".join(f"{{{name}}}" for name in sorted(named)) or "no field"
        raise InputError(
            f"A template has the fields {{context}} and {{input}}, or one of them; got {found}."
        )
    try:
        template.encode()
        template.format(context="", input="")
    except UnicodeEncodeError as error:
        raise InputError(f"The template is no UTF-8 text: {error}.") from None
    except (ValueError, LookupError) as error:
        raise InputError(
            f"A template's fields {{context}} and {{input}} stand alone, without formats: {error}."
        ) from None


def read_files(paths: Sequence[str | Path]) -> dict[str, list[Example]]:
    """Examples by dataset, datasets in the order of their names.

    Args:
        paths: ``.jsonl`` files, or folders with some.

    Raises:
        DataError: a path that does not exist, a folder without files, or a line that is no
            example, by file and line.
    """
    found: dict[str, list[Example]] = {}
    named = [file for one in paths for file in _jsonl(Path(one).expanduser())]
    # A file that is named twice is read once.
    for path in {file.resolve(): file for file in named}.values():
        for name, example in _read(path):
            found.setdefault(name, []).append(example)
    if not found:
        raise DataError(f"There are no examples in {', '.join(map(str, paths)) or 'no files'}.")
    return dict(sorted(found.items()))


def data_hash(examples: dict[str, list[Example]]) -> str:
    """Short hash of all that is asked."""
    return hashlib.sha256(repr(examples).encode()).hexdigest()[:16]


def _jsonl(path: Path) -> list[Path]:
    if path.is_file() or path.is_fifo():
        return [path]
    if not path.is_dir():
        wrong = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise DataError(
            f"{path} {wrong}. Give LongBench's .jsonl files, or a folder with them; "
            "nothing is downloaded."
        )
    inside = sorted(file for file in path.glob("*.jsonl") if file.is_file())
    if not inside:
        raise DataError(f"{path} holds no .jsonl files: give LongBench's, or their folder.")
    return inside


def _read(path: Path) -> list[tuple[str, Example]]:
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                held = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is no JSON: {error}.") from error
            found.append(_example(held, f"{path}, line {number}", path.stem, number))
    return found


def _example(held: Any, where: str, stem: str, number: int) -> tuple[str, Example]:
    kinds = {"context": str, "input": str, "answers": list, "dataset": str}
    wrong = [
        name
        for name, kind in kinds.items()
        if not (isinstance(held, dict) and isinstance(held.get(name), kind))
    ]
    if wrong:
        raise DataError(
            f"{where} is no example of LongBench: {', '.join(wrong)} missing or of another kind "
            "(context, input and dataset are text, answers a list of texts)."
        )
    classes = held.get("all_classes") or []
    texts = (*held["answers"], *classes) if isinstance(classes, list) else (None,)
    if not held["answers"] or not all(isinstance(x, str) for x in texts):
        raise DataError(f"{where}: answers and all_classes are lists of texts, answers not empty.")
    try:
        for text in (held["context"], held["input"], held["dataset"], *texts):
            str(text).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half of a character: {error}.") from error
    words = held.get("length")
    example = Example(
        id=str(held.get("_id", number)),
        input=held["input"],
        context=held["context"],
        answers=tuple(held["answers"]),
        classes=tuple(classes),
        words=words if isinstance(words, int) else None,
    )
    # LongBench-E's lines name the dataset that they were taken from.
    name = held["dataset"]
    extra = "_e" if stem.endswith("_e") and not name.endswith("_e") else ""
    return name + extra, example
