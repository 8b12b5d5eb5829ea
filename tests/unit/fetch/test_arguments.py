"""Arguments of fetches: ranges mean what slices mean, and every wrong option is refused."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader import ConfigError, PlanError
from mpreader.config import MiB
from mpreader.fetch.arguments import FetchOptions, needs_size, to_item_ranges
from mpreader.ranges import ItemRange

DATA = bytes(range(40))

limits = st.one_of(st.none(), st.integers(-50, 50))


@given(limits, limits)
def test_ranges_mean_what_slices_mean_or_are_refused(start: int | None, end: int | None) -> None:
    item: Any = (start, end)
    size = len(DATA) if needs_size([item]) else None
    first = 0 if start is None else max(0, size + start) if size is not None and start < 0 else start
    stop = len(DATA) if end is None else len(DATA) + end if end < 0 else end
    if first > stop:  # a slice would be empty
        with pytest.raises(PlanError):
            to_item_ranges([item], size)
    else:
        [item_range] = to_item_ranges([item], size)
        assert (item_range.start, item_range.end) == (first, stop)
        assert DATA[item_range.start : item_range.end] == DATA[start:end]


def test_numpy_integers_are_whole_numbers_too() -> None:
    ranges: Any = [(np.int64(-8), None), (np.int32(2), np.int64(-1))]
    assert needs_size(ranges)
    assert to_item_ranges(ranges, 100) == [ItemRange(92, 100), ItemRange(2, 99)]


def test_only_ranges_from_the_end_need_the_size() -> None:
    assert needs_size(None)
    assert needs_size([(0, 1), (5, None)])
    assert needs_size([(-1, 3)])
    assert not needs_size([(0, 1), (7, 7)])
    assert to_item_ranges(None, 9) == to_item_ranges([(0, None)], 9) == to_item_ranges([(0, 9)], None)


def test_deadline_is_counted_from_the_beginning_of_the_call() -> None:
    before = time.monotonic()
    assert before + 5 <= FetchOptions(timeout_s=5).deadline <= time.monotonic() + 5
    assert FetchOptions().deadline == math.inf


def test_gap_of_a_fetch_is_1_mib_by_default() -> None:  # which the docstrings say
    assert FetchOptions().max_gap_size == MiB


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"timeout_s": 0}, ConfigError),
        ({"timeout_s": math.nan}, ConfigError),
        ({"timeout_s": True}, ConfigError),
        ({"timeout_s": "soon"}, ConfigError),
        ({"order": "random"}, ConfigError),
        ({"max_gap_size": "1"}, TypeError),
        ({"max_gap_size": -1}, ValueError),
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(wrong: dict[str, Any], error: type[Exception]) -> None:
    [name] = wrong
    with pytest.raises(error, match=name):
        FetchOptions(**wrong)
