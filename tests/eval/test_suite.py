"""Which held-out text is measured."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from longspan.eval.suite import spread


def numbered(*sizes: int) -> list[torch.Tensor]:
    """Documents whose tokens count on, so that a token says where it stands in all the text."""
    return list(torch.arange(sum(sizes)).split(list(sizes)))


def starts(pieces: list[torch.Tensor], length: int) -> list[int]:
    assert all(len(piece) == length for piece in pieces)
    assert all(bool((piece.diff() == 1).all()) for piece in pieces)
    return [int(piece[0]) for piece in pieces]


def test_windows_come_from_all_documents() -> None:
    text = numbered(50, 50, 50, 50)
    assert starts(spread(text, 10, 4), 10) == [20, 70, 120, 170]
    assert starts(spread(text, 10, 1), 10) == [100]


def test_windows_stay_inside_documents_and_never_overlap() -> None:
    text = numbered(25, 7, 31, 12, 9, 40)
    found = starts(spread(text, 10, 6), 10)
    assert len(set(found)) == 6
    for start in found:
        assert any(int(d[0]) <= start and start + 9 <= int(d[-1]) for d in text)
    assert all(b - a >= 10 for a, b in pairwise(found))


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_short_documents_are_joined(count: int) -> None:
    found = starts(spread(numbered(7, 8, 9, 8, 7, 8, 6), 10, count), 10)
    assert len(found) == min(count, 5)
    assert found == sorted(set(found))


def test_everything_is_taken_where_there_is_no_choice() -> None:
    assert starts(spread(numbered(20, 20), 10, 4), 10) == [0, 10, 20, 30]
    assert starts(spread(numbered(20, 20), 10, 99), 10) == [0, 10, 20, 30]
