"""Passkey retrieval: is a number found that stands somewhere in a long text? By context length and
depth.

The task of Landmark Attention (arXiv 2305.16300) and LongLoRA (arXiv 2309.12307): filler, the key
at a chosen depth, a question at the end. ``prose`` is the published wording, ``code`` says the
same as Python for models of code. Graded by one forward over context, question and answer: when
the best token at each place of the answer is the answer's, greedy generation would have written
exactly that answer, without a cache and L decoding steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longspan.errors import DataError, InputError
from longspan.eval.losses import TokenLoss
from longspan.eval.perplexity import check_limit
from longspan.eval.plain import mean
from longspan.eval.progress import Progress, silent
from longspan.eval.records import Records
from longspan.eval.seed import check_seed

STYLES = ("prose", "code")

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
_GRASS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)


def prose(chars: int, depth: float, key: str, seed: int) -> tuple[str, str, str]:
    """The published wording, at most ``chars`` characters of context: (context, question, answer).

    ``seed`` changes nothing: the filler repeats itself.
    """
    needle = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    repeats = max(0, (chars - len(_TASK) - len(needle)) // len(_GRASS))
    before = round(depth * repeats)
    context = _TASK + _GRASS * before + needle + _GRASS * (repeats - before)
    return context, "\nWhat is the pass key? The pass key is", f" {key}"


def check_passkey(depths: Sequence[float], trials: int, style: str) -> None:
    """Raise InputError for values that make no sense."""
    if style not in STYLES:
        raise InputError(f"Unknown passkey style {style!r}: choose one of {', '.join(STYLES)}.")
    if not depths or any(not 0 <= depth <= 1 for depth in depths):
        raise InputError(f"Depths go from 0 (start) to 1 (end), got {list(depths)}.")
    if trials < 1:
        raise InputError(f"At least one probe per length and depth is needed, got {trials}.")


def passkey(
    loss: TokenLoss,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    trials: int = 5,
    style: str = "prose",
    seed: int = 0,
    limit: int | None = None,
    records: Records | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure retrieval on a grid of context lengths and depths.

    Args:
        loss: the model, ready to score tokens.
        tokenizer: its tokenizer.
        lengths: context lengths in tokens; a probe is never longer than this, answer included.
        depths: where the key stands, 0 (start) to 1 (end).
        trials: probes per cell, each with its own key.
        style: one of ``STYLES``.
        seed: chooses keys and filler.
        limit: at most so many probes in all, for a quick look.
        records: measurements that are already done; new ones are added.
        progress: called with (what, probes done, probes in all).

    Returns:
        ``{"style", "lengths", "depths", "trials", "accuracy", "nll"}``: accuracy (share of exact
        answers) and nll (nats per answer token) are tables [length][depth]; a cell that ``limit``
        left out is None.

    Raises:
        InputError: unknown style, depth outside 0..1, no trials, or a limit below 1.
        DataError: a length that cannot hold the question.
    """
    check_passkey(depths, trials, style)
    check_seed(seed)
    check_limit(limit)
    records = Records(None, {}) if records is None else records
    cells = [(n, d, t) for n in lengths for d in depths for t in range(trials)][:limit]
    for done, (length, depth, trial) in enumerate(cells, start=1):
        key = _key(length, depth, trial)
        if key not in records:
            ids, answer = probe(tokenizer, length, depth, trial, style=style, seed=seed)
            best, nll = loss.predictions(torch.tensor([ids], device=loss.device), last=answer)
            correct = best[0].tolist() == ids[-answer:]
            records.add(key, {"correct": correct, "nll": nll.mean().item(), "tokens": len(ids)})
        progress("passkey", done, len(cells))

    def table(of: str) -> list[list[float | None]]:
        return [[_mean(records, of, n, d, trials) for d in depths] for n in lengths]

    return {
        "style": style,
        "lengths": list(lengths),
        "depths": list(depths),
        "trials": trials,
        "accuracy": table("correct"),
        "nll": table("nll"),
    }


def probe(
    tokenizer: Any, length: int, depth: float, trial: int, *, style: str, seed: int
) -> tuple[list[int], int]:
    """One probe: (token ids of context, question and answer; how many of them are the answer).

    Raises:
        DataError: ``length`` cannot hold the key, the question and the answer.
    """
    rng = random.Random(f"{seed}/{length}/{depth}/{trial}")
    number, filler_seed = str(rng.randint(10_000, 99_999)), rng.randrange(2**31)
    chars = length * 8
    while True:
        context, question, answer = wording(style)(chars, depth, number, filler_seed)
        ids = tokenizer(context + question + answer, verbose=False)["input_ids"]
        if len(ids) <= length:
            break
        if chars <= 0:
            raise DataError(
                f"A passkey probe needs at least {len(ids)} tokens with this tokenizer, "
                f"{length} were allowed: "
                "give longer lengths."
            )
        # Characters per token vary along the text: aim just below, and again until it fits.
        chars = min(chars - 1, int(chars * (length / len(ids)) * 1.01)) if chars > 64 else 0
    prompt = tokenizer(context + question, verbose=False)["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), None)
    return ids, len(ids) - (min(len(prompt), len(ids)) if shared is None else shared)


def wording(style: str) -> Callable[[int, float, str, int], tuple[str, str, str]]:
    """(characters, depth, key, seed) to (context, question, answer) in a style of ``STYLES``."""
    if style == "prose":
        return prose
    from longspan.train.recall import passkey_text

    return passkey_text


def _key(length: int, depth: float, trial: int) -> str:
    return f"{length}/{depth:g}/{trial}"


def _mean(records: Records, of: str, length: int, depth: float, trials: int) -> float | None:
    keys = [_key(length, depth, trial) for trial in range(trials)]
    values = [records[key][of] for key in keys if key in records]
    return mean(values) if values else None
