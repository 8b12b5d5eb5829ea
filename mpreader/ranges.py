"""Byte ranges of one object: which belong together, and how they are cut into requests. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from mpreader.errors import PlanError

__all__ = [
    "DEFAULT_MAX_GAP_SIZE",
    "WORTHWHILE_GAP_SIZE",
    "FilePlan",
    "ItemRange",
    "Part",
    "RangeGroup",
    "check_max_gap",
    "clusters",
    "coalesce",
    "coverage",
    "partition",
    "plan_files",
]

DEFAULT_MAX_GAP_SIZE: Final = 32 * 1024 * 1024
# Beyond it a gap costs more than a request: a connection of S3 brings 90 MB/s and begins after 30 ms or so, and while
# one waits for its answer others receive.
WORTHWHILE_GAP_SIZE: Final = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ItemRange:
    """The bytes of one item (a tensor, say) of an object.

    Attributes:
        start: First byte, counted from the start of the object.
        end: One past the last byte; equal to ``start`` for an item without bytes.

    Raises:
        PlanError: Not whole numbers with ``0 <= start <= end``.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not (_is_int(self.start) and _is_int(self.end) and 0 <= self.start <= self.end):
            raise PlanError(
                f"a byte range needs whole numbers with 0 <= start <= end, got start={self.start!r}, end={self.end!r}"
            )

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class RangeGroup:
    """Ranges so close together that they are fetched as one, gaps included.

    Attributes:
        start: First byte of the group.
        end: One past the last byte of the group.
        item_ranges: The ranges, none empty, sorted by start.
        indices: For each of ``item_ranges``, its position in the input of :func:`coalesce`.
    """

    start: int
    end: int
    item_ranges: tuple[ItemRange, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of one request.

    Attributes:
        start: First byte.
        end: One past the last byte.
        over_read: How many of them are in gaps, and belong to no item.
        slot_offset: Where they are received, counted from the start of the memory that was set aside for them.
    """

    start: int
    end: int
    over_read: int = field(default=0, compare=False)
    slot_offset: int = field(default=0, compare=False)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.start


def check_max_gap(value: object) -> None:
    """Refuse what can't be a largest gap in bytes.

    Raises:
        TypeError: ``value`` is neither int nor float.
        ValueError: ``value`` is negative or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"max_gap_size must be int or float, got {type(value).__name__}")
    if not value >= 0:  # written so that NaN is refused as well
        raise ValueError(f"max_gap_size must be non-negative, got {value!r}")


def coalesce(ranges: Sequence[ItemRange], max_gap: float) -> list[RangeGroup]:
    """Group the ranges that are at most ``max_gap`` bytes apart.

    Args:
        ranges: In any order; may repeat, overlap and nest. Empty ones belong to no group.
        max_gap: Largest gap, in bytes, inside a group. 0 joins only what touches or overlaps,
            ``float("inf")`` joins all.

    Returns:
        The groups, sorted, more than ``max_gap`` bytes apart.

    Raises:
        TypeError: ``max_gap`` is not a number.
        ValueError: ``max_gap`` is negative or NaN.
    """
    check_max_gap(max_gap)
    return [
        RangeGroup(hull.start, hull.end, tuple(ranges[index] for index in indices), tuple(indices))
        for hull, indices in _join(ranges, max_gap)
    ]


def partition(group: RangeGroup, part_size: int) -> list[Part]:
    """Cut a group into requests.

    Cuts fall between items wherever that is possible, and a gap that falls on a cut is not fetched. Items that
    together exceed ``part_size`` and can't be parted, being one item or overlapping ones, are cut evenly.

    Args:
        group: What to fetch.
        part_size: Most bytes of one part, at least 1.

    Returns:
        The parts, sorted and disjoint. Together they hold every byte of every item exactly once; each
        starts and ends with a byte of an item.

    Raises:
        PlanError: ``part_size`` is not a whole number of at least 1.
    """
    if not _is_int(part_size) or part_size < 1:
        raise PlanError(f"part_size must be a whole number of at least 1, got {part_size!r}")
    parts: list[Part] = []
    for cluster in clusters(group.item_ranges):
        if parts and cluster.end - parts[-1].start <= part_size:
            last = parts[-1]
            parts[-1] = Part(last.start, cluster.end, last.over_read + cluster.start - last.end)
        else:
            parts.extend(_cut_evenly(cluster, part_size))
    return parts


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


def coverage(ranges: Sequence[ItemRange]) -> list[ItemRange]:
    """The bytes that the ranges hold, as sorted intervals that neither overlap nor touch."""
    return [hull for hull, _ in _join(ranges, 0)]


def clusters(ranges: Sequence[ItemRange]) -> list[ItemRange]:
    """Join only ranges that share a byte; the result is sorted, and neighbours may touch.

    Between two clusters an object can be cut without cutting through a range.
    """
    return [hull for hull, _ in _join(ranges, -1)]


def _join(ranges: Sequence[ItemRange], max_gap: float) -> Iterator[tuple[ItemRange, list[int]]]:
    """Sweep over the non-empty ranges; yields each hull with the positions of its ranges, by start.

    A gap of -1 means: sharing at least one byte.
    """
    order = sorted((i for i, r in enumerate(ranges) if r.start < r.end), key=lambda i: ranges[i].start)
    start, end, indices = 0, 0, list[int]()
    for index in order:
        item = ranges[index]
        if indices and item.start - end > max_gap:
            yield ItemRange(start, end), indices
            indices = []
        if not indices:
            start, end = item.start, item.end
        indices.append(index)
        end = max(end, item.end)
    if indices:
        yield ItemRange(start, end), indices


def _cut_evenly(cluster: ItemRange, part_size: int) -> Iterator[Part]:
    # As few parts as part_size allows, all of one size: full parts and a tiny rest would cost a request for little.
    count = -(-cluster.size // part_size)
    cuts = [cluster.start + cluster.size * i // count for i in range(count + 1)]
    return map(Part, cuts[:-1], cuts[1:])


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
