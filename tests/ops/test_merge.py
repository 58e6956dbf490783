"""What ``ls.merge`` refuses; what it computes is tested with the kernels and passes."""

from __future__ import annotations

import re

import pytest
import torch

import longspan as ls
from longspan.errors import InputError


def pair(*shape, dtype=torch.float32, device="cpu"):
    return (
        torch.zeros(*shape, 8, dtype=dtype, device=device),
        torch.zeros(*shape, dtype=dtype, device=device),
    )


FIRST = pair(1, 2, 5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one"),
        (torch.zeros(2, 1, 2, 5, 8), "got Tensor"),
        (iter([FIRST]), "got list_iterator"),
        (FIRST, "part 0 is tensor"),
        ([FIRST, (FIRST[0],)], "part 1 is (tensor"),
        ([(FIRST[0], 0.5)], "part 0 is (tensor"),
        ([FIRST[::-1]], "[1, 2, 5] and [1, 2, 5, 8]"),
        ([FIRST, pair(1, 2, 6)], "part 1 is [1, 2, 6, 8]"),
        ([FIRST, pair(1, 1, 5)], "part 1 is [1, 1, 5, 8]"),
        ([FIRST, (FIRST[0], FIRST[1][..., None])], "part 1 are [1, 2, 5, 8] and [1, 2, 5, 1]"),
        ([pair(1, 2, 5, dtype=torch.int64)], "part 0 has torch.int64"),
        ([FIRST, pair(1, 2, 5, device="meta")], "with lse on meta"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ls.merge(parts)
