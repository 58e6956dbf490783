"""Plans that are kept: the latest by content, for any number of threads."""

from __future__ import annotations

import torch

from longspan.ops import kept as module
from longspan.ops.kept import Kept
from longspan.ops.ranges import KeyRanges


def ranges(number):
    lo = torch.full((1, 1, 1), number, dtype=torch.int32)
    return KeyRanges(lo, lo + 1, torch.zeros(1, 1, dtype=torch.int64), 99)


def asked(kept, number, size=1):
    """The plan of a number, which holds some of it."""
    own = ranges(number)
    content = torch.full((size,), number)
    return kept.plan_of(own, ("kind",), lambda: (content,), lambda x: int(x[0]))


def test_another_thread_may_push_out_what_is_looked_through(monkeypatch):
    kept, equal = Kept(), module._equal
    for number in range(8):
        asked(kept, number)

    def meanwhile(one, other):
        monkeypatch.setattr(module, "_equal", equal)
        # As large as all that may be kept.
        asked(kept, 99, module._MOST_BYTES // 8)
        return equal(one, other)

    monkeypatch.setattr(module, "_MOST_BYTES", 1 << 12)
    last = kept.latest[-1].content
    monkeypatch.setattr(
        module,
        "_equal",
        lambda one, other: meanwhile(one, other) if one is last else equal(one, other),
    )
    assert asked(kept, 7) == 7
    assert asked(kept, 99) == 99


def test_the_latest_plan_of_equal_numbers_is_the_same_object():
    kept, made = Kept(), []
    for number in (3, 4, 3):
        own = ranges(number)
        kept.plan_of(
            own, (), lambda own=own: (own.lo_GNm,), lambda lo: made.append(lo) or object()
        )
    assert len(made) == 2
    assert [int(one.content[0]) for one in kept.latest] == [4, 3]
