from __future__ import annotations

import pytest

from mpreader.errors import PlanError
from mpreader.ranges import WORTHWHILE_GAP_SIZE, FilePlan, ItemRange, Part, plan_files

GAP = WORTHWHILE_GAP_SIZE


def test_plan_reads_over_no_gap_that_costs_more_than_a_request() -> None:
    ranges = [ItemRange(0, 10), ItemRange(10 + GAP, 20 + GAP), ItemRange(21 + 2 * GAP, 30 + 2 * GAP)]
    parts = [Part(0, 20 + GAP), Part(21 + 2 * GAP, 30 + 2 * GAP)]
    assert plan_files({"s3://b/k": ranges}, float("inf"), 10 * GAP) == {"s3://b/k": FilePlan(2, parts)}
    assert plan_files({"s3://b/k": ranges}, GAP - 1, 10 * GAP)["s3://b/k"].groups == 3


def test_plan_keeps_the_order_of_files_and_has_nothing_for_empty_ranges() -> None:
    plans = plan_files({"s3://b/z": [ItemRange(5, 5)], "s3://b/a": [ItemRange(3, 9)]}, 0, 4)
    assert list(plans.items()) == [
        ("s3://b/z", FilePlan(0, [])),
        ("s3://b/a", FilePlan(1, [Part(3, 6), Part(6, 9)])),
    ]


def test_plan_refuses_wrong_sizes() -> None:
    ranges = {"s3://b/k": [ItemRange(0, 10)]}
    with pytest.raises(ValueError, match="max_gap_size must be non-negative"):
        plan_files(ranges, -1, 10)
    with pytest.raises(PlanError, match="part_size must be"):
        plan_files(ranges, 0, 0)
