from __future__ import annotations

import pytest

from mpreader.errors import PlanError
from mpreader.ranges import MAX_LOAD_GAP_BYTES, FilePlan, ItemRange, Part, plan_files

GAP = MAX_LOAD_GAP_BYTES


def test_plan_reads_over_no_gap_that_costs_more_than_a_request() -> None:
    ranges = [ItemRange(0, 10), ItemRange(10 + GAP, 20 + GAP), ItemRange(21 + 2 * GAP, 30 + 2 * GAP)]
    parts = [Part(0, 20 + GAP), Part(21 + 2 * GAP, 30 + 2 * GAP)]
    assert plan_files({"s3://b/k": ranges}, max_gap_bytes=float("inf"), part_bytes=10 * GAP) == {
        "s3://b/k": FilePlan(2, parts)
    }
    assert plan_files({"s3://b/k": ranges}, max_gap_bytes=GAP - 1, part_bytes=10 * GAP)["s3://b/k"].groups == 3


def test_plan_keeps_the_order_of_files_and_has_nothing_for_empty_ranges() -> None:
    plans = plan_files({"s3://b/z": [ItemRange(5, 5)], "s3://b/a": [ItemRange(3, 9)]}, max_gap_bytes=0, part_bytes=4)
    assert list(plans.items()) == [
        ("s3://b/z", FilePlan(0, [])),
        ("s3://b/a", FilePlan(1, [Part(3, 6), Part(6, 9)])),
    ]


def test_plan_refuses_wrong_sizes() -> None:
    ranges = {"s3://b/k": [ItemRange(0, 10)]}
    with pytest.raises(ValueError, match="max_gap_size must be non-negative"):
        plan_files(ranges, max_gap_bytes=-1, part_bytes=10)
    with pytest.raises(PlanError, match="part_bytes must be"):
        plan_files(ranges, max_gap_bytes=0, part_bytes=0)
