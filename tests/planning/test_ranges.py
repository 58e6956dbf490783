"""Interval lists against sets of integers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from longspan.pattern.algebra import END
from longspan.planning.ranges import Ranges

LIMIT = 24
interval = st.tuples(st.integers(-4, LIMIT), st.integers(-4, LIMIT))
rows = st.lists(st.lists(interval, min_size=1, max_size=4), min_size=1, max_size=3)


def build(intervals):
    """One row per entry; rows with fewer intervals are filled up with empty ones."""
    width = max(map(len, intervals))
    full = np.array([row + [(0, 0)] * (width - len(row)) for row in intervals])
    return Ranges.of([(full[:, t, 0], full[:, t, 1]) for t in range(width)], len(full))


def sets(intervals):
    return [set().union(*(range(max(lo, 0), hi) for lo, hi in row)) for row in intervals]


def content(ranges):
    return [
        set().union(*(range(lo, min(hi, LIMIT)) for lo, hi in zip(*row, strict=True)))
        for row in zip(ranges.lo.tolist(), ranges.hi.tolist(), strict=True)
    ]


def assert_normal(ranges):
    used = ranges.lo < ranges.hi
    assert (used[:, :-1] | ~used[:, 1:]).all(), "unused intervals come last"
    assert ((ranges.hi[:, :-1] < ranges.lo[:, 1:]) | ~used[:, 1:]).all(), "sorted, apart"
    assert (ranges.lo[~used] == 0).all()
    assert (ranges.hi[~used] == 0).all()


@given(rows, st.data())
def test_operations_are_set_operations(left, data):
    right = data.draw(
        st.lists(
            st.lists(interval, min_size=1, max_size=4), min_size=len(left), max_size=len(left)
        )
    )
    a, b = build(left), build(right)
    for ranges, expected in (
        (a, sets(left)),
        (a | b, [x | y for x, y in zip(sets(left), sets(right), strict=True)]),
        (a & b, [x & y for x, y in zip(sets(left), sets(right), strict=True)]),
        (a - b, [x - y for x, y in zip(sets(left), sets(right), strict=True)]),
        (a.complement(), [set(range(LIMIT)) - x for x in sets(left)]),
    ):
        assert content(ranges) == expected
        assert_normal(ranges)
    assert a.count().tolist() == [len(x) for x in sets(left)]


def test_complement_reaches_the_end():
    ranges = build([[(2, 5)], [(0, 0)]]).complement()
    assert ranges.lo.tolist() == [[0, 5], [0, 0]]
    assert ranges.hi.tolist() == [[2, END], [END, 0]]


def test_empty_rows_are_filled_with_one_integer():
    ranges = build([[(2, 5)], [(3, 3)]]).fill_empty(np.array([9, 7]))
    assert content(ranges) == [{2, 3, 4}, {7}]
