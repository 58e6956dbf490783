"""The protocols against plain transcriptions of what was published."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longspan.errors import DataError, InputError
from longspan.eval.perplexity import perplexity, windows
from longspan.eval.records import Records


class Known:
    """Scores each token by its own id / 100: every mean is known in advance."""

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)
        self.device = torch.device("cpu")
        self.calls = 0

    def __call__(self, ids_BN: Tensor) -> Tensor:
        self.calls += 1
        return ids_BN[:, 1:].float() / 100


def text(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 300, (size,), generator=torch.Generator().manual_seed(seed))


def longlora(data: Tensor, length: int, stride: int) -> float:
    """The published loop: all starts but the last, mean loss of each window, mean over windows."""
    starts = list(range(0, len(data) - length, stride))
    starts.pop()
    means = [(data[i + 1 : i + length].double() / 100).mean() for i in starts]
    return math.exp(torch.stack(means).mean())


def yarn(documents: list[Tensor], length: int, stride: int, bos: int | None) -> float:
    """The published loop: old targets masked, mean of each window, mean over windows."""
    room = length - 1 if bos is not None else length
    means = []
    for document in documents:
        before = 0
        for begin in range(0, len(document), stride):
            end = min(begin + room, len(document))
            ids = document[begin:end]
            if bos is not None:
                ids = torch.cat([torch.tensor([bos]), ids])
            targets = ids.double() / 100
            targets[: len(ids) - (end - before)] = math.nan
            scored = targets[1:]
            means.append(scored[~scored.isnan()].mean())
            before = end
            if end == len(document):
                break
    return math.exp(torch.stack(means).mean())


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(40, 200),
    length=st.integers(4, 30),
    stride=st.integers(1, 16),
    seed=st.integers(0, 5),
)
def test_sliding_is_longlora(size: int, length: int, stride: int, seed: int) -> None:
    if len(range(0, size - length, stride)) < 2:
        return
    data = text(size, seed)
    found = perplexity(Known(), [data], [length], protocol="sliding", stride=stride)  # type: ignore[arg-type]
    assert found["lengths"][0]["perplexity"] == pytest.approx(longlora(data, length, stride))


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(2, 90), min_size=1, max_size=3),
    length=st.integers(4, 30),
    stride=st.integers(1, 30),
    bos=st.sampled_from([None, 7]),
)
def test_new_tokens_is_yarn(sizes: list[int], length: int, stride: int, bos: int | None) -> None:
    # Windows must not jump over tokens: then the published loop scores what it cannot see.
    stride = min(stride, length - 1)
    documents = [text(size, seed) for seed, size in enumerate(sizes)]
    found = perplexity(
        Known(),  # type: ignore[arg-type]
        documents,
        [length],
        protocol="new-tokens",
        stride=stride,
        bos=bos,
    )
    assert found["lengths"][0]["perplexity"] == pytest.approx(yarn(documents, length, stride, bos))


def test_blocks_score_the_same_text_at_every_length() -> None:
    data = text(64)
    found = perplexity(Known(), [data[:30], data[30:]], [8, 64], protocol="blocks")  # type: ignore[arg-type]
    short, long = found["lengths"]
    scored = torch.tensor([i for i in range(64) if i % 8])
    assert short["perplexity"] == pytest.approx(math.exp((data[scored].double() / 100).mean()))
    assert long["perplexity"] == pytest.approx(math.exp((data[1:].double() / 100).mean()))
    assert (short["windows"], short["tokens"], long["tokens"]) == (8, 56, 63)


def test_positions_are_means_over_windows_and_bins() -> None:
    data = text(128)
    found = perplexity(Known(), [data], [32], protocol="blocks", bins=4)  # type: ignore[arg-type]
    rows = data.view(4, 32).double() / 100
    expected = [rows[:, 1:8].mean(), *(rows[:, i : i + 8].mean() for i in (8, 16, 24))]
    assert found["positions"]["edges"] == [0, 8, 16, 24, 32]
    assert found["positions"]["nll"] == pytest.approx([float(e) for e in expected])


def test_a_limit_takes_windows_from_all_over_the_text() -> None:
    data = torch.cat([torch.full((32,), level) for level in (100, 200, 300, 400, 500, 600)])
    found = perplexity(Known(), [data], [16], limit=3)  # type: ignore[arg-type]
    assert found["lengths"][0]["windows"] == 3
    assert found["lengths"][0]["nll"] == pytest.approx((2 + 4 + 6) / 3)


def test_windows_that_are_done_are_not_measured_again(tmp_path: Path) -> None:
    path, data = tmp_path / "r.jsonl", text(96)
    loss = Known()
    first = perplexity(
        loss,
        [data],
        [16, 32],
        limit=2,
        records=Records(path, {"a": 1}),  # type: ignore[arg-type]
    )
    assert first["lengths"][0]["windows"] == 2
    done, seen = loss.calls, []
    again = perplexity(
        loss,  # type: ignore[arg-type]
        [data],
        [16, 32],
        records=Records(path, {"a": 1}),
        progress=lambda what, done, total, note="": seen.append((done, total)),
    )
    fresh = perplexity(Known(), [data], [16, 32])  # type: ignore[arg-type]
    assert again == fresh
    assert loss.calls > done
    assert seen[-1] == (9, 9)
    calls = loss.calls
    perplexity(loss, [data], [16, 32], records=Records(path, {"a": 1}))  # type: ignore[arg-type]
    assert loss.calls == calls


def test_new_tokens_scores_each_token_once() -> None:
    found = windows("new-tokens", [1000], 128, stride=50, bos=True)
    covered = [t for w in found for t in range(w.end - w.scored, w.end)]
    assert covered == list(range(1000))


def test_wrong_requests_are_named() -> None:
    with pytest.raises(InputError, match=r"Unknown protocol 'slide'.*blocks, sliding, new-tokens"):
        windows("slide", [10], 5)
    with pytest.raises(InputError, match="stride of 0"):
        windows("sliding", [10], 5, stride=0)
    with pytest.raises(InputError, match="1 tokens predicts nothing"):
        perplexity(Known(), [text(10)], [1])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="10 tokens, too few for one window of 11"):
        perplexity(Known(), [text(10)], [11])  # type: ignore[arg-type]
    for limit in (0, -1):
        with pytest.raises(InputError, match=f"at least 1, got {limit}"):
            perplexity(Known(), [text(10)], [5], limit=limit)  # type: ignore[arg-type]
