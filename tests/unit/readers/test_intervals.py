from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mpreader.ranges import ItemRange
from mpreader.readers.intervals import Intervals

LIMIT = 40
cuts = st.lists(st.integers(0, LIMIT), unique=True).map(sorted)


@given(cuts=cuts, start=st.integers(0, LIMIT), size=st.integers(1, LIMIT))
def test_intervals_hold_what_one_of_them_holds(cuts: list[int], start: int, size: int) -> None:
    # Neighbours touch, or there is a gap where an interval is left out: those whose size is a multiple of three are.
    ranges = [ItemRange(low, high) for low, high in pairwise(cuts) if (high - low) % 3]
    intervals = Intervals(ranges)
    wanted = set(range(start, start + size))
    holders = [index for index, item in enumerate(ranges) if wanted <= set(range(item.start, item.end))]
    assert intervals.hold(start, start + size) == bool(holders)
    if holders:
        assert [intervals.index_at(position) for position in sorted(wanted)] == holders * size
        assert intervals[holders[0]] is ranges[holders[0]]
    assert len(intervals) == len(ranges)


def test_position_before_every_interval_has_no_index() -> None:
    assert Intervals([ItemRange(5, 9)]).index_at(4) == -1
    assert Intervals[ItemRange]([]).index_at(0) == -1
