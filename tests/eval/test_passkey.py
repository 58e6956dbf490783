"""Probes hold what they should, and grading tells models that know from models that do not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan.errors import DataError, InputError
from longspan.eval.passkey import passkey, probe, prose
from longspan.eval.records import Records


class Letters:
    """A tokenizer: one token per character, a start token in front."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}

    def read(self, ids: list[int]) -> str:
        return "".join(map(chr, ids[1:]))


class Knowing:
    """Predicts the true tokens, or (from some length on) always the same one."""

    def __init__(self, up_to: int) -> None:
        self.model = nn.Linear(1, 1)
        self.device = torch.device("cpu")
        self.up_to = up_to
        self.calls = 0

    def predictions(self, ids: Tensor, last: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        truth = ids[:, -last:]
        known = ids.shape[1] <= self.up_to
        return (truth if known else torch.full_like(truth, 3)), torch.ones(1, last)


@pytest.mark.parametrize("style", ["prose", "code"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_probe_fills_the_length_and_holds_the_key_at_its_depth(style: str, depth: float) -> None:
    tokenizer = Letters()
    ids, answer = probe(tokenizer, 2000, depth, 0, style=style, seed=0)
    assert 1700 <= len(ids) <= 2000
    text = tokenizer.read(ids)
    key = text[-answer:].strip()
    assert re.fullmatch(r"\d{5}", key)
    place = text.index(key)
    assert place < len(text) - answer, "the key stands in the context too"
    assert abs(place / len(text) - depth) < 0.15


def test_probes_differ_by_trial_and_seed_and_repeat() -> None:
    def key(trial: int, seed: int) -> list[int]:
        return probe(Letters(), 900, 0.5, trial, style="prose", seed=seed)[0]

    assert key(0, 0) == key(0, 0)
    assert key(0, 0) != key(1, 0)
    assert key(0, 0) != key(0, 1)


def test_prose_is_the_published_wording() -> None:
    context, question, answer = prose(1000, 0.5, "12345", 0)
    assert context.startswith("There is an important info hidden inside a lot of irrelevant text.")
    assert "The grass is green. The sky is blue. The sun is yellow. Here we go." in context
    assert "The pass key is 12345. Remember it. 12345 is the pass key." in context
    assert question.endswith("What is the pass key? The pass key is")
    assert answer == " 12345"


def test_answer_that_merges_with_the_question_is_found() -> None:
    class Merging(Letters):
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            # The space before the first digit belongs to the last word once digits follow.
            return {"input_ids": [ord(c) for c in text.replace("s 1", "\u0101")]}

    for trial in range(20):
        ids, answer = probe(Merging(), 600, 0.0, trial, style="prose", seed=0)
        assert answer == (5 if 0x101 in ids[-6:] else 6)


def test_accuracy_by_length_and_depth(tmp_path: Path) -> None:
    model, path = Knowing(up_to=700), tmp_path / "r.jsonl"
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"trials": 2, "style": "prose"}
    found = passkey(
        model,  # type: ignore[arg-type]
        Letters(),
        [600, 900],
        [0.0, 1.0],
        records=Records(path, {}),
        progress=lambda what, done, total, note="": seen.append((done, total)),
        **options,
    )
    assert found["accuracy"] == [[1.0, 1.0], [0.0, 0.0]]
    assert found["nll"] == [[1.0, 1.0], [1.0, 1.0]]
    assert seen[-1] == (8, 8)
    passkey(model, Letters(), [600, 900], [0.0, 1.0], records=Records(path, {}), **options)  # type: ignore[arg-type]
    assert model.calls == 8, "nothing is measured twice"


def test_limit_leaves_cells_empty() -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        passkey(Knowing(10_000), Letters(), [600], [0.0], limit=0)  # type: ignore[arg-type]
    found = passkey(Knowing(10_000), Letters(), [600], [0.0, 1.0], trials=2, limit=3)  # type: ignore[arg-type]
    assert found["accuracy"] == [[1.0, 1.0]]
    found = passkey(Knowing(10_000), Letters(), [600], [0.0, 1.0], trials=2, limit=2)  # type: ignore[arg-type]
    assert found["accuracy"] == [[1.0, None]]


def test_wrong_requests_are_named() -> None:
    with pytest.raises(DataError, match=r"needs at least \d+ tokens.*100 were allowed"):
        probe(Letters(), 100, 0.5, 0, style="prose", seed=0)
    with pytest.raises(InputError, match="Unknown passkey style 'verse'"):
        passkey(Knowing(1), Letters(), [600], [0.0], style="verse")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Depths go from 0"):
        passkey(Knowing(1), Letters(), [600], [1.5])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got 0"):
        passkey(Knowing(1), Letters(), [600], [1.0], trials=0)  # type: ignore[arg-type]
