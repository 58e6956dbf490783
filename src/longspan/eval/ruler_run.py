"""Answer RULER's questions by generation, with a cache policy or sparse prefill if wanted.

Log-likelihoods of a whole text never read a cache, so nothing that happens to it would show:
every answer is generated greedily. Results are per task and length, and the worst task is named,
as means hide what a method breaks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from longspan.errors import DataError
from longspan.eval.answers import answer
from longspan.eval.perplexity import check_limit
from longspan.eval.progress import Progress, silent
from longspan.eval.records import Records
from longspan.eval.ruler import TASKS, Sample, Task, check_tasks, score
from longspan.eval.seed import check_seed

_LARGEST = 1 << 22


def ruler(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    samples: int = 10,
    seed: int = 0,
    limit: int | None = None,
    make_cache: Callable[[], Any] | None = None,
    records: Records | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a model on a grid of tasks and context lengths.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        tasks: names of ``longspan.eval.ruler.TASKS``.
        lengths: context lengths in tokens; prompt and answer never take more.
        samples: questions per task and length.
        seed: chooses what they say.
        limit: at most so many questions in all, for a quick look.
        make_cache: gives a fresh cache for each question; None: the model's own.
        records: measurements that are already done; new ones are added.
        progress: called with (what, questions done, questions in all).

    Returns:
        ``{"tasks": {task: {length: score}}, "mean": {length: score}, "worst": {length: {"task",
        "score"}}, "samples"}``; scores are shares of answers found, lengths are text. What
        ``limit`` left out is absent.

    Raises:
        InputError: unknown task, no samples, or a limit below 1.
        DataError: a length that cannot hold a question.
    """
    check_tasks(tasks, samples)
    check_seed(seed)
    check_limit(limit)
    records = Records(None, {}) if records is None else records
    cells = questions(tasks, lengths, samples, limit)
    check_rooms(tokenizer, cells)
    for done, (task, length, number) in enumerate(cells, start=1):
        key = _key(task, length, number)
        if key not in records:
            sample = fitting(tokenizer, task, length, f"{seed}/{task}/{length}/{number}")
            ids = tokenizer(sample.prompt, return_tensors="pt", verbose=False)["input_ids"]
            said = answer(model, tokenizer, ids, TASKS[task].tokens, make_cache)
            records.add(
                key,
                {
                    "score": score(said, sample.answers),
                    "tokens": ids.shape[1],
                    "said": said,
                    "answers": list(sample.answers),
                },
            )
        progress("ruler", done, len(cells), task)
    return _summary(records, tasks, lengths, samples)


def questions(
    tasks: Sequence[str], lengths: Sequence[int], samples: int, limit: int | None = None
) -> list[tuple[str, int, int]]:
    """Task, length and number of every question, in the order in which they are asked."""
    each = [(task, n, i) for n in lengths for task in tasks for i in range(samples)]
    # A length or task that is named twice is one.
    return list(dict.fromkeys(each))[:limit]


def check_rooms(tokenizer: Any, asked: Sequence[tuple[str, int, int]]) -> None:
    """Look for lengths that cannot hold a question, before any question is asked.

    Raises:
        DataError: naming a length and the tasks it is too short for.
    """
    for length in dict.fromkeys(n for _, n, _ in asked):
        tasks = dict.fromkeys(task for task, n, _ in asked if n == length)
        large = [task for task in tasks if not _fits(tokenizer, TASKS[task], length, "", 1)]
        if large:
            raise _no_room(large, length)


def fitting(tokenizer: Any, task: str, length: int, seed: str) -> Sample:
    """The largest question of a task that leaves room for its answer.

    Args:
        tokenizer: counts.
        task: its name.
        length: most tokens of prompt and answer.
        seed: chooses what it says; sizes that are tried start anew with it.

    Raises:
        DataError: the smallest question is too long.
    """
    kind = TASKS[task]

    fits = partial(_fits, tokenizer, kind, length, seed)

    if not fits(1):
        raise _no_room([task], length)
    low, high = 1, 2
    while high < _LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return kind.make(random.Random(seed), low)


def _no_room(tasks: Sequence[str], length: int) -> DataError:
    return DataError(
        f"A question of {', '.join(sorted(tasks))} and its answer need more than {length} tokens "
        "with this tokenizer: give longer lengths, or other tasks."
    )


def _fits(tokenizer: Any, kind: Task, length: int, seed: str, size: int) -> bool:
    sample = kind.make(random.Random(seed), size)
    found = len(tokenizer(sample.prompt, verbose=False)["input_ids"])
    return found + kind.tokens <= length


def _summary(
    records: Records, tasks: Sequence[str], lengths: Sequence[int], samples: int
) -> dict[str, Any]:
    table: dict[str, dict[str, float]] = {task: {} for task in tasks}
    mean: dict[str, float] = {}
    worst: dict[str, dict[str, Any]] = {}
    for length in lengths:
        for task in tasks:
            keys = [_key(task, length, number) for number in range(samples)]
            found = [records[key]["score"] for key in keys if key in records]
            if found:
                table[task][str(length)] = sum(found) / len(found)
        column = str(length)
        row = {task: scores[column] for task, scores in table.items() if column in scores}
        if row:
            mean[str(length)] = sum(row.values()) / len(row)
            least = min(row, key=lambda task: row[task])
            worst[str(length)] = {"task": least, "score": row[least]}
    return {"tasks": table, "mean": mean, "worst": worst, "samples": samples}


def _key(task: str, length: int, number: int) -> str:
    return f"{task}/{length}/{number}"
