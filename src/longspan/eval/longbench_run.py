"""Ask a model LongBench's questions: prompts cut in the middle, greedy answers, published scores.

A prompt of more than ``length`` tokens keeps its first and last ``length // 2``, which are turned
into text and joined as LongBench's pred.py does, for instructions stand at both ends. The score of
a dataset is the mean over its examples, that of a run the mean over its datasets, each 0 to 1
(LongBench prints hundredths). Examples are also averaged by LongBench-E's classes of words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longspan.errors import DataError, InputError
from longspan.eval.answers import MakeCache, answer
from longspan.eval.longbench import Example, Form
from longspan.eval.longbench_scores import best
from longspan.eval.progress import Progress, silent
from longspan.eval.records import Records
from longspan.hf.generate import check_chat, read_prompt

# LongBench-E's classes: words below which, and what they are called.
_CLASSES = {"0-4k": 4000, "4-8k": 8000, "8k+": math.inf}
WORDS = tuple(_CLASSES)


def check_data(asked: Mapping[str, Sequence[Example]], forms: Mapping[str, Form]) -> None:
    """Look for examples that their metric cannot score, before any question is asked.

    Raises:
        DataError: classification without classes, retrieval without a numbered paragraph, or a
            prompt without a word.
    """
    for name, examples in asked.items():
        metric = forms[name].metric
        for one in examples:
            if not one.prompt(forms[name]).strip():
                raise DataError(f"Example {one.id} of {name} gives an empty prompt.")
            if metric == "classification" and not one.classes:
                raise DataError(
                    f"Example {one.id} of {name} names no all_classes, which classification needs."
                )
            if metric == "retrieval" and not all("Paragraph " in text for text in one.answers):
                raise DataError(
                    f"Example {one.id} of {name} is answered by {list(one.answers)}; retrieval "
                    "expects 'Paragraph N'."
                )


def rooms(forms: Mapping[str, Form], length: int | None, context: int | None) -> dict[str, int]:
    """Tokens of a prompt for each dataset.

    Args:
        forms: of the datasets.
        length: what was asked for; None: the model's context less an answer.
        context: tokens that the model is made for; None: unknown.

    Raises:
        InputError: no length where the model does not say, or one of less than two tokens.
    """
    if length is None and context is None:
        raise InputError("This model does not say how long its context is: give --length.")
    found = {
        name: length if length is not None else (context or 0) - form.tokens
        for name, form in forms.items()
    }
    for name, room in found.items():
        if room < 2:
            raise InputError(
                f"{room} tokens are left for a prompt of {name}: prompts need at least 2. Give "
                "--length, or a shorter --answer."
            )
    return found


def cut(tokenizer: Any, text: str, length: int) -> tuple[str, int]:
    """A prompt without its middle if it is too long, and how many tokens it had."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= length:
        return text, len(ids)
    half = length // 2
    ends = (ids[:half], ids[-half:])
    return "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends), len(ids)


def survey(
    tokenizer: Any,
    asked: Mapping[str, Sequence[Example]],
    forms: Mapping[str, Form],
    room: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """What would be asked: for each dataset its metric, number of examples, and prompt lengths."""
    found = {}
    for name, examples in asked.items():
        form = forms[name]
        sizes = [cut(tokenizer, one.prompt(form), room[name])[1] for one in examples]
        found[name] = {
            "metric": form.metric,
            "examples": len(examples),
            "answer": form.tokens,
            "room": room[name],
            "tokens": {
                "least": min(sizes),
                "mean": sum(sizes) / len(sizes),
                "most": max(sizes),
            },
            "cut": sum(size > room[name] for size in sizes),
        }
    return found


def longbench(
    model: Any,
    tokenizer: Any,
    asked: Mapping[str, Sequence[Example]],
    forms: Mapping[str, Form],
    room: Mapping[str, int],
    *,
    chat: bool = False,
    make_cache: MakeCache | None = None,
    records: Records | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Ask all examples and score the answers.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        asked: examples by dataset (``longspan.eval.longbench.read_files``).
        forms: of each dataset (``form_of``).
        room: tokens of a prompt in each dataset (``rooms``).
        chat: put prompts into the model's chat template, where a form allows it.
        make_cache: gives a fresh cache for each question; None: the model's own.
        records: answers that are already there; new ones are added.
        progress: called with (what, questions done, questions in all).

    Returns:
        ``{"datasets": {name: {"metric", "score", "examples", "cut", "by_words"}}, "mean"}``;
        scores are 0 to 1, ``by_words`` has LongBench-E's classes of the file's ``length``.

    Raises:
        DataError: an example that its metric cannot score.
        InputError: chat without a chat template.
    """
    check_data(asked, forms)
    if chat:
        check_chat(tokenizer)
    records = Records(None, {}) if records is None else records
    done, total = 0, sum(map(len, asked.values()))
    for name, examples in asked.items():
        form = forms[name]
        for number, example in enumerate(examples):
            key = _key(name, number)
            if key not in records:
                text, whole = cut(tokenizer, example.prompt(form), room[name])
                ids = read_prompt(tokenizer, text, chat and form.chat)
                said = answer(
                    model, tokenizer, ids, form.tokens, make_cache, stop=_stop(tokenizer, form)
                )
                records.add(
                    key,
                    {
                        "id": example.id,
                        "score": best(
                            form.metric,
                            said,
                            example.answers,
                            example.classes,
                            first_line=form.first_line,
                        ),
                        "said": said,
                        "answers": list(example.answers),
                        "prompt_tokens": whole,
                        "tokens": ids.shape[1],
                        "words": example.words,
                    },
                )
            done += 1
            progress("longbench", done, total, name)
    return _summary(records, asked, forms, room)


def _stop(tokenizer: Any, form: Form) -> tuple[int, ...]:
    # The last token, as some tokenizers put a space of their own in front.
    return tuple(tokenizer.encode("\n", add_special_tokens=False)[-1:]) if form.one_line else ()


def _summary(
    records: Records,
    asked: Mapping[str, Sequence[Example]],
    forms: Mapping[str, Form],
    room: Mapping[str, int],
) -> dict[str, Any]:
    datasets: dict[str, dict[str, Any]] = {}
    for name, examples in asked.items():
        rows = [records[_key(name, number)] for number in range(len(examples))]
        by_words: dict[str, list[float]] = {}
        for row in rows:
            if row["words"] is not None:
                by_words.setdefault(_word_class(row["words"]), []).append(row["score"])
        datasets[name] = {
            "metric": forms[name].metric,
            "score": _mean([row["score"] for row in rows]),
            "examples": len(rows),
            "cut": sum(row["prompt_tokens"] > room[name] for row in rows),
            "by_words": {label: _mean(by_words[label]) for label in WORDS if label in by_words},
        }
    return {"datasets": datasets, "mean": _mean([one["score"] for one in datasets.values()])}


def _word_class(words: int) -> str:
    return next(label for label, most in _CLASSES.items() if words < most)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _key(name: str, number: int) -> str:
    return f"{name}/{number}"
