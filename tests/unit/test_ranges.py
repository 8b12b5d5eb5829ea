"""The planners against models that look at every single byte."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader.collector import collector_paused
from mpreader.errors import PlanError
from mpreader.ranges import (
    MAX_LOAD_GAP_BYTES,
    FilePlan,
    ItemRange,
    Part,
    RangeGroup,
    check_max_gap,
    clusters,
    coalesce,
    coverage,
    gap_worth_receiving,
    partition,
    plan_files,
)

spans = st.tuples(st.integers(0, 60), st.integers(0, 15)).map(lambda span: ItemRange(span[0], span[0] + span[1]))
layouts = st.lists(spans, max_size=12)
gaps = st.one_of(st.integers(0, 25), st.floats(0, 25), st.just(float("inf")))


def bytes_of(*ranges: ItemRange | Part | RangeGroup) -> set[int]:
    return {position for r in ranges for position in range(r.start, r.end)}


def runs(positions: set[int]) -> list[tuple[int, int]]:
    """The maximal runs of consecutive numbers, as (start, end)."""
    starts = sorted(p for p in positions if p - 1 not in positions)
    ends = sorted(p + 1 for p in positions if p + 1 not in positions)
    return list(zip(starts, ends, strict=True))


def pairs(ranges: list[ItemRange] | list[Part] | list[RangeGroup]) -> list[tuple[int, int]]:
    return [(r.start, r.end) for r in ranges]


@pytest.mark.parametrize(
    ("start", "end"), [(-1, 2), (3, 2), (0, 1.0), ("0", 1), (None, 1), (False, 1), (0, True), (0, float("inf"))]
)
def test_item_range_refuses_what_is_no_range(start: Any, end: Any) -> None:
    with pytest.raises(PlanError, match=r"0 <= start <= end"):
        ItemRange(start, end)


def test_item_range_is_an_immutable_value() -> None:
    item = ItemRange(3, 8)
    assert item.size == 5
    assert {item: 1}[ItemRange(3, 8)] == 1
    with pytest.raises(AttributeError):
        item.end = 9  # type: ignore[misc]


@pytest.mark.parametrize("value", [True, "1", None, b""])
def test_max_gap_of_a_wrong_type_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="max_gap_size must be int or float"):
        check_max_gap(value)


@pytest.mark.parametrize("value", [-1, -0.5, float("-inf"), float("nan")])
def test_max_gap_that_is_negative_or_nan_is_refused_everywhere(value: float) -> None:
    with pytest.raises(ValueError, match=f"max_gap_size must be non-negative, got {value}"):
        check_max_gap(value)
    with pytest.raises(ValueError, match="non-negative"):
        coalesce([], max_gap_bytes=value)


@given(st.floats(0.001, 10))
def test_gap_worth_receiving_takes_no_longer_than_a_request(request_s: float) -> None:
    gap = gap_worth_receiving(request_s)
    assert gap <= request_s * 90e6 < 2 * gap


def test_gap_of_a_load_is_bounded_by_2_mib() -> None:  # which the docstrings say, and the plans of ``inspect`` show
    assert MAX_LOAD_GAP_BYTES == 2 * 1024 * 1024


@given(layouts, gaps)
def test_groups_are_the_runs_left_when_small_gaps_are_filled(layout: list[ItemRange], gap: float) -> None:
    filled = bytes_of(*layout)
    for (_, left), (right, _) in zip(runs(filled)[:-1], runs(filled)[1:], strict=True):
        if right - left <= gap:
            filled = filled | set(range(left, right))
    assert pairs(coalesce(layout, max_gap_bytes=gap)) == runs(filled)


@given(layouts, gaps)
def test_groups_hold_each_range_once_and_say_where_it_came_from(layout: list[ItemRange], gap: float) -> None:
    groups = coalesce(layout, max_gap_bytes=gap)
    indices = [index for group in groups for index in group.indices]
    assert sorted(indices) == [index for index, item in enumerate(layout) if item.size]
    for group in groups:
        assert group.item_ranges == tuple(layout[index] for index in group.indices)
        assert [item.start for item in group.item_ranges] == sorted(item.start for item in group.item_ranges)
        assert bytes_of(*group.item_ranges) <= bytes_of(group)


@given(layouts)
def test_coverage_is_the_runs_of_covered_bytes(layout: list[ItemRange]) -> None:
    assert pairs(coverage(layout)) == runs(bytes_of(*layout))


@given(layouts)
def test_clusters_are_cut_wherever_no_range_is_cut_through(layout: list[ItemRange]) -> None:
    covered = bytes_of(*layout)
    # A border between two bytes is inside a range when the range holds both; model the object at double resolution.
    doubled = {2 * p for p in covered} | {2 * p + 1 for r in layout for p in range(r.start, r.end - 1)}
    expected = [(start // 2, end // 2 + 1) for start, end in ((s, e - 1) for s, e in runs(doubled))]
    assert pairs(clusters(layout)) == expected


@given(layouts, gaps, st.integers(1, 40))
def test_parts_hold_every_item_byte_once_and_no_edge_in_a_gap(layout: list[ItemRange], gap: float, size: int) -> None:
    for group in coalesce(layout, max_gap_bytes=gap):
        parts = partition(group, part_bytes=size)
        items = bytes_of(*group.item_ranges)
        assert all(0 < part.size <= size for part in parts)
        assert all(left.end <= right.start for left, right in itertools.pairwise(parts))
        assert items <= bytes_of(*parts) <= bytes_of(group)
        assert all({part.start, part.end - 1} <= items for part in parts)


@given(layouts, gaps, st.integers(1, 40))
def test_parts_cut_through_items_only_when_those_are_too_large(layout: list[ItemRange], gap: float, size: int) -> None:
    for group in coalesce(layout, max_gap_bytes=gap):
        borders = {edge for part in partition(group, part_bytes=size) for edge in (part.start, part.end)}
        for cluster in clusters(group.item_ranges):
            inside = sorted(b for b in borders if cluster.start < b < cluster.end)
            assert len(inside) == max(0, -(-cluster.size // size) - 1)  # as few cuts as can be
            edges = [cluster.start, *inside, cluster.end]
            pieces = [right - left for left, right in itertools.pairwise(edges)]
            assert max(pieces) - min(pieces) <= 1  # and even ones


@given(layouts, gaps, st.integers(1, 40))
def test_parts_are_filled_before_a_new_one_is_begun(layout: list[ItemRange], gap: float, size: int) -> None:
    for group in coalesce(layout, max_gap_bytes=gap):
        ends = {cluster.end for cluster in clusters(group.item_ranges)}
        starts = {cluster.start: cluster.end for cluster in clusters(group.item_ranges)}
        parts = partition(group, part_bytes=size)
        for left, right in itertools.pairwise(parts):
            if left.end in ends and right.start in starts:  # a cut between items: the next one had no room
                assert starts[right.start] - left.start > size


def test_parts_leave_out_a_gap_that_falls_on_a_cut() -> None:
    [group] = coalesce([ItemRange(0, 8), ItemRange(10, 12), ItemRange(20, 30)], max_gap_bytes=100)
    assert pairs(partition(group, part_bytes=12)) == [(0, 12), (20, 30)]


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_partition_refuses_parts_of_less_than_a_byte(size: Any) -> None:
    with pytest.raises(PlanError, match="part_bytes"):
        partition(RangeGroup(0, 1, (ItemRange(0, 1),), (0,)), part_bytes=size)


def test_planning_of_100_000_ranges_takes_no_quadratic_time() -> None:
    def seconds(count: int) -> float:
        ranges = [ItemRange(i * 7919 % count * 100, i * 7919 % count * 100 + 90) for i in range(count)]
        with collector_paused():  # it would go through all that torch and other tests hold
            began = time.process_time()
            [group] = coalesce(ranges, max_gap_bytes=float("inf"))
            assert len(partition(group, part_bytes=1000)) == count // 10
            return time.process_time() - began

    assert seconds(100_000) < 40 * max(seconds(10_000), 0.01)  # quadratic: 100 times as long


def test_plan_of_files_reads_over_no_gap_that_costs_more_than_a_request() -> None:
    gap = MAX_LOAD_GAP_BYTES
    ranges = [
        ItemRange(0, 10),
        ItemRange(10 + gap, 20 + gap),
        ItemRange(21 + 2 * gap, 30 + 2 * gap),
    ]
    parts = [Part(0, 20 + gap), Part(21 + 2 * gap, 30 + 2 * gap)]
    assert plan_files({"s3://b/k": ranges}, max_gap_bytes=float("inf"), part_bytes=10 * gap) == {
        "s3://b/k": FilePlan(2, parts)
    }
    assert plan_files({"s3://b/k": ranges}, max_gap_bytes=gap - 1, part_bytes=10 * gap)["s3://b/k"].groups == 3


def test_plan_of_files_keeps_the_order_of_files_and_has_nothing_for_empty_ranges() -> None:
    plans = plan_files({"s3://b/z": [ItemRange(5, 5)], "s3://b/a": [ItemRange(3, 9)]}, max_gap_bytes=0, part_bytes=4)
    assert list(plans.items()) == [
        ("s3://b/z", FilePlan(0, [])),
        ("s3://b/a", FilePlan(1, [Part(3, 6), Part(6, 9)])),
    ]


def test_plan_of_files_refuses_wrong_sizes() -> None:
    ranges = {"s3://b/k": [ItemRange(0, 10)]}
    with pytest.raises(ValueError, match="max_gap_size must be non-negative"):
        plan_files(ranges, max_gap_bytes=-1, part_bytes=10)
    with pytest.raises(PlanError, match="part_bytes must be"):
        plan_files(ranges, max_gap_bytes=0, part_bytes=0)


skips = (
    st.lists(st.integers(0, 40), unique=True, max_size=8)
    .map(sorted)
    .map(lambda cuts: tuple(zip(cuts[::2], cuts[1::2], strict=False)))
)


@given(skips, st.integers(0, 39))
def test_rest_of_a_part_continues_where_the_received_bytes_end(
    skips: tuple[tuple[int, int], ...], received: int
) -> None:
    part = Part(100, 140, slot_offset=7, skips=tuple((100 + start, 100 + end) for start, end in skips))
    places: dict[int, int] = {}
    for byte in range(part.start, part.end):
        if not any(start <= byte < end for start, end in part.skips):
            places[byte] = part.slot_offset + len(places)
    assert part.kept_bytes == len(places)
    rest = part.rest(received)
    assert (rest.start, rest.end) == (100 + received, 140)
    left = [byte for byte in places if byte >= rest.start]
    assert rest.kept_bytes == len(left)
    assert not left or rest.slot_offset == places[left[0]]
    assert [byte for byte in range(rest.start, 140) if not any(a <= byte < b for a, b in rest.skips)] == left
    assert rest.rest(0) is rest
    first = part.first(received)
    assert (first.start, first.end, first.slot_offset) == (100, 100 + received, 7)
    assert first.kept_bytes + rest.kept_bytes == part.kept_bytes
    before = [byte for byte in places if byte < rest.start]
    assert [byte for byte in range(100, first.end) if not any(a <= byte < b for a, b in first.skips)] == before
