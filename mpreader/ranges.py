"""Planning of byte ranges: groups ranges that are cheaper to fetch together, and cuts the groups into requests.

Readers and fetchers plan with it, and ``mpreader inspect`` tells from it what a load would ask for. It is pure
arithmetic: it knows no objects, no pool and no network, and every plan depends on its arguments only.

Ranges are half-open: ``start`` is the first byte, ``end`` is one past the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from mpreader.errors import PlanError

__all__ = [
    "DEFAULT_MAX_GAP_SIZE",
    "MAX_LOAD_GAP_BYTES",
    "FilePlan",
    "ItemRange",
    "Part",
    "RangeGroup",
    "check_max_gap",
    "clusters",
    "coalesce",
    "coverage",
    "gap_worth_receiving",
    "partition",
    "plan_files",
]

_CONNECTION_BYTES_PER_S: Final = 90_000_000  # of S3, on one connection


def gap_worth_receiving(request_s: float) -> int:
    """Largest gap between two ranges, in bytes, that is cheaper to receive than to leave out.

    Leaving a gap out costs one more request, for whose first byte a connection waits. Receiving it costs the time that
    a connection takes for its bytes, at S3's rate of about 90 MB/s. That rate is known roughly, so the result is
    rounded down to a power of two.

    Args:
        request_s: Seconds that one more request costs: 0.01 to 0.03 for S3, in part hidden by other connections, which
            receive meanwhile.
    """
    return 1 << (int(request_s * _CONNECTION_BYTES_PER_S).bit_length() - 1)


# The default of the public argument ``max_gap_size`` of loads: s3torchconnector's. Its dcp_optimized reader, and ours,
# streams a group by a single request, and reads over a gap rather than to begin another stream.
DEFAULT_MAX_GAP_SIZE: Final = 32 * 1024 * 1024
# The bound of loads through the pool, whatever ``max_gap_size`` says: 2 MiB.
MAX_LOAD_GAP_BYTES: Final = gap_worth_receiving(request_s=0.025)


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
        over_read: Number of its bytes that are in gaps, and belong to no item.
        slot_offset: First byte of the memory that it is received into, counted from the start of its slot.
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
    """Check the public argument ``max_gap_size``: the largest gap, in bytes, that is fetched.

    Raises:
        TypeError: ``value`` is neither int nor float.
        ValueError: ``value`` is negative or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"max_gap_size must be int or float, got {type(value).__name__}")
    if not value >= 0:  # written so that NaN is refused as well
        raise ValueError(f"max_gap_size must be non-negative, got {value!r}")


def coalesce(ranges: Sequence[ItemRange], *, max_gap_bytes: float) -> list[RangeGroup]:
    """Group the ranges that are at most ``max_gap_bytes`` apart.

    Args:
        ranges: In any order; may repeat, overlap and nest. Empty ones belong to no group.
        max_gap_bytes: Largest gap inside a group. 0 joins only what touches or overlaps, ``float("inf")`` joins all.

    Returns:
        The groups, sorted, more than ``max_gap_bytes`` apart.

    Raises:
        TypeError: ``max_gap_bytes`` is not a number.
        ValueError: ``max_gap_bytes`` is negative or NaN.
    """
    check_max_gap(max_gap_bytes)
    return [
        RangeGroup(hull.start, hull.end, tuple(ranges[index] for index in indices), tuple(indices))
        for hull, indices in _join(ranges, max_gap_bytes)
    ]


def partition(group: RangeGroup, *, part_bytes: int) -> list[Part]:
    """Cut a group into requests.

    Cuts fall between items wherever that is possible, and a gap that falls on a cut is not fetched. Items that
    together exceed ``part_bytes`` and can't be parted, being one item or overlapping ones, are cut evenly.

    Args:
        group: The group.
        part_bytes: Most bytes of one part, at least 1.

    Returns:
        The parts, sorted and disjoint. Together they hold every byte of every item exactly once; each
        starts and ends with a byte of an item.

    Raises:
        PlanError: ``part_bytes`` is not a whole number of at least 1.
    """
    if not _is_int(part_bytes) or part_bytes < 1:
        raise PlanError(f"part_bytes must be a whole number of at least 1, got {part_bytes!r}")
    parts: list[Part] = []
    for cluster in clusters(group.item_ranges):
        # The last part has room for the cluster and for the gap before it. Where it has none, the gap is left out:
        # a further request begins anyway.
        if parts and cluster.end - parts[-1].start <= part_bytes:
            last = parts[-1]
            parts[-1] = Part(last.start, cluster.end, last.over_read + cluster.start - last.end)
        else:
            parts.extend(_cut_evenly(cluster, part_bytes))
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
    ranges_by_file: Mapping[str, Sequence[ItemRange]], *, max_gap_bytes: float, part_bytes: int
) -> dict[str, FilePlan]:
    """Cut the ranges of a load into requests.

    Args:
        ranges_by_file: The ranges by URI.
        max_gap_bytes: Largest gap within one request; more than ``MAX_LOAD_GAP_BYTES`` never is.
        part_bytes: Most bytes of one request, at least 1.

    Returns:
        The requests by URI, in the order of ``ranges_by_file``.

    Raises:
        TypeError: ``max_gap_bytes`` is not a number.
        ValueError: ``max_gap_bytes`` is negative.
        PlanError: ``part_bytes`` is not a whole number of at least 1.
    """
    bound = min(max_gap_bytes, MAX_LOAD_GAP_BYTES)
    plans = {}
    for uri, ranges in ranges_by_file.items():
        groups = coalesce(ranges, max_gap_bytes=bound)
        parts = [part for group in groups for part in partition(group, part_bytes=part_bytes)]
        plans[uri] = FilePlan(len(groups), parts)
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

    A ``max_gap`` of -1 joins only ranges that share at least one byte.
    """
    by_start = sorted((i for i, r in enumerate(ranges) if r.start < r.end), key=lambda i: ranges[i].start)
    start, end, indices = 0, 0, list[int]()
    for index in by_start:
        item = ranges[index]
        if indices and item.start - end > max_gap:
            yield ItemRange(start, end), indices
            indices = []
        if not indices:
            start, end = item.start, item.end
        indices.append(index)
        end = max(end, item.end)  # the range may lie within an earlier one
    if indices:
        yield ItemRange(start, end), indices


def _cut_evenly(cluster: ItemRange, part_bytes: int) -> Iterator[Part]:
    # As few parts as part_bytes allows, all of one size: full parts and a tiny rest would cost a request for little.
    count = -(-cluster.size // part_bytes)
    cuts = [cluster.start + cluster.size * i // count for i in range(count + 1)]
    return map(Part, cuts[:-1], cuts[1:])


def _is_int(value: object) -> bool:
    # True and False are ints to Python, and would pass for the numbers 1 and 0.
    return isinstance(value, int) and not isinstance(value, bool)
