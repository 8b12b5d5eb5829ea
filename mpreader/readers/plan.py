"""What a load asks for: the requests of each file, planned in one place for loading and for telling beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpreader.ranges import WORTHWHILE_GAP_SIZE, ItemRange, Part, coalesce, partition

__all__ = ["FilePlan", "plan_files"]


@dataclass(frozen=True, slots=True)
class FilePlan:
    """The requests of one file.

    Attributes:
        groups: Number of groups of ranges that are fetched as one.
        parts: One for each request, sorted and disjoint; none where all ranges are empty.
    """

    groups: int
    parts: list[Part]


def plan_files(
    ranges_by_file: Mapping[str, Sequence[ItemRange]], max_gap_size: float, part_size: int
) -> dict[str, FilePlan]:
    """Cut the ranges of a load into requests.

    Args:
        ranges_by_file: The ranges by URI.
        max_gap_size: Largest gap, in bytes, within one request; more than 2 MiB never is.
        part_size: Most bytes of one request, at least 1.

    Returns:
        The requests by URI, in the order of ``ranges_by_file``.

    Raises:
        TypeError: ``max_gap_size`` is not a number.
        ValueError: ``max_gap_size`` is negative.
        PlanError: ``part_size`` is not a whole number of at least 1.
    """
    gap = min(max_gap_size, WORTHWHILE_GAP_SIZE)
    plans = {}
    for uri, ranges in ranges_by_file.items():
        groups = coalesce(ranges, gap)
        plans[uri] = FilePlan(len(groups), [part for group in groups for part in partition(group, part_size)])
    return plans
